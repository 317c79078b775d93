"""The scripts as a stranger types them: what they write, what they print, and how they refuse (DESIGN.md 4 and 5)."""

import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, flags, hindi, make_data, metrics, train
from toys import KINDS

import checkpoint
import config
import dataset
import model
import sample_diffusion
import sampling

SCRIPTS = {
    "prepare": [config.PrepareConfig],
    "train_diffusion": [config.MaskConfig, config.TransformerConfig, config.TrainConfig],
    "train_autoregressive": [config.MaskConfig, config.AutoregressiveConfig, config.TrainConfig],
    "train_instruct": [config.InstructConfig, config.TrainConfig],
    "sample_diffusion": [config.SampleConfig],
    "sample_eco_hybrid": [config.SampleConfig],
    "evaluate": [config.EvaluateConfig],
    "app": [config.AppConfig],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(command, script):
    result = command(script, "--help")
    assert result.code == 0 and not result.err
    text = re.sub(r"\s+", " ", result.out)
    for f in (f for cls in SCRIPTS[script] for f in dataclasses.fields(cls) if f.metadata["flag"]):
        assert (f"--{f.name}" in text or f"--no_{f.name}" in text) and len(f.metadata["help"]) >= 5, f.name
        assert re.sub(r"\s+", " ", f"{f.metadata['help']} (default: ") in text, f.name


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("wrong", [["--bogus", "1"], ["--see", "1"], ["--seed", "x"], ["extra"], ["--seed"]])
def test_an_unknown_flag_is_refused(command, monkeypatch, tmp_path, script, wrong):
    monkeypatch.chdir(tmp_path)
    result = command(script, *wrong)
    assert result.code == 2 and "--help" in result.error() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_commands_of_the_design(tmp_path):
    """Each as its own process: prepare, train, sample, evaluate; then the same refused in one line."""
    (tmp_path / "my_text_dir").mkdir()
    (tmp_path / "my_text_dir" / "a.txt").write_text(hindi(100), encoding="utf-8")

    def python(line, *more):
        argv = [sys.executable, *line.replace("python ", f"{ROOT}/").split(), *more]
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = python("python prepare.py --input my_text_dir --output_dir data/processed --vocab_size 360")
    assert done.returncode == 0, done.stderr
    done = python("python train_diffusion.py --data_dir data/processed --output_dir checkpoints/diffusion_hi "
                  "--time_mode continuous --timestep_sampling stratified --masking_strategy span", *TINY)  # fmt: skip
    assert done.returncode == 0 and "done: 12 steps" in done.stdout, done.stderr
    done = python("python sample_diffusion.py --ckpt checkpoints/diffusion_hi/latest.pt --tokenizer "
                  "data/processed/tokenizer.model --max_new_tokens 8 --steps 4 --prompt", "राम गया")  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("राम गया"), done.stderr
    done = python("python evaluate.py --ckpt checkpoints/diffusion_hi/best.pt")
    assert done.returncode == 0 and (tmp_path / "checkpoints" / "diffusion_hi" / "eval.json").exists(), done.stderr
    done = python("python sample_diffusion.py --ckpt none.pt")
    assert done.returncode == 2 and done.stderr == "error: no checkpoint none.pt\n"


# ---------------------------------------------------------------------------------------------------------------------
# sampling


@pytest.fixture
def sample(command, trained):
    """sample("--flag", ...) → its Result, from the trained run, whose window is 32."""
    return lambda *argv: command("sample_diffusion", "--ckpt", trained / "latest.pt", "--max_new_tokens", 16, *argv)


def counted(result):
    """(the samples as text, tokens, forwards) that a run printed."""
    text, numbers = result.out.split("wrote")[0].rsplit("\n\n", 1)
    line = r"(\d+) tokens in (\d+) forwards of \d+ steps asked, ([\d.]+) tokens a forward"
    tokens, forwards, rate = re.match(line, numbers).groups()
    assert float(rate) == pytest.approx(int(tokens) / max(1, int(forwards)), abs=0.051)
    return text, int(tokens), int(forwards)


@pytest.fixture
def forwards(monkeypatch):
    """Counts what really passes through the model."""
    calls, trunk = [], model.Transformer.trunk
    monkeypatch.setattr(model.Transformer, "trunk", lambda *args: calls.append(args[1].shape) or trunk(*args))
    return calls


@pytest.mark.parametrize("strategy", sampling.STRATEGIES)
def test_a_prompt_is_continued(sample, forwards, strategy):
    """The prompt stands, as many forwards happen as are printed, and the same seed writes the same."""
    argv = ["--prompt", "राम बाज़ार", "--max_new_tokens", 12, "--steps", 5, "--strategy", strategy]
    result = sample(*argv)
    assert result.code == 0 and not result.err and "step 12" in result.out
    text, tokens, n = counted(result)
    assert text.startswith("राम बाज़ार") and len(text) > 10 and tokens <= 12 and n == len(forwards)
    assert n == 5 or strategy == "threshold" and 1 <= n <= 5
    assert counted(sample(*argv))[0] == text


def test_sampling_imports_little(trained):
    """A process of its own, from its start to its end; everything that takes long to import and is not needed."""
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print(*sys.modules, file=sys.stderr)"
    argv = ["--ckpt", str(trained), "--prompt", "राम", "--max_new_tokens", "4", "--steps", "2"]
    start = f"import sys; sys.argv = {[f'{ROOT}/sample_diffusion.py', *argv]!r}; sys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120)
    modules = set(done.stderr.splitlines()[-1].split())
    assert done.stdout.startswith("राम") and {"torch", "sampling", "sentencepiece"} <= modules, done.stderr
    slow = {
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "datasets",
        "pyarrow",
        "pandas",
        "matplotlib",
        "plotly",
        "scipy",
    }
    slow |= {
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "triton",
        "onnx",
        "onnxruntime",
        "wandb",
        "tiktoken",
        "prepare",
    }
    slow |= {"train_diffusion", "evaluate", "gradio", "indic_transliteration", "sklearn"}
    assert not slow & modules, slow & modules


def test_confidence_stop(sample, forwards):
    """Any token is surer than nothing: one forward, the text of --steps 1. None is surer than 1: no difference."""
    argv = ["--prompt", "राम", "--max_new_tokens", 12, "--steps"]
    for asked, stop, others in ((9, 1e-6, [1]), (9, 1, [9]), (9, 0, [9])):
        forwards.clear()
        result = sample(*argv, asked, "--confidence_stop", stop)
        text, _, n = counted(result)
        assert f" in {n} forwards of {asked} steps asked, " in result.out and n == len(forwards) == others[0]
        assert text == counted(sample(*argv, *others))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sample_eco_hybrid_is_sample_diffusion(command, monkeypatch, capsys, trained, data, tmp_path, kind):
    """The same text, numbers and trace from either name, whatever kind the checkpoint is; and it runs as a script."""
    if kind != "transformer":
        train(data, trained := tmp_path / kind, "--max_steps", 1, kind=kind)
    outputs = []
    flags = "--num_samples 2 --steps 5 --strategy margin --temperature 1.1 --top_k 50 --top_p 0.95 --seed 3"
    argv = ["--ckpt", trained / "latest.pt", "--prompt", "राम ___2___ में||सीता", "--max_new_tokens", 9, *flags.split()]
    for script in ("sample_diffusion", "sample_eco_hybrid"):
        result = command(script, *argv, "--confidence_stop", 0.9, "--json", tmp_path / "a.json")
        assert result.code == 0 and not result.err
        trace = json.loads((tmp_path / "a.json").read_text("utf-8"))
        for step in trace["steps"]:
            del step["seconds"]
        outputs.append((counted(result), trace))
    assert outputs[0] == outputs[1]
    monkeypatch.setattr(sys, "argv", ["sample_eco_hybrid.py", "--help"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "sample_eco_hybrid.py"), run_name="__main__")
    assert not e.value.code and "usage: sample_eco_hybrid.py" in capsys.readouterr().out


def test_seeds_and_temperature(sample):
    argv = ["--max_new_tokens", 24, "--temperature", 1.0]
    assert len({counted(sample(*argv, "--seed", seed))[0] for seed in range(4)}) == 4
    argv[-1] = 0  # the likeliest tokens do not depend on the seed
    assert len({counted(sample(*argv, "--seed", seed))[0] for seed in range(3)}) == 1
    assert counted(sample("--max_new_tokens", 24, "--top_k", 1))[0] == counted(sample(*argv))[0]


def pieces(text, *parts):
    """What stands between the parts of a text, in order."""
    match = re.fullmatch("(.*)".join(map(re.escape, parts)), text, re.DOTALL)
    assert match, text
    return match.groups()


@pytest.mark.parametrize("prompt, parts, tokens", [
    ("राम ___5___ गया था।", ("राम", " गया था।"), {5}),
    ("राम ___ गया था।", ("राम", " गया था।"), set(range(1, 9))),
    ("राम ___2___ में ___3___।", ("राम", " में", "।"), {5}),
    ("राम ___ में ___।", ("राम", " में", "।"), set(range(2, 17, 2))),
    ("___3___ गया था।", ("", " गया था।"), {3}),
    ("राम ____4____", ("राम", ""), set(range(5))),  # EOS may end it
])  # fmt: skip
def test_blanks_are_filled(sample, prompt, parts, tokens):
    result = sample("--prompt", prompt, "--steps", 20)
    assert result.code == 0
    text, n, forwards = counted(result)
    pieces(text, *parts)
    assert n in tokens and (n == forwards if len(tokens) == 1 else forwards <= 16)


def test_several_prompts_and_samples(sample):
    """In one batch: rows of other lengths do not change what a prompt gets (temperature 0), and all are printed."""
    prompts, argv = (
        ["राम", "सीता नदी के किनारे ___3___ था।", ""],
        ["--temperature", 0, "--steps", 1, "--max_new_tokens", 6],
    )
    alone = [counted(sample("--prompt", p, *argv))[0] for p in prompts]
    together = counted(sample("--prompt", " || ".join(prompts), *argv))[0]
    assert together == "\n\n".join(alone)
    text, tokens, _ = counted(sample("--prompt", "राम||सीता", "--num_samples", 3, "--max_new_tokens", 2, "--top_k", 40))
    samples = text.split("\n\n")
    assert len(samples) == 6 and [s[:3] for s in samples] == ["राम"] * 3 + ["सीत"] * 3 and tokens <= 12


def test_empty_prompt_and_nothing_to_fill(sample, forwards):
    result = sample("--max_new_tokens", 7, "--steps", 3)
    assert result.code == 0 and counted(result)[2] == 3
    forwards.clear()
    result = sample("--prompt", "राम गया", "--max_new_tokens", 0)
    assert result.code == 0 and counted(result) == ("राम गया", 0, 0) and not forwards
    result = sample("--prompt", "", "--max_new_tokens", 0)
    assert result.code == 2 and "nothing to write" in result.error()


class Scripts(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.inside, self.json, self.links = False, "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside = tag == "script" and attrs.get("id") == "trace"
        self.links += [v for k, v in attrs.items() if k in ("src", "href") and not v.startswith(("#", "data:"))]

    def handle_data(self, data):
        if self.inside:
            self.json += data


def test_the_replay_and_the_trace(sample, trained, tmp_path):
    """One trace in both: it begins with the canvas, ends with the text shown, and its numbers are those printed."""
    argv = ["--prompt", "राम ___ था।||सीता </script><b>", "--steps", 6, "--num_samples", 2]
    result = sample(*argv, "--html", tmp_path / "new" / "a.html", "--json", tmp_path / "a.json")
    assert result.code == 0 and result.out.count("wrote ") == 2
    trace = json.loads((tmp_path / "a.json").read_text("utf-8"))
    page = Scripts((tmp_path / "new" / "a.html").read_text("utf-8"))
    assert json.loads(page.json) == trace and not page.links
    text, tokens, forwards = counted(result)
    assert text.split("\n\n")[0] == trace["text"] and trace["prompt"] == "राम ___ था।"
    assert trace["meta"]["steps"] == 6 and trace["meta"]["strategy"] == "confidence"
    mask_id = checkpoint.load(trained / "latest.pt").denoiser.mask_id
    holes = [step["tokens"].count(mask_id) for step in trace["steps"]]
    assert 1 <= holes[0] <= 8 and holes[-1] == 0 and holes == sorted(holes, reverse=True)
    assert trace["steps"][-1]["forwards"] <= forwards and trace["length"] == len(trace["steps"][0]["tokens"])


REFUSED = {
    "--prompt " + "राम-" * 40: r"take \d+ tokens.*window holds 32.*\(\d+ tokens\)",
    "--prompt राम --max_new_tokens 400": r"take 40\d tokens.*window holds 32",
    "--prompt राम___400___": r"window holds 32",
    "--prompt राम___0___": r"0 tokens",
    "--steps 0": r"--steps is 0",
    "--temperature nan": r"--temperature is nan",
    "--temperature -1": r"--temperature is -1",
    "--temperature inf": r"--temperature is inf",
    "--top_k -1": r"--top_k is -1",
    "--top_p 0": r"--top_p is 0",
    "--threshold 2": r"--threshold is 2",
    "--confidence_stop 1.5": r"--confidence_stop is 1\.5",
    "--confidence_stop nan": r"--confidence_stop is nan",
    "--strategy best": r"strategy.*confidence",
    "--max_new_tokens -1": r"--max_new_tokens is -1",
    "--num_samples 0": r"--num_samples is 0",
    "--ckpt nowhere.pt": r"nowhere\.pt",
    "--ckpt /dev/null": r"/dev/null",
    "--tokenizer nowhere.model": r"nowhere\.model",
    "--device cuda:77": r"cuda:77",
    "--html /proc/x/y.html": r"/proc/x",
}


@pytest.mark.parametrize("argv", REFUSED, ids=lambda argv: argv[:24])
def test_a_wrong_command_is_refused(sample, argv):
    result = sample(*argv.split())
    assert result.code == 2 and re.search(REFUSED[argv], result.error()), result


def test_another_tokenizer_is_refused(sample, command, data, tmp_path, trained):
    assert sample("--tokenizer", data / "tokenizer.model", "--max_new_tokens", 1).code == 0
    other = make_data(tmp_path / "other", seed=1)
    result = sample("--tokenizer", other / "tokenizer.model")
    assert result.code == 2 and checkpoint.sha256(other / "tokenizer.model")[:12] in result.error()
    result = command("evaluate", "--ckpt", trained, "--data_dir", other)
    assert result.code == 2 and "another tokenizer" in result.error()
    assert not (trained / "eval.json").exists()


@pytest.mark.parametrize("name", ["model", "ema"])
def test_weights_that_are_not_finite(command, trained, tmp_path, name):
    state = checkpoint.read(trained / "latest.pt")
    state[name]["blocks.0.ff.down.weight"][0, 0] = math.nan
    checkpoint.save(tmp_path / "x.pt", state)
    ema = "--ema" if name == "ema" else "--no_ema"
    argv = ["--ckpt", tmp_path / "x.pt"]
    for script, *more in (("sample_diffusion", "--max_new_tokens", 8, "--json"), ("evaluate", "--output")):
        result = command(script, *argv, ema, *more, tmp_path / "out.json")
        assert result.code == 1 and "not finite" in result.error()
        assert not (tmp_path / "out.json").exists() and not result.out
    other = {"--ema": "--no_ema", "--no_ema": "--ema"}[ema]
    assert command("sample_diffusion", *argv, "--max_new_tokens", 8, other).code == 0


def interrupt():
    trunk, calls = model.Transformer.trunk, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return trunk(*args)

    model.Transformer.trunk = interrupted


def test_ctrl_c(run, trained):
    for script, *argv in (("sample_diffusion", "--max_new_tokens", 8), ("evaluate",)):
        result = run(script, "--ckpt", trained / "latest.pt", *argv, before=interrupt)
        assert result.code == 130 and "Traceback" not in result.err
    assert not (trained / "eval.json").exists()


def test_without_a_name_the_newest_run_is_taken(command, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("sample_diffusion", "--max_new_tokens", 2)
    assert result.code == 0 and "models/diffusion (trained beforehand)" in result.err
    monkeypatch.setattr(checkpoint, "IN_THE_BOX", tmp_path / "no box")
    result = command("sample_diffusion")
    assert result.code == 2 and "checkpoints" in result.error()
    shutil.copytree(trained, tmp_path / "checkpoints" / "mine")
    result = command("sample_diffusion", "--max_new_tokens", 2)
    assert result.code == 0 and "checkpoints/mine/best.pt" in result.out


def test_a_reader_beside_a_trainer(trained, tmp_path, monkeypatch):
    """A checkpoint that is replaced while its sum is taken is no damaged one."""
    path, state, sha256 = tmp_path / "x.pt", checkpoint.read(trained / "latest.pt"), checkpoint.sha256
    checkpoint.save(path, state)

    def replaced_meanwhile(name):
        digest = sha256(name)
        monkeypatch.setattr(checkpoint, "sha256", sha256)
        checkpoint.save(path, state | {"step": 99})
        return digest

    monkeypatch.setattr(checkpoint, "sha256", replaced_meanwhile)
    assert checkpoint.load(path).step == 99


def ascii_only():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def closed_output():
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = open(1, "w", closefd=False)


def test_closed_pipe_and_foreign_encoding(run, trained):
    """A terminal that knows ASCII only, and `| head`."""
    argv = ["--ckpt", trained / "latest.pt", "--max_new_tokens", 4, "--prompt", "राम"]
    result = run("sample_diffusion", *argv, before=ascii_only)
    assert result.code == 0 and result.out.startswith("???")
    result = run("sample_diffusion", *argv, before=closed_output)
    assert result.code == 141 and not result.err


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py


def test_eval_json_agrees_with_a_recomputation(command, trained, data, tmp_path):
    """Sizes from the text itself, units from each other, the bound from full logits and masks of our own."""
    result = command("evaluate", "--ckpt", trained / "best.pt", "--output", tmp_path / "eval.json")
    assert result.code == 0 and not result.err
    figures = json.loads((tmp_path / "eval.json").read_text("utf-8"))
    loaded, files = checkpoint.load(trained / "best.pt"), dataset.load(data)
    text = loaded.tokenizer.decode(files.val.tolist())
    sizes = files.meta["splits"]["val"]
    assert figures["tokens"] == len(files.val) == sizes["tokens"]
    assert figures["bytes"] == len(text.encode()) == sizes["bytes"] and figures["characters"] == len(text)
    assert figures["windows"] == math.ceil(len(files.val) / 32) and figures["step"] == loaded.step
    nats, bits = figures["nats_per_token"]["mean"], figures["bits_per_byte"]["mean"]
    assert bits == pytest.approx(nats * figures["tokens"] / figures["bytes"] / math.log(2))
    characters = figures["bits_per_character"]["mean"]
    assert characters == pytest.approx(bits * figures["bytes"] / figures["characters"])
    assert f"{bits:.4f} ±" in result.out

    windows = torch.from_numpy(files.val[: len(files.val) // 32 * 32].astype(np.int64)).view(-1, 32)  # (B, T)
    g, estimates = torch.Generator().manual_seed(7), []
    with torch.no_grad():
        for _ in range(60):
            k = torch.randint(1, 33, (len(windows), 1), generator=g)
            masked = torch.rand(windows.shape, generator=g).argsort(1).argsort(1) < k
            log_p = loaded.denoiser(windows.masked_fill(masked, loaded.denoiser.mask_id)).log_softmax(2)  # (B, T, V)
            nll = -log_p.gather(2, windows[..., None]).squeeze(2)
            estimates.append((nll * masked).sum(1) / k.squeeze(1))
    own = torch.stack(estimates).double()  # (60, B)
    error = math.hypot(float(own.mean(1).std()) / 60**0.5, float(own.std(0).mean()) / (16 * len(windows)) ** 0.5)
    assert abs(nats - float(own.mean())) < 4 * error < 0.1, (nats, float(own.mean()), error)
    windows_error = float(own.mean(0).std()) / len(windows) ** 0.5
    assert windows_error < figures["nats_per_token"]["standard_error"] < 2.5 * windows_error

    counts = np.bincount(files.train, minlength=360) + 0.5
    unigram = -np.log2(counts / counts.sum())[files.val].sum() / figures["bytes"]
    assert figures["baselines_bits_per_byte"]["unigram"] == pytest.approx(unigram)
    assert figures["baselines_bits_per_byte"]["bigram"] < unigram
    n = [b["n"] for b in figures["by_hidden_fraction"]]
    assert sum(n) == 16 * figures["windows"] and max(n) < 2 * min(n)


def test_evaluate_is_repeatable_and_takes_its_flags(command, trained, data, tmp_path):
    def figures(*argv):
        result = command("evaluate", "--ckpt", trained, "--output", tmp_path / "e.json", *argv)
        assert result.code == 0, result.err
        return {k: v for k, v in json.loads((tmp_path / "e.json").read_text("utf-8")).items() if k != "seconds"}

    few = ["--max_windows", 20, "--masks", 4]
    assert figures(*few) == figures(*few) and figures(*few)["windows"] == 20
    small = figures(*few, "--batch_size", 1)
    assert figures(*few)["nats_per_token"]["mean"] == pytest.approx(small["nats_per_token"]["mean"], rel=0.1)
    means = [
        figures(*few, *argv)["nats_per_token"]["mean"]
        for argv in ([], ["--no_ema"], ["--seed", 1], ["--split", "train"])
    ]
    assert len(set(means)) == 4


@pytest.mark.parametrize("argv, word", [
    (["--data_dir", "nowhere"], "nowhere"), (["--ckpt", "nowhere"], "nowhere"), (["--masks", "0"], "--masks"),
    (["--split", "test"], "val"), (["--output", "nowhere/e.json"], "nowhere"), (["--batch_size", "0"], "--batch_size"),
])  # fmt: skip
def test_a_wrong_evaluation_is_refused(command, trained, argv, word):
    result = command("evaluate", "--ckpt", trained / "best.pt", *argv)
    assert result.code == 2 and word in result.error() and not result.out


def test_evaluate_refuses_damaged_data(command, trained, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    with open(folder / "val.bin", "r+b") as f:
        f.write(b"\x05")
    result = command("evaluate", "--ckpt", trained, "--data_dir", folder, "--output", tmp_path / "e.json")
    assert result.code == 1 and "val.bin" in result.error() and not (tmp_path / "e.json").exists()


def test_the_config_names_every_strategy():
    names = next(f for f in dataclasses.fields(config.SampleConfig) if f.name == "strategy").metadata["choices"]
    assert set(names) == set(sampling.STRATEGIES)


def test_the_lengths_of_a_free_blank(trained):
    loaded = checkpoint.load(trained)
    rows = sample_diffusion.canvases("राम ___ था", loaded.tokenizer, loaded.denoiser.mask_id, 64, 32)
    assert [row.count(loaded.denoiser.mask_id) for row in rows] == list(range(1, 9))
    assert loaded.tokenizer.decode([i for i in rows[0] if i != loaded.denoiser.mask_id]) == "राम था"


# ---------------------------------------------------------------------------------------------------------------------
# the autoregressive twin


def test_the_twin_is_trained_and_evaluated_beside_a_denoiser(command, trained, twin, tmp_path):
    run = json.loads((twin / "config.json").read_text("utf-8"))
    other = json.loads((trained / "config.json").read_text("utf-8"))
    assert run["kind"] == "autoregressive" and run["parameters"] == other["parameters"]
    assert run["weight_decay"] == 0.3 and run["data_sha256"] == other["data_sha256"]
    records = metrics(twin)
    losses = [m["loss"] for m in records if "loss" in m]
    assert losses[0] == pytest.approx(math.log(360), rel=0.05) and losses[-1] < 0.95 * losses[0]
    assert [m["step"] for m in records if "samples" in m] == [4, 8, 12]
    bits = [m["bits_per_byte"] for m in records if "bits_per_byte" in m]
    assert checkpoint.read(twin / "best.pt")["best"] == min(bits)

    ours, theirs = (shutil.copytree(run, tmp_path / run.name) for run in (twin, trained))
    assert command("evaluate", "--ckpt", theirs, "--masks", 2).code == 0
    result = command("evaluate", "--ckpt", ours, "--against", theirs, "--masks", 4, "--batch_size", 5)
    assert result.code == 0 and "exact likelihood" in result.out and "hidden" not in result.out, result.err
    a, b = (json.loads((out / "eval.json").read_text("utf-8")) for out in (ours, theirs))
    assert list(a) == list(b) and a["per_window"]["bytes"] == b["per_window"]["bytes"]
    difference = a["bits_per_byte"]["mean"] - b["bits_per_byte"]["mean"]
    assert f"{difference:+.4f} ± " in result.out
    limited = command("evaluate", "--ckpt", ours, "--max_windows", 8)  # as while training
    assert f"{min(bits):.4f} ±" in limited.out


def test_the_twin_continues_prompts(command, twin, tmp_path):
    argv = ["sample_diffusion", "--ckpt", twin, "--prompt", "राम||सीता नदी के", "--max_new_tokens", 9]
    result = command(*argv, "--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
    assert result.code == 0 and not result.err
    texts = result.out.rsplit("\n\n", 1)[0].split("\n\n")
    assert texts[0].startswith("राम") and texts[1].startswith("सीता नदी के") and "asked" not in result.out
    tokens, forwards = map(int, re.search(r"(\d+) tokens in (\d+) forwards, ", result.out).groups())
    assert tokens <= 18 and 9 <= forwards <= 18
    trace = json.loads((tmp_path / "a.json").read_text("utf-8"))
    holes = [step["tokens"].count(360) for step in trace["steps"]]
    assert holes[0] == 9 and sorted(set(holes), reverse=True) == list(range(9, -1, -1)) and "steps" not in trace["meta"]
    ignored = ["--steps", 2, "--strategy", "random", "--threshold", 0.1, "--confidence_stop", 0.1]
    shown = lambda result: result.out.rsplit("\n\n", 1)[0]  # noqa: E731
    assert shown(command(*argv, *ignored)) == shown(result)
    assert shown(command(*argv, "--seed", 3)) != shown(result)
    many = command("sample_diffusion", "--ckpt", twin, "--num_samples", 3, "--max_new_tokens", 4, "--temperature", 0)
    assert many.code == 0 and "forwards, " in many.out and len(set(shown(many).split("\n\n"))) == 1


@pytest.mark.parametrize("script, argv, words", [
    ("sample_diffusion", ["--prompt", "राम ___ गया"], "cannot fill blanks"),
    ("sample_diffusion", ["--prompt", "राम||___3___"], "cannot fill blanks"),
    ("sample_diffusion", ["--max_new_tokens", "33"], "window holds 32"),
    ("sample_diffusion", ["--temperature", "-1"], "--temperature is -1"),
    ("train_autoregressive", ["--window", "4"], "--window is 4"),
])  # fmt: skip
def test_what_the_twin_refuses(command, data, twin, tmp_path, script, argv, words):
    where = ["--ckpt", twin] if script == "sample_diffusion" else flags(data, tmp_path / "run")
    result = command(script, *where, *argv)
    assert result.code == 2 and words in result.error() and not result.out and not (tmp_path / "run").exists()

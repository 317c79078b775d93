"""export.py and what reads it: folders that load like runs, open in transformers outside of the project; ONNX."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import contents, train
from safetensors.torch import load_file
from toys import build, seeded

import checkpoint
import config
import diffusion
import export
import sample_diffusion
import tokenizer as tokenizers

KINDS = list(export.SCRIPTS)


@pytest.fixture(scope="session")
def runs(data, trained, twin, tmp_path_factory):
    """kind -> a tiny run folder."""
    eco = tmp_path_factory.mktemp("runs") / "eco"
    train(data, eco, "--memory_slots", 4, "--attn_every", 2, kind="eco_hybrid")
    return dict(transformer=trained, eco_hybrid=eco, autoregressive=twin)


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory):
    """kind -> a folder in bf16, with code. Not to be written to."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, run in runs.items():
        cfg = config.ExportConfig(output_dir=str(folder / kind), about="Text of *a small world*.", hardware="a test")
        export.save(checkpoint.load(run), cfg)
    return {kind: folder / kind for kind in runs}


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported["transformer"], tmp_path / "copy"))


# ---------------------------------------------------------------------------------------------------------------------
# the folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_as_the_run_rounded_to_bf16(runs, exported, kind):
    """Against the averaged weights in the .pt itself, each rounded here; config, step and tokenizer are the run's."""
    state, loaded = checkpoint.read(runs[kind] / "best.pt"), checkpoint.load(exported[kind])
    assert (loaded.kind, loaded.step) == (kind, state["step"]) and not loaded.denoiser.training
    assert loaded.path == exported[kind] / "model.safetensors"
    assert dataclasses.asdict(loaded.denoiser.config) == state["model_config"]
    assert loaded.config["max_steps"] == state["config"]["max_steps"]
    assert loaded.tokenizer.to_bytes() == state["tokenizer"].numpy().tobytes()
    ours = loaded.denoiser.state_dict()
    assert ours.keys() == state["ema"].keys()
    for name, value in state["ema"].items():
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], value.bfloat16().float()), name
    stored = load_file(exported[kind] / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.bfloat16}
    assert sum(v.numel() for v in stored.values()) == sum(p.numel() for p in loaded.denoiser.parameters())  # tied once


def test_fp32_keeps_every_bit_and_no_code_none(trained, tmp_path, command):
    argv = ["--ckpt", trained, "--output_dir", tmp_path / "a", "--dtype", "fp32", "--no_code"]
    assert command("export", *argv).code == 0
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.model", "README.md"
    }  # fmt: skip
    assert len({p.stat().st_mode for p in (tmp_path / "a").iterdir()}) == 1  # who may read one may read all
    assert "auto_map" not in json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    stored, ema = load_file(tmp_path / "a" / "model.safetensors"), checkpoint.read(trained / "best.pt")["ema"]
    assert all(torch.equal(stored[name], ema[name]) for name in ema)
    assert command("export", *argv, "--no_ema").code == 0
    stored, model = load_file(tmp_path / "a" / "model.safetensors"), checkpoint.read(trained / "best.pt")["model"]
    assert all(torch.equal(stored[name], model[name]) for name in model)


def test_every_command_takes_a_folder(exported, trained, data, command, copy, tmp_path):
    result = command("sample_diffusion", "--ckpt", copy, "--prompt", "राम", "--max_new_tokens", 4, "--steps", 2)
    assert result.code == 0 and result.out.startswith("राम") and "model.safetensors" in result.out, result.err
    same = command("sample_diffusion", "--ckpt", copy / "model.safetensors", "--max_new_tokens", 4, "--steps", 2)
    assert same.code == 0
    result = command("evaluate", "--ckpt", copy, "--data_dir", data, "--masks", 2)
    assert result.code == 0 and (copy / "eval.json").exists(), result.err
    argv = ["--init", copy, "--data_dir", data, "--output_dir", tmp_path / "more", "--max_steps", 1]
    argv += "--d_model 32 --n_layers 2 --n_heads 2 --d_ff 64 --seq_len 32 --batch_size 2 --grad_accum 1".split()
    result = command("train_diffusion", *argv, "--eval_masks", 1, "--eval_windows", 2, "--device", "cpu")
    assert result.code == 0, result.err
    # exported once more, on itself: the same weights, and a card with the figures
    before = (copy / "model.safetensors").read_bytes()
    assert command("export", "--ckpt", copy, "--output_dir", copy).code == 0
    assert (copy / "model.safetensors").read_bytes() == before
    scores, text = json.loads((copy / "eval.json").read_text("utf-8")), (copy / "README.md").read_text("utf-8")
    mean, error = (scores["bits_per_byte"][k] for k in ("mean", "standard_error"))
    assert f"{mean:.4f} ± {error:.4f}" in text and "*a small world*" in text and "on a test" in text
    assert command("evaluate", "--ckpt", copy, "--data_dir", data, "--masks", 2).code == 0  # of this checkpoint, still


def test_the_card(runs, exported):
    text = (exported["transformer"] / "README.md").read_text("utf-8")
    front = re.match(r"---\n(.*?)\n---\n", text, re.S)[1]
    assert {"language:", "- hi", "license: mit", "library_name: transformers", "- masked-diffusion"} <= set(
        front.splitlines()
    )
    seconds = [json.loads(line)["seconds"] for line in open(runs["transformer"] / "metrics.jsonl", encoding="utf-8")]
    spent = max(s["training"] for s in seconds if "training" in s)
    step = checkpoint.load(runs["transformer"]).step
    assert f"Step {step} of 12, {spent:,.0f} s of training in all, on a test." in text and "Not evaluated yet." in text
    lines = text.split("## Samples")[1].strip().splitlines()[2:]
    tokenizer = checkpoint.load(exported["transformer"]).tokenizer
    fit = [p for p in config.PROMPTS if len(tokenizer.encode(p)) <= 16]  # half of the window
    assert fit and [line.startswith(f"- {p}") for line, p in zip(lines, fit, strict=True)] == [True] * len(fit)


def test_figures_are_those_of_the_weights(trained, data, tmp_path, command):
    """Of another step: none. Of the run: none beside rounded weights, and the card says so. What is stale goes."""
    run, out = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "out"
    card = lambda: (out / "README.md").read_text("utf-8")  # noqa: E731
    argv = ["--ckpt", run, "--output_dir", out]
    assert command("evaluate", "--ckpt", run, "--masks", 2).code == 0
    scores = json.loads((run / "eval.json").read_text("utf-8"))
    mean = f"{scores['bits_per_byte']['mean']:.4f} ± "
    assert command("export", *argv, "--dtype", "fp32").code == 0
    assert mean in card() and "rounded" not in card()
    kept = json.loads((out / "eval.json").read_text("utf-8"))
    assert kept == scores | {"checkpoint": "model.safetensors"} and (out / "model.py").exists()
    assert command("export", *argv, "--no_code").code == 0
    assert mean in card() and "before the weights were rounded" in card()
    assert not (out / "eval.json").exists() and not list(out.glob("*.py"))
    (run / "eval.json").write_text(json.dumps(scores | {"step": scores["step"] + 1}))
    assert command("export", *argv, "--no_code").code == 0 and "Not evaluated yet." in card()


def test_the_card_of_a_model_that_answers(trained, tmp_path, monkeypatch):
    loaded, asked = checkpoint.load(trained), []
    loaded.config |= dict(chats=True, max_steps=77)
    monkeypatch.setattr(
        export.chat, "prompt", lambda turns, tokenizer: [0] * (99 if "मौसम" in turns[0]["content"] else 9)
    )
    monkeypatch.setattr(export.sample_diffusion, "ask", lambda loaded, turns, cfg: asked.append((turns, cfg)) or "हाँ।")
    export.save(loaded, config.ExportConfig(output_dir=str(tmp_path / "x"), command="python mine.py"))
    text = (tmp_path / "x" / "README.md").read_text("utf-8")
    assert [t[0]["content"] for t, _ in asked] == [p for p in config.PROMPTS if "मौसम" not in p]  # what fits
    assert f"- {config.PROMPTS[0]} → हाँ।" in text and "tuned to answer" in text and "python mine.py" in text
    command = export.command(loaded.config, "transformer")
    assert command.startswith("python train_instruct.py ") and "--max_steps 77" in command and "d_model" not in command


def test_the_command_on_the_card_is_the_one_that_trained(runs):
    """Parsed again, it gives every flag that the run had."""
    for kind, run in runs.items():
        loaded = checkpoint.load(run)
        _, script, *argv = export.shlex.split(export.command(loaded.config, kind))
        assert script == f"{export.SCRIPTS[kind]}.py"
        parsed = config.parse("", config.MaskConfig, checkpoint.MODELS[kind][0], config.TrainConfig, argv=argv)
        flags = {f.name: getattr(c, f.name) for c in parsed for f in dataclasses.fields(c) if f.metadata["flag"]}
        assert {k: loaded.config[k] for k in flags} == flags


# ---------------------------------------------------------------------------------------------------------------------
# what is damaged, foreign or missing


def test_a_damaged_or_missing_file_is_one_line(copy, command):
    whole = contents(copy)
    for name in checkpoint.EXPORTED:
        (copy / name).unlink()
        result = command("sample_diffusion", "--ckpt", copy)
        assert result.code == 1 and f"{name} is missing" in result.error(), result.err
        at = len(whole[name]) // 2
        spoiled = bytes([whole[name][at] ^ 4]) if name != "config.json" else b"\0"
        (copy / name).write_bytes(whole[name][:at] + spoiled + whole[name][at + 1 :])
        result = command("sample_diffusion", "--ckpt", copy)
        assert result.code == 1 and f"{name} is damaged" in result.error(), result.err
        (copy / name).write_bytes(whole[name])
    about = json.loads(whole["config.json"])
    (copy / "config.json").write_text(json.dumps(about | {"format": 2}))
    assert "another version" in command("sample_diffusion", "--ckpt", copy).error()


def test_nothing_else_is_overwritten(trained, tmp_path, command):
    before = contents(trained)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for taken in (trained, tmp_path / "notes", tmp_path / "file"):
        result = command("export", "--ckpt", trained, "--output_dir", taken)
        assert result.code == 2 and str(taken) in result.error()
    assert contents(trained) == before and [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    result = command("export", "--ckpt", trained)
    assert result.code == 2 and "--output_dir" in result.error()


def test_a_killed_export_is_no_model(trained, tmp_path, monkeypatch):
    """Whatever file a write fails at, no config.json stands in a new folder, and no temporary file."""
    for n in range(4):
        calls, replace, out = [], os.replace, tmp_path / str(n)

        def failing(a, b, calls=calls, replace=replace, n=n):
            calls.append(b)
            if len(calls) > n:
                raise OSError(28, "No space left on device")
            replace(a, b)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="No space"):
            export.save(checkpoint.load(trained), config.ExportConfig(output_dir=str(out), code=False))
        monkeypatch.undo()
        assert not (out / "config.json").exists() and not list(out.glob("*.tmp")) and len(list(out.iterdir())) == n


def test_other_kinds_are_refused(data, tmp_path, command):
    train(data, tmp_path / "v", "--positions", "none", "--max_steps", 1, kind="variant")
    result = command("export", "--ckpt", tmp_path / "v", "--output_dir", tmp_path / "x")
    assert result.code == 2 and "is variant" in result.error() and not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what commands take by default


def test_without_a_run_the_model_in_the_box(exported, trained, command, tmp_path, monkeypatch):
    """models/ of the source folder, wherever one stands; a run of one's own wins, in a talk one that was tuned."""
    box = tmp_path / "source" / "models"
    monkeypatch.setattr(checkpoint, "IN_THE_BOX", box)
    monkeypatch.chdir(tmp_path)
    result = command("sample_diffusion")
    assert result.code == 2 and "make quickstart" in result.error()
    shutil.copytree(exported["transformer"], box / "diffusion")
    asked = ["--max_new_tokens", 2, "--steps", 1, "--prompt", "राम"]

    def taken(*argv):
        result = command("sample_diffusion", *asked, *argv)
        assert result.code == 0 and result.err.count("\n") == 1, result.err
        return re.match(r"note: no --ckpt is named, taking (\S+) \(", result.err)[1]

    assert taken() == taken("--chat") == str(box / "diffusion")
    shutil.copytree(exported["transformer"], box / "chat")
    assert (taken(), taken("--chat")) == (str(box / "diffusion"), str(box / "chat"))
    shutil.copytree(trained, tmp_path / "checkpoints" / "mine")
    assert (taken(), taken("--chat")) == ("checkpoints/mine", str(box / "chat"))
    shutil.copytree(trained, tmp_path / "checkpoints" / "tuned")
    about = json.loads((trained / "config.json").read_text("utf-8"))
    assert about["chats"] is False
    (tmp_path / "checkpoints" / "tuned" / "config.json").write_text(json.dumps(about | {"chats": True}))
    for path in (tmp_path / "checkpoints" / "tuned").iterdir():
        os.utime(path, (0, 0))
    assert (taken(), taken("--chat")) == ("checkpoints/mine", "checkpoints/tuned")
    assert taken("--ckpt", "") == "checkpoints/mine"


# ---------------------------------------------------------------------------------------------------------------------
# transformers, in a process that has nothing of the project

TEXT = "राम बाज़ार में गया था।"
OUTSIDE = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
text, *folders = sys.argv[1:]
answers = {}
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    kind, denoiser = model.config.kind, model.model
    batch = tokenizer([text, text[:5]], padding=True, return_tensors="pt")
    x = batch["input_ids"].clone()
    x[0, 2] = denoiser.mask_id
    logits = lambda model: model(x, attention_mask=batch["attention_mask"]).logits.detach()
    again = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True) if kind == "transformer" else model
    out = kind + "_again"
    model.save_pretrained(out), tokenizer.save_pretrained(out)
    back = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    strings = [tokenizer.decode(tokenizer(t)["input_ids"]) for t in (text, "a  b\\n▁ क़\\u200d।", "<s>क<mask>")]
    settings = {} if kind == "autoregressive" else dict(steps=3)
    written = model.write(tokenizer, text[:3], max_new_tokens=6, seed=3, **settings)
    nats = model.bound(batch["input_ids"][:1], torch.Generator().manual_seed(0)).item()
    answers[kind] = dict(
        ids=batch["input_ids"], mask=batch["attention_mask"], strings=strings, written=written, nats=nats,
        hole=tokenizer("<mask>")["input_ids"], logits=[logits(m) for m in (model, again, back)])
assert not {"model", "sampling", "diffusion", "checkpoint"} & set(sys.modules), sys.path
torch.save(answers, "answers.pt")
"""


@pytest.fixture(scope="module")
def answers(exported, tmp_path_factory):
    """kind -> what a process without the project makes of the folder."""
    folder = tmp_path_factory.mktemp("outside")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= dict(HF_MODULES_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1")
    argv = [sys.executable, "-W", "ignore", "-c", OUTSIDE, TEXT, *map(str, exported.values())]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "answers.pt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_open_it_outside_of_the_project(exported, answers, kind):
    answer, ours = answers[kind], checkpoint.load(exported[kind])
    want = [ours.tokenizer.encode(t) for t in (TEXT, TEXT[:5])]
    lengths, inside = torch.tensor([len(w) for w in want]), answer["mask"].bool()
    assert [row[: len(w)].tolist() for row, w in zip(answer["ids"], want, strict=True)] == want
    assert answer["mask"].sum(1).tolist() == lengths.tolist() and answer["hole"] == [ours.denoiser.mask_id]
    x = answer["ids"].clone()
    x[0, 2] = ours.denoiser.mask_id
    with torch.no_grad():
        logits = ours.denoiser(x, lengths=lengths)
    for theirs in answer["logits"]:  # of AutoModel; AutoModelForMaskedLM; written by transformers and read again
        torch.testing.assert_close(theirs[inside], logits[inside], rtol=1e-5, atol=1e-5)
    assert answer["strings"] == [tokenizers.normalize(t) for t in (TEXT, "a  b\n▁ क़\u200d।", "<s>क<mask>")]
    cfg = config.SampleConfig(max_new_tokens=6, seed=3, steps=3)
    (ids,) = sample_diffusion.generate(ours, [TEXT[:3]], cfg).texts
    assert answer["written"] == ours.tokenizer.decode(ids)
    with torch.no_grad():
        row, g = torch.tensor(want[:1]), torch.Generator().manual_seed(0)
        nats = ours.denoiser.nll(row) if kind == "autoregressive" else diffusion.bound(ours.denoiser, row, g)
    assert answer["nats"] == pytest.approx(nats.item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_gives_the_same_logits(kind, tmp_path):
    """onnxruntime against PyTorch, on random ids of other batches and lengths than the exporter saw."""
    onnxruntime = pytest.importorskip("onnxruntime")
    sizes = (
        dict(n_layers=2, memory_slots=4, attn_every=2) if kind == "eco_hybrid" else dict(n_layers=1)
    )  # of each layer one
    denoiser = build(kind, **sizes).eval()
    export.save_onnx(denoiser, tmp_path / "a" / "x.onnx")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "a" / "x.onnx")
    for lengths in ([16], [1], [7, 13, 1, 12, 13]):
        x = torch.randint(12, (len(lengths), max(lengths)), generator=seeded())
        (logits,) = session.run(None, dict(x_t=x.numpy(), lengths=torch.tensor(lengths).numpy()))
        with torch.no_grad():
            want = denoiser(x, lengths=torch.tensor(lengths))
        for row, (n, a, b) in enumerate(zip(lengths, torch.from_numpy(logits), want, strict=True)):
            torch.testing.assert_close(a[:n], b[:n], rtol=1e-4, atol=1e-4)
            with torch.no_grad():  # alone, without padding
                torch.testing.assert_close(a[:n], denoiser(x[row : row + 1, :n])[0], rtol=1e-4, atol=1e-4)


def test_onnx_by_the_command(exported, command, tmp_path):
    onnx = pytest.importorskip("onnx")
    result = command("export", "--ckpt", exported["transformer"], "--onnx", tmp_path / "x.onnx")
    assert result.code == 0 and f"opset {export.OPSET}" in result.out, result.err
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model)
    assert [i.version for i in model.opset_import if not i.domain] == [export.OPSET]
    assert [i.name for i in model.graph.input] == ["x_t", "lengths"]


def test_onnx_refuses_what_it_cannot_say(trained, command, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--window"):
        export.save_onnx(build("transformer", window=4), tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = command("export", "--ckpt", trained, "--onnx", tmp_path / "x.onnx")
    assert result.code == 2 and "pip install onnx" in result.error() and not list(tmp_path.iterdir())

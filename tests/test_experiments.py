"""run_experiments.py and crossover.py: plans by hand, what is refused, runs as processes, stopped, failed, resumed."""

import csv
import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, flags, metrics

import checkpoint
import config
import crossover
import dataset
import evaluate
import run_experiments as experiments

SIZES = "--d_model 32 --n_layers 2 --n_heads 2 --d_ff 64 --seq_len 32 --batch_size 4 --grad_accum 2".split()
FAST = [*SIZES, *"--eval_windows 8 --eval_masks 2 --log_interval 1 --amp off --device cpu".split()]
BUSY = 400  # seconds to wait for processes on a machine that does other things too
EIGHT = [f"{a}_{t}_{m}" for a in ("baseline", "eco") for t in ("discrete", "continuous") for m in ("token", "span")]

# ---------------------------------------------------------------------------------------------------------------------
# processes without their start-up: forked from one that has imported everything


class Forked:
    """In the place of subprocess.Popen: `python SCRIPT.py ...` in a fork."""

    def __init__(self, argv, env=(), stdout=None, preexec_fn=None, **_):
        sys.stdout.flush()
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if preexec_fn:
                    preexec_fn()
                if stdout:
                    [os.dup2(stdout.fileno(), fd) for fd in (1, 2)]
                os.environ.update(env)
                sys.argv = argv[1:]
                config.run_main(importlib.import_module(Path(argv[1]).stem).main)
            except SystemExit as e:
                sys.stdout.flush()
                os._exit(e.code or 0)

    def poll(self):
        if self.returncode is None and (state := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(state[1])
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)


class AtHome:
    """In the place of ProcessPoolExecutor: measures in this process."""

    def __init__(self, *_, **__):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def call(argv, env):
    """In the place of subprocess.call: the crossover's report; compare.py has tests of its own."""
    if "crossover.py" not in argv[1]:
        return 0
    child = Forked(argv)
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def forked():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    experiments.subprocess = types.SimpleNamespace(Popen=Forked, call=call, DEVNULL=None)
    experiments.ProcessPoolExecutor = AtHome
    experiments.probe = lambda *_: dict(step=0.01, bytes=2**20)  # a training before the forks would leave threads


@pytest.fixture
def plan(command, monkeypatch, data, tmp_path):
    """plan("--flag", ...) → (Result, experiment_plan.json's runs), started on the tiny data, in tmp_path / "root"."""
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", AtHome)

    def plan(*argv, sizes=SIZES, where=("--data_dir", data)):
        root = tmp_path / "root"
        result = command("run_experiments", *where, "--output_root", root, *sizes, *argv)
        written = root / "experiment_plan.json"
        return result, json.loads(written.read_text("utf-8"))["runs"] if written.exists() else None

    return plan


def timed(monkeypatch, **step):
    """Let probes find these seconds a step, by kind; returns the kinds probed."""
    calls = []

    def probe(kind, *_):
        calls.append(kind)
        return dict(step=step.get(kind, 2.9), bytes=3 * 2**20)

    monkeypatch.setattr(experiments, "probe", probe)
    return calls


def told(monkeypatch, data):
    """Let prepare.py copy `data`; returns the PrepareConfigs that it was given."""
    calls = []
    copy = lambda cfg: calls.append(cfg) or shutil.copytree(data, cfg.output_dir)  # noqa: E731
    monkeypatch.setattr(experiments.prepare, "prepare", copy)
    return calls


def rows_of(root):
    with open(root / "results.csv", encoding="utf-8", newline="") as f:
        return {Path(row["output_dir"]).name: row for row in csv.DictReader(f)}


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def test_the_plan_of_the_matrix(plan, tmp_path):
    result, runs = plan("--max_steps", 30, "--memory_slots", 8)
    assert result.code == 0 and not result.err and "nothing was started" in result.out
    assert [r["name"] for r in runs] == EIGHT and all(re.search(rf"^{r['name']} ", result.out, re.M) for r in runs)
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["experiment_plan.json"]
    for r in runs:
        arch, time, mask = r["name"].split("_")
        assert r["script"] == dict(baseline="train_diffusion.py", eco="train_eco_hybrid.py")[arch]
        assert (r["flags"]["time_mode"], r["flags"]["masking_strategy"]) == (time, mask)
        assert ("memory_slots" in r["flags"]) == (arch == "eco") and r["flags"]["max_steps"] == "30"
        assert r["seed"] == 1337 and r["output_dir"] == str(tmp_path / "root" / r["name"])
        assert r["status"] == "unfinished" and r["failure"] is None
        assert r["tokens"] == 30 * 4 * 2 * 32 and r["expected_seconds"] > 10 and 50 < r["expected_mib"] < 5000

    # by hand: V = 360, C = 32, T = 32, two layers of SwiGLU 64
    layer = 4 * 32 * 32 + 3 * 32 * 64
    small = 3 * 32 + 2 * 32 + 2 * 16  # a layer's bias and its four norms
    assert runs[0]["parameters"] == 361 * 32 + 2 * (layer + small) + 32 + 2  # and the second layer's two shares
    forward = 2 * (2 * (32 * layer + 2 * 32 * 32 * 32)) + 2 * 16.5 * 32 * 360
    assert runs[0]["operations"] == 30 * 8 * 3 * forward and f"{30 * 8 * 3 * forward:.3g}" in result.out
    assert {r["parameters"] for r in runs[:4]} == {runs[0]["parameters"]}
    assert abs(runs[4]["parameters"] / runs[0]["parameters"] - 1) < 0.01
    assert runs[4]["operations"] != runs[0]["operations"]


def test_seeds_shards_and_commands(plan, command, data, tmp_path):
    argv = ["--max_steps", 3, "--seeds", 3, "--seed", 5, "--no_compile", "--lr=0.002"]
    _, runs = plan(*argv)
    names = [Path(r["output_dir"]).name for r in runs]
    assert names == EIGHT + [f"{name}_seed{seed}" for seed in (6, 7) for name in EIGHT]
    assert [r["seed"] for r in runs] == [5] * 8 + [6] * 8 + [7] * 8
    lines = []
    for i in range(3):
        result, _ = plan(*argv, "--shard", f"{i}/3", "--print_commands")
        assert result.code == 0 and len(result.out.splitlines()) == len(runs[i::3])
        lines.append(result.out.splitlines())
    lines = [lines[k % 3][k // 3] for k in range(24)]  # run k belongs to shard k mod 3
    for line, r in zip(lines, runs, strict=True):
        train, score = (shlex.split(part) for part in line.split(" && ") if "echo" not in part)
        assert train[0] == "GOMP_SPINCOUNT=30000" and train[1].startswith("OMP_NUM_THREADS=")
        assert train[2:4] == [sys.executable, str(ROOT / r["script"])]
        assert score[3:6] == [str(ROOT / "evaluate.py"), "--ckpt", r["output_dir"]]
        assert train[train.index("--output_dir") + 1] == r["output_dir"] and train[train.index("--lr") + 1] == "0.002"
        assert int(train[train.index("--seed") + 1]) == r["seed"] and "--no_compile" in train
        assert f"$(ls {r['output_dir']}/*.pt > /dev/null 2>&1 && echo --resume)" in line


def test_only_some_runs(plan):
    """The same runs as in the whole suite; what matches nothing is refused."""
    _, all_runs = plan()
    result, runs = plan("--only", "baseline_*_token,eco_discrete_span")
    names = ["baseline_discrete_token", "baseline_continuous_token", "eco_discrete_span"]
    assert result.code == 0 and [r["name"] for r in runs] == names
    assert runs == [r for r in all_runs if r["name"] in names]
    result, _ = plan("--only", "baseline_*,eco")
    assert result.code == 2 and "--only: suite seed has no run 'eco'" in result.error()


def test_lines_for_slurm_and_torchrun(plan, tmp_path):
    """A Slurm line wraps the shell line whole; the processes of torchrun share the parts of a step."""
    lines = {}
    for launcher in ("shell", "slurm", "torchrun"):
        more = ("--launcher", launcher, "--print_commands", "--grad_accum", 6, "--processes", 3)
        result, runs = plan(*more)
        assert result.code == 0, result.err
        lines[launcher] = result.out.splitlines()
    for shell, slurm, torchrun, run in zip(*lines.values(), runs, strict=True):
        words = shlex.split(slurm)
        assert words[0] == "sbatch" and words[words.index("--wrap") + 1 :] == [shell]
        assert words[words.index("--job-name") + 1] == run["name"]
        words = shlex.split(torchrun)
        module, script = words.index("torch.distributed.run"), words.index(str(ROOT / run["script"]))
        assert module < script and words[words.index("--nproc_per_node") + 1] == "3"
        assert words[script : words.index("$(ls")][-2:] == ["--grad_accum", "2"]  # the last one counts
    result, _ = plan("--launcher", "torchrun", "--print_commands", "--grad_accum", 4, "--processes", 3)
    assert result.code == 2 and "--grad_accum 4 cannot be shared by --processes 3" in result.error()


def test_every_suite_is_made_of_flags_that_exist(plan, monkeypatch, data, tmp_path):
    """Its runs have names of their own, differ in what they say, and are matched; the names are config.py's."""
    choices = next(f for f in dataclasses.fields(config.ExperimentsConfig) if f.name == "suite").metadata["choices"]
    assert set(experiments.suites([])) == set(choices)
    timed(monkeypatch)
    prepared = told(monkeypatch, data)
    for suite in choices:
        where = ("--input", "a.txt") if suite == "tokenizer" else ("--data_dir", data)
        result, runs = plan("--suite", suite, where=where, sizes=("--preset", "tiny"))
        assert result.code == 0, result.err
        commands = {json.dumps({k: v for k, v in r["flags"].items() if k != "output_dir"}) + r["kind"] for r in runs}
        assert len({r["output_dir"] for r in runs}) == len(commands) == len(runs) > 4, suite
    assert [(c.tokenizer, c.vocab_size, c.input) for c in prepared] == [
        (t, v, "a.txt") for t in ("bpe", "unigram") for v in (4096, 8192, 16384)
    ]
    assert [Path(c.output_dir).name for c in prepared][:2] == ["data_bpe_4096", "data_bpe_8192"]


def test_a_length_in_epochs_becomes_steps(plan, data):
    tokens = dataset.load(data).meta["splits"]["train"]["tokens"]
    result, runs = plan("--suite", "crossover", "--epochs", "0.5,2,7", "--seeds", 2)
    assert result.code == 0 and len(runs) == 12
    for r, epochs in zip(runs, [0.5, 2, 7] * 4, strict=True):
        assert r["max_steps"] == round(epochs * tokens / (4 * 2 * 32)) and r["varied"]["epochs"] == epochs
        validations = math.ceil(r["max_steps"] / r["flags"]["eval_interval"])
        assert 8 <= validations <= 24 and r["name"].startswith(dict(transformer="diffusion").get(r["kind"], r["kind"]))
        own = experiments.OWN[r["kind"]]
        assert (r["flags"]["dropout"], r["flags"]["weight_decay"]) == (own["dropout"], own["weight_decay"])
    assert {(r["parameters"], r["tokens"]) for r in runs if r["varied"]["epochs"] == 2} == {
        (runs[0]["parameters"], runs[1]["max_steps"] * 256)
    }


def test_the_novel_is_prepared_where_no_data_is_named(plan, monkeypatch, data, tmp_path):
    timed(monkeypatch)
    prepared = told(monkeypatch, data)
    _, runs = plan("--suite", "crossover", where=(), sizes=())
    assert [(c.input, c.vocab_size, c.romanized) for c in prepared] == [("", 1024, 0.0)]
    assert {(r["flags"]["preset"], r["flags"]["data_dir"]) for r in runs} == {("tiny", str(tmp_path / "root" / "data"))}
    tokens = dataset.load(data).meta["splits"]["train"]["tokens"]
    assert [r["max_steps"] for r in runs[:4]] == [round(e * tokens / (16 * 128)) for e in (4, 8, 16, 32)]
    plan("--suite", "crossover", where=(), sizes=())
    assert len(prepared) == 1  # it is there


def test_the_expected_time_by_hand(plan, monkeypatch, data):
    """A forward is a third of a step of 2 × 4 windows; two processes."""
    probed = timed(monkeypatch)
    result, runs = plan("--suite", "crossover", "--epochs", 1, "--eval_masks", 3, "--eval_windows", 7)
    windows = math.ceil(len(dataset.load(data).val) / 32)
    for r, masks in zip(runs, (3, 0), strict=True):
        times = math.ceil(r["max_steps"] / r["flags"]["eval_interval"])
        forwards = times * 7 * masks + 16 * windows if masks else times * 7 + windows
        forwards += 2 * 32 * min(32, windows) if masks else 0  # the chain rule, a forward a token, in two orders
        seconds = r["max_steps"] * 2.9 + forwards * 2.9 / 8 / 3 + experiments.PROCESSES
        assert r["expected_seconds"] == pytest.approx(seconds) and r["expected_mib"] == 3
    plan("--suite", "crossover", "--epochs", 2)
    assert probed == ["transformer", "autoregressive"]  # each once: sizes that were measured are not measured again
    total = sum(r["expected_seconds"] for r in runs) / 60
    assert f"about {total:,.0f} minutes, 1 at a time" in result.out


REFUSED = {
    "--suite best": "invalid choice: 'best' (choose from 'seed', 'schedule'",
    "--bogus 1": "unrecognized arguments: --bogus",
    "--max_step 9": "--max_step",
    "extra": "unrecognized arguments: extra",
    "--lr 1 2": "unrecognized arguments: 2",
    "--lr": "--lr",
    "--d_model 33": "--d_model 33",
    "--seeds 0": "--seeds is 0",
    "--jobs 0": "--jobs is 0",
    "--shard 2/2": "--shard is '2/2'",
    "--shard 1": "--shard is '1'",
    "--epochs 5": "--epochs is for",
    "--suite crossover --epochs 5,x": "--epochs is '5,x'",
    "--suite crossover --epochs 5,0": "--epochs is '5,0'",
    "--suite crossover --max_steps 5": "--max_steps is what suite crossover sets",
    "--suite crossover --dropout 0.5": "--dropout is what suite crossover sets",
    "--time_mode discrete": "--time_mode is what suite seed sets",
    "--resume": "--resume is for a single run",
    "--output_dir x": "--output_dir is for a single run",
    "--plan": "--plan is for a single run",
    "--suite tokenizer": "--data_dir is prepared already",
    "--input a.txt": "--data_dir is prepared already",
    "--execute --print_commands": "exclude each other",
    "--data_dir nowhere": "nowhere",
    "--seq_len 99999": None,
}


@pytest.mark.parametrize("argv", [k for k, v in REFUSED.items() if v])
def test_a_wrong_command_is_refused(plan, tmp_path, argv):
    result, runs = plan(*argv.split(), *([] if "--execute" in argv or "--print" in argv else ["--execute"]))
    assert result.code == 2 and REFUSED[argv] in result.error() and not result.out and runs is None
    assert not (tmp_path / "root").exists()


# ---------------------------------------------------------------------------------------------------------------------
# matched


def test_parameters_that_differ_are_refused(plan):
    """A d_ff of 28 leaves EcoHybrid too little room: its parameters are 2.5 % more."""
    result, runs = plan(sizes=[*SIZES, "--d_ff", 28, "--execute"])
    assert result.code == 2 and runs is None
    models = {kind: checkpoint.MODELS[kind] for kind in ("transformer", "eco_hybrid")}
    small = dict(vocab_size=360, max_seq_len=32, d_model=32, n_layers=2, n_heads=2, d_ff=28)
    ours, theirs = (sum(p.numel() for p in m(c(**small)).parameters()) for c, m in models.values())
    text = f"eco_discrete_span has {theirs:,} parameters, baseline_discrete_span {ours:,} ({theirs / ours - 1:+.1%})"
    assert "not matched by params" in result.error() and text in result.err and 1.01 < theirs / ours < 1.03


def test_equal_operations_and_equal_time(plan, monkeypatch):
    """The steps by hand; the plan says what is matched; what rounds to more than 1 % away is refused."""
    _, runs = plan("--max_steps", 200)
    a_step = {r["kind"]: r["operations_a_step"] for r in runs}
    result, runs = plan("--max_steps", 200, "--match", "flops")
    eco = round(200 * a_step["transformer"] / a_step["eco_hybrid"])
    assert result.code == 0 and [r["max_steps"] for r in runs] == [200] * 4 + [eco] * 4 and eco != 200
    assert runs[4]["operations"] == pytest.approx(runs[0]["operations"], rel=0.01)
    result, _ = plan("--max_steps", 7, "--match", "flops")
    assert result.code == 2 and "not matched by flops" in result.error() and "operations" in result.err

    # time: an eco step takes 1.9 s, the Transformer's 2.9
    timed(monkeypatch, eco_hybrid=1.9)
    shutil.rmtree(Path(runs[0]["output_dir"]).parent)
    result, runs = plan("--max_steps", 200, "--match", "time")
    assert result.code == 0 and [r["max_steps"] for r in runs] == [200] * 4 + [round(200 * 2.9 / 1.9)] * 4


def test_other_differences_are_refused(plan, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(experiments.DEFAULTS, "eco_hybrid", dict(weight_decay=0.3, decay=0.2))
        result, runs = plan()
        assert result.code == 2 and runs is None
        assert "eco_continuous_token has weight_decay 0.3, baseline_continuous_token 0.1" in result.error()
        assert "decay 0.2, baseline_continuous_span 0.5" in result.err and "; and 4 more" in result.err
        assert plan("--weight_decay", 0.1, "--decay", 0.5)[0].code == 0

    def careless(model, *args):  # decays every parameter of one of the two
        optimizers = real(model, *args)
        if type(model).__name__ == "EcoHybrid":
            for group in optimizers[-1].param_groups:
                group["weight_decay"] = args[2]
        return optimizers

    real = experiments.make_optimizers
    monkeypatch.setattr(experiments, "make_optimizers", careless)
    result, _ = plan()
    assert result.code == 2 and "optimizer_groups" in result.error()


def test_whom_a_run_is_compared_with(data, tmp_path):
    def references(suite, **more):
        cfg = config.ExperimentsConfig(str(data), output_root=str(tmp_path), suite=suite, **more)
        runs = experiments.make_runs(cfg, dict(zip(*[iter(x.removeprefix("--") for x in SIZES)] * 2, strict=True)))
        return {r.out.name: experiments.reference(r, runs).out.name for r in runs}

    found = references("seed", seeds=2)
    assert found["eco_discrete_span"] == "baseline_discrete_span"
    assert found["eco_continuous_token_seed1338"] == "baseline_continuous_token_seed1338"
    found = references("crossover", epochs="1,3", seeds=2)
    assert found["autoregressive_3epochs_seed1338"] == "diffusion_3epochs_seed1338"
    assert found["autoregressive_1epochs"] == "diffusion_1epochs" == found["diffusion_1epochs"]
    assert set(references("eco").values()) == {"transformer"} and set(references("architecture").values()) == {"full"}


# ---------------------------------------------------------------------------------------------------------------------
# running


def argv_of(data, root, *more):
    return ["run_experiments", "--data_dir", data, "--output_root", root, *FAST, "--execute", *more]


def test_the_crossover_end_to_end(start, data, tmp_path):
    """Two kinds and seeds, two jobs: results.csv and crossover.json from the files; again: nothing starts."""
    root = tmp_path / "root"
    argv = argv_of(data, root, "--suite", "crossover", "--epochs", 0.3, "--seeds", 2, "--jobs", 2, "--lr", 0.01)
    done = start(*argv, before=forked).wait(BUSY)
    assert done.code == 0 and not done.err, done.err
    assert done.out.count("start ") == done.out.count("done ") == 4
    rows, scores = rows_of(root), {}
    assert len(rows) == 4 and {row["status"] for row in rows.values()} == {"done"}
    for name, row in rows.items():
        out = root / name
        s = json.loads((out / "eval.json").read_text())
        scores[row["kind"], row["name"].split("_")[1], int(row["seed"])] = s
        facts, logged = json.loads((out / "config.json").read_text()), [r for r in metrics(out) if "loss" in r]
        assert facts["parameters"] == int(row["parameters"]) and facts["seed"] == int(row["seed"])
        assert float(row["operations"]) == facts["operations_a_step"] * facts["max_steps"]
        assert int(row["tokens"]) == logged[-1]["tokens"] and facts["max_steps"] == logged[-1]["step"]
        assert float(row["bits_per_byte"]) == s["bits_per_byte"]["mean"]
        assert float(row["standard_error"]) == s["bits_per_byte"]["standard_error"]
        assert row["likelihood"] == dict(transformer="bound", autoregressive="exact")[row["kind"]]
        valid = {r["step"]: r["bits_per_byte"] for r in metrics(out) if "bits_per_byte" in r}
        assert len(valid) >= 8 and int(row["best_step"]) == min(valid, key=valid.get) == s["step"]
        rates = [r["seconds"]["tokens_a_second"] for r in logged]
        assert float(row["tokens_a_second"]) == statistics.median(rates)
        assert float(row["peak_mib"]) == max(r["seconds"]["peak_bytes"] for r in logged) / 2**20
        assert float(row["seconds"]) == logged[-1]["seconds"]["training"]

    found = json.loads((root / "crossover.json").read_text())
    assert (root / "crossover.png").stat().st_size > 5000 and found["verdict"] in done.out
    for kind, points in found["budgets"].items():
        for p in points:
            bits = [scores[kind, f"{p['epochs']:g}epochs", seed]["bits_per_byte"]["mean"] for seed in (1337, 1338)]
            assert p["bits_per_byte"] == pytest.approx(sum(bits) / 2) and p["seeds"] == [1337, 1338]
            assert p["standard_error"] == pytest.approx(abs(bits[0] - bits[1]) / 2)
            assert f"{sum(bits) / 2:.4f} ± {abs(bits[0] - bits[1]) / 2:.4f}" in done.out
    assert [line["epochs"] for line in found["best_so_far"]] == [0.3]

    before = {p: p.stat().st_mtime_ns for p in root.glob("*/*")}
    again = start(*argv, before=forked).wait(BUSY)
    assert again.code == 0 and "0 runs to do" in again.out and "start" not in again.out
    assert {p: p.stat().st_mtime_ns for p in root.glob("*/*")} == before and rows_of(root) == rows


def test_stopped_and_started_again(start, data, tmp_path):
    """SIGTERM in the second run: its trainer saves; the same command leaves the first alone and resumes the second."""
    root = tmp_path / "root"
    argv = argv_of(data, root, "--suite", "crossover", "--epochs", 1, "--save_interval", 2)
    first = start(*argv, before=forked)
    first.wait_for(root / "diffusion_1epochs" / "eval.json", BUSY)
    first.wait_for(root / "autoregressive_1epochs" / "latest.pt", BUSY)
    first.send(signal.SIGTERM)
    stopped = first.wait(BUSY)
    assert stopped.code == 143 and "the same command goes on" in stopped.out and not (root / "results.csv").exists()
    done, half = root / "diffusion_1epochs", root / "autoregressive_1epochs"
    step = checkpoint.read(half / "latest.pt")["step"]
    steps = json.loads((half / "config.json").read_text())["max_steps"]
    assert 2 <= step < steps and not (half / "eval.json").exists()
    assert not list(root.glob("*.failed.json"))
    before = {p: p.stat().st_mtime_ns for p in done.iterdir()}

    again = start(*argv, before=forked).wait(BUSY)
    assert again.code == 0 and "resume autoregressive_1epochs" in again.out and "1 runs to do" in again.out
    assert {p: p.stat().st_mtime_ns for p in done.iterdir()} == before
    assert f"resumed {half / 'latest.pt'} at step {step:,}" in (root / "autoregressive_1epochs.log").read_text()
    assert [r["step"] for r in metrics(half) if "loss" in r] == list(range(1, steps + 1))
    assert {row["status"] for row in rows_of(root).values()} == {"done"}


def test_a_run_that_fails_is_recorded_and_the_others_go_on(start, data, tmp_path):
    root = tmp_path / "root"
    (root / "baseline_discrete_token").mkdir(parents=True)
    broken = root / "baseline_discrete_token" / "latest.pt"
    broken.write_bytes(b"no checkpoint")
    argv = argv_of(data, root, "--max_steps", 2, "--shard", "0/2")
    mine = EIGHT[::2]
    result = start(*argv, before=forked).wait(BUSY)
    assert result.code == 1 and "baseline_discrete_token" in result.error() and result.out.count("FAILED") == 1
    rows = rows_of(root)
    assert [rows[name]["status"] for name in EIGHT] == ["failed"] + ["unfinished", "done"] * 3 + ["unfinished"]
    assert "no readable checkpoint" in rows[mine[0]]["error"] and not rows[mine[0]]["bits_per_byte"]
    plan = json.loads((root / "experiment_plan.json").read_text("utf-8"))["runs"]
    assert plan[0]["status"] == "failed" and plan[0]["failure"]["code"] == 1
    assert plan[0]["failure"]["lines"][-1] == rows[mine[0]]["error"] and len(plan[0]["failure"]["lines"]) <= 5

    broken.unlink()  # mended: that one alone is run
    result = start(*argv, before=forked).wait(BUSY)
    assert result.code == 0 and re.findall(r"start  (\w+)", result.out) == mine[:1]
    assert [rows_of(root)[name]["status"] for name in mine] == ["done"] * 4
    assert not list(root.glob("*.failed.json"))

    # another flag, another length: refused, recorded, and what is there stays
    before = {p: p.read_bytes() for p in root.glob("*/*.json")}
    result = start(*argv, "--lr", 0.002, before=forked).wait(BUSY)
    assert result.code == 1 and result.out.count("FAILED") == 4 and result.out.count("exit 2") == 4
    assert "lr was 0.004 and is 0.002" in rows_of(root)[mine[1]]["error"]
    result = start(*argv, "--max_steps", 3, before=forked).wait(BUSY)
    assert result.code == 1 and "holds a run of 2 steps, not 3" in rows_of(root)[mine[1]]["error"]
    assert {p: p.read_bytes() for p in root.glob("*/*.json")} == before


class Job:
    """What execute() asks of a Run; its two commands are lines of Python."""

    steps = 1

    def __init__(self, out, *lines):
        self.out, self.lines = out, lines

    def commands(self, resume):
        return [[sys.executable, "-S", "-c", f"import os, sys, time; {line}"] for line in self.lines]


def test_processes_of_any_kind(monkeypatch, tmp_path):
    """Threads and OpenMP's spin count reach them; both commands run, in order; last lines and codes are kept."""
    monkeypatch.setattr(experiments, "result", lambda run: dict(bits_per_byte=1.0))
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    show = "print(os.environ['OMP_NUM_THREADS'], os.environ['GOMP_SPINCOUNT'])"
    long = "print(*range(9), sep='\\n'); sys.exit(3)"
    jobs = [Job(tmp_path / "a", show, "print('second')"), Job(tmp_path / "b", long, "")]
    jobs.append(Job(tmp_path / "c", "", "sys.exit('no room')"))
    (tmp_path / "c.failed.json").write_text("{}")
    failed = experiments.execute(jobs, 2, 5)
    assert {run.out.name for run in failed} == {"b", "c"}
    assert (tmp_path / "a.log").read_text() == "5 30000\nsecond\n" and not (tmp_path / "a.failed.json").exists()
    record = lambda name: json.loads((tmp_path / f"{name}.failed.json").read_text())  # noqa: E731
    assert record("b") == dict(code=3, lines=["4", "5", "6", "7", "8"])
    assert record("c") == dict(code=1, lines=["no room"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_processes_and_starts_no_more(monkeypatch, tmp_path, capsys, number):
    """Both that run get it and are waited for; neither has failed; the third, and what was to follow, never start."""
    wait = "import signal; signal.signal({}, lambda *_: (time.sleep(0.3), print('saved'), sys.exit({}))); "
    wait += "print('ready', flush=True); time.sleep(30)"
    good, ended = wait.format(int(number), 0), wait.format(int(number), 143)
    jobs = [Job(tmp_path / "a", good, "print('next')"), Job(tmp_path / "b", ended), Job(tmp_path / "c", "")]
    real = experiments.time.sleep

    def sleep(seconds):
        if all((tmp_path / f"{name}.log").read_text() == "ready\n" for name in "ab") and not sent:
            sent.append(os.kill(os.getpid(), number))
        real(seconds)

    sent, old = [], signal.getsignal(number)
    monkeypatch.setattr(experiments.time, "sleep", sleep)
    with pytest.raises(SystemExit) as e:
        experiments.execute(jobs, 2, 1)
    assert e.value.code == 128 + number and signal.getsignal(number) == old
    assert [(tmp_path / f"{name}.log").read_text() for name in "ab"] == ["ready\nsaved\n"] * 2
    assert not (tmp_path / "c.log").exists() and not list(tmp_path.glob("*.failed.json"))


def test_measuring_in_a_process_of_its_own(data, tmp_path):
    """A step takes time, the model fits in what it held, threads are those asked for; what is known is not measured."""
    given = dict(zip([x.removeprefix("--") for x in SIZES[::2]], SIZES[1::2], strict=True))
    made = experiments.Run(
        "a", "transformer", {}, given | dict(amp="off", device="cpu", data_dir=data), dataset.load(data)
    )
    found = experiments.measure([made, made], 1, dict(other=1))
    assert list(found) == ["other", experiments.key(made)] and experiments.measure([made], 1, found) is found
    measured = found[experiments.key(made)]
    assert 0 < measured["step"] < 60
    assert 4 * made.parameters < measured["bytes"] < 4 * 2**30


def test_when_a_run_is_finished(command, trained, data, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    given = [x.removeprefix("--") for x in flags(data, out)]

    def made(**more):
        return experiments.Run("a", "transformer", {}, dict(zip(given[::2], given[1::2], strict=True)) | more,
                               dataset.load(data))  # fmt: skip

    assert len(TINY) % 2 == 0 and not experiments.finished(made())
    (out / "eval.json").write_text('{"qa": {}}')  # only asked questions
    assert not experiments.finished(made()) and experiments.result(made())["status"] == "unfinished"
    (out / "eval.json").unlink()
    assert command("evaluate", "--ckpt", out, "--masks", 1).code == 0
    assert experiments.finished(made()) and experiments.result(made())["status"] == "done"
    assert experiments.finished(made(eval_interval=3, output_dir=out))  # as --resume allows
    assert not experiments.finished(made(lr=0.02)) and not experiments.finished(made(max_steps=13))
    assert not experiments.finished(made(output_dir=tmp_path))
    kept = (out / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(kept[:-1]), "utf-8")  # evaluated by hand before its last validation
    assert not experiments.finished(made())
    (out / "metrics.jsonl").write_text("".join(kept), "utf-8")
    os.utime(out / "eval.json", (1, 1))  # it went on after it was evaluated
    assert not experiments.finished(made())


# ---------------------------------------------------------------------------------------------------------------------
# the crossover


def scored(kind, nats, step=10, sizes=(4, 2)):
    """An eval.json of windows with these nats."""
    bits = sum(nats) / sum(sizes) / math.log(2)
    exact = kind == "autoregressive"
    alike = dict(data_sha256="d", split="val", windows=len(sizes), masks=0 if exact else 16, seed=0, batch_size=32)
    per_window, bits = dict(nats=list(nats), bytes=list(sizes)), dict(mean=bits, standard_error=0.1)
    found = dict(checkpoint=f"{kind}/best.pt", likelihood="exact" if exact else "bound", step=step)
    return alike | found | dict(bits_per_byte=bits, per_window=per_window)


def world(table):
    """{(kind's first letter, epochs, seed): (nats of two windows, best step)} → runs, scores."""
    kinds = dict(t="transformer", a="autoregressive")
    scores = {(kinds[k], e, s): scored(kinds[k], nats, step) for (k, e, s), (nats, step) in table.items()}
    runs = {k: dict(max_steps=10 * k[1], operations=1000.0 * k[1], operations_a_step=100.0) for k in scores}
    return runs, scores


def test_best_so_far_by_hand():
    """At 2 epochs the twin's best is still that of 1 epoch. Windows of 4 and 2 bytes; ln 2 · 6 nats are 1 bit/byte."""
    unit = math.log(2)
    table = {("t", 1, 0): ((8 * unit, 4 * unit), 10), ("t", 1, 1): ((8 * unit, 4 * unit), 10),
             ("a", 1, 0): ((4 * unit, 2 * unit), 6), ("a", 1, 1): ((4 * unit, 5 * unit), 8),
             ("t", 2, 0): ((4 * unit, 1 * unit), 20), ("t", 2, 1): ((4 * unit, 1 * unit), 10),
             ("a", 2, 0): ((9 * unit, 9 * unit), 3), ("a", 2, 1): ((9 * unit, 9 * unit), 3)}  # fmt: skip
    runs, scores = world(table)
    points = crossover.budgets(runs, scores)
    twin = points["autoregressive"][0]
    assert twin["each"] == pytest.approx([1.0, 1.5]) and twin["bits_per_byte"] == pytest.approx(1.25)
    assert twin["standard_error"] == pytest.approx(0.25)
    assert twin["best_step"] == 7 and twin["operations_to_best"] == 700
    assert twin["operations"] == 1000 and points["transformer"][1]["operations_to_best"] == 1500
    first, second = crossover.best_so_far(points, scores)
    assert first["difference"] == pytest.approx((1.0 + 0.5) / 2) and first["over_seeds"] == pytest.approx(0.25)
    assert second["best_epochs"] == [2, 1] and second["each"] == pytest.approx([-1 / 6, -4 / 6])
    assert second["difference"] == pytest.approx(-2.5 / 6) and second["over_seeds"] == pytest.approx(0.25)
    # windows, the mean of the seeds: 0 and -2.5 bits of 4 and 2 bytes, so residuals 5/3 and -5/3
    assert second["over_windows"] == pytest.approx(math.sqrt(2 * (5 / 3) ** 2 * 2) / 6)
    said = crossover.verdict([first, second])
    assert "overtakes its twin at 2 epochs (1.5e+03 operations to its best, 700 to the twin's)" in said
    assert "-0.4167 bits/byte (± 0.2500 over 2 seeds, ± 0.5556 over windows), less than two standard errors" in said
    assert "behind" not in said and "behind again at 3" in crossover.verdict([first, second, first | dict(epochs=3)])
    assert "does not overtake its twin in 1 epochs; its best so far costs +0.7500" in crossover.verdict([first])
    assert "no budget" in crossover.verdict([])
    clear = second | dict(over_windows=0.01, over_seeds=0.01)
    assert "more than two standard errors" in crossover.verdict([clear])


def test_seeds_that_only_one_kind_has_are_left_out():
    unit = math.log(2)
    table = {("t", 1, s): ((4 * unit + s, 2 * unit), 1) for s in (0, 1, 2)}
    table |= {("a", 1, s): ((4 * unit, 2 * unit), 1) for s in (2, 3)}
    runs, scores = world(table)
    (line,) = crossover.best_so_far(crossover.budgets(runs, scores), scores)
    assert line["seeds"] == [2] and line["difference"] == pytest.approx(2 / 6 / unit) and line["over_seeds"] is None
    assert "one seed" in crossover.verdict([line])
    pair = scores["transformer", 1, 2], scores["autoregressive", 1, 2]
    assert line["difference"] == pytest.approx(evaluate.paired(*pair)[0])
    del scores["autoregressive", 1, 2], runs["autoregressive", 1, 2]
    assert crossover.best_so_far(crossover.budgets(runs, scores), scores) == []


def test_flags_as_argparse_leaves_them():
    flags = experiments.trainer_flags(["--a", "1", "--b", "--c=-2", "--lr", "-3", "--no_compile"])
    assert flags == dict(a="1", b=True, c="-2", lr="-3", no_compile=True)
    assert torch.tensor(experiments.VALIDATIONS) >= 8

"""train_diffusion.py: the loop, its faults, and that splitting, watching or logging a run changes nothing in it."""

import functools
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT, contents, difference, flags, metrics, train
from test_checkpoint import same_run

import checkpoint
import config
import dataset
import evaluate
import train_diffusion

# ---------------------------------------------------------------------------------------------------------------------
# R1–R4, R6, R7: numbers that are not finite, memory that is not there


def poison(kind, first, last=math.inf):
    """From optimizer step `first` to `last`: the loss is NaN or infinite, or the gradient is, with a finite loss."""
    original, now = checkpoint.MODELS["transformer"][1].loss, [-1]

    def batch(ids, seq_len, rows, rows_a_step, seed, step, batch=dataset.batch):
        now[0] = step
        return batch(ids, seq_len, rows, rows_a_step, seed, step)

    def loss(self, *args, **kwargs):
        value = original(self, *args, **kwargs)
        if not first <= now[0] <= last:
            return value
        if kind == "gradient":
            value.register_hook(lambda grad: grad * math.inf)
            return value
        return value * {"nan": math.nan, "inf": math.inf}[kind]

    dataset.batch = batch
    checkpoint.MODELS["transformer"][1].loss = loss


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(run, trained, data, tmp_path, kind):
    """R1, R2: step and windows are named; what stands on disk is the run up to there, and goes on from there."""
    result = run("train_diffusion", *flags(data, tmp_path / "run"), before=functools.partial(poison, kind, 6))
    assert result.code == 1 and "at step 6" in result.error() and "weights are unchanged" in result.error()
    if kind != "gradient":
        assert f"the loss is {kind}" in result.error() and "windows 48 on" in result.error()  # 8 a step
    names = {p.name for p in (tmp_path / "run").glob("*.pt")}
    assert names == {"latest.pt", "best.pt", "step_000004.pt"}
    assert all(checkpoint.read(tmp_path / "run" / name)["step"] == 4 for name in names)
    train(data, tmp_path / "run", "--resume")
    assert not same_run(trained, tmp_path / "run")


def test_poisoned_weights_are_refused(command, trained, data, tmp_path):
    """R1 by weights that are NaN already."""
    state = checkpoint.read(trained / "latest.pt")
    state["step"], state["model"]["embed.weight"][3] = 9, math.nan
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "latest.pt", state)
    before = contents(tmp_path / "run")
    result = command("train_diffusion", *flags(data, tmp_path / "run", "--resume"))
    assert result.code == 1 and "nan at step 9" in result.error()
    after = contents(tmp_path / "run")
    assert all(after[name] == before[name] for name in before)


def test_fp16_overflows_are_left_out_and_twenty_in_a_row_end_the_run(run, data, tmp_path):
    """R3: after three overflows the scale is an eighth, and the weights moved in the other steps only."""
    fp16 = ["--amp", "fp16", "--max_steps", 30, "--dropout", 0, "--eval_interval", 0]
    argv = flags(data, tmp_path / "three", *fp16)
    assert run("train_diffusion", *argv, before=functools.partial(poison, "gradient", 5, 7)).code == 0
    norms = [m["grad_norm"] for m in metrics(tmp_path / "three") if "loss" in m]
    assert [n for n, norm in enumerate(norms) if norm is None] == [5, 6, 7] and len(norms) == 30
    assert checkpoint.read(tmp_path / "three" / "latest.pt")["scaler"]["scale"] == 2**16 / 8

    argv = flags(data, tmp_path / "many", *fp16)
    result = run("train_diffusion", *argv, before=functools.partial(poison, "gradient", 5))
    assert result.code == 1 and "20 steps in a row, the last at step 24" in result.error()
    weights = [checkpoint.read(tmp_path / "many" / name)["model"] for name in ("step_000020.pt", "step_000024.pt")]
    assert not difference(*weights) and checkpoint.read(tmp_path / "many" / "latest.pt")["overflows"] == 19


def test_nineteen_overflows_are_remembered_over_a_stop(run, data, tmp_path):
    argv = flags(
        data, tmp_path / "run", "--amp", "fp16", "--max_steps", 40, "--eval_interval", 0, "--save_interval", 10
    )
    assert run("train_diffusion", *argv, before=functools.partial(stop_and_poison, 15, 2)).code == 143
    assert checkpoint.read(tmp_path / "run" / "latest.pt")["overflows"] == 14
    result = run("train_diffusion", *argv, "--resume", before=functools.partial(poison, "gradient", 0))
    assert result.code == 1 and "the last at step 21" in result.error()


def stop_and_poison(step, first):
    from test_checkpoint import signal_at

    poison("gradient", first)
    signal_at(step, signal.SIGTERM)


@pytest.mark.parametrize("rates", [(0, 1e-9), (0.999, 1)])
def test_almost_nothing_or_everything_hidden_is_finite(data, tmp_path, rates):
    """R4."""
    train(data, tmp_path / "run", "--max_steps", 2, "--min_mask_rate", rates[0], "--max_mask_rate", rates[1])
    assert all(math.isfinite(m["loss"]) for m in metrics(tmp_path / "run") if "loss" in m)


def little_memory(more):
    """Let this process have `more` bytes of address space on top of what it has at step 2."""
    batch = dataset.batch

    def limited(ids, seq_len, rows, rows_a_step, seed, step):
        if len(rows) and step == 2:
            has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))
            rows = range(1 << 15)  # stands for a batch that does not fit
        return batch(ids, seq_len, rows, rows_a_step, seed, step)

    dataset.batch = limited


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_out_of_memory_ends_the_run(run, data, tmp_path):
    """R6: in the middle of a run, and where not even the model fits."""
    argv = flags(data, tmp_path / "run", "--save_interval", 2, "--eval_interval", 0)
    result = run("train_diffusion", *argv, before=functools.partial(little_memory, 32 << 20))
    assert result.code == 1 and "memory" in result.error(), result.err
    assert checkpoint.read(tmp_path / "run" / "latest.pt")["step"] == 2
    argv = flags(data, tmp_path / "large", "--d_model", 1 << 24)
    result = run(
        "train_diffusion", *argv, before=functools.partial(resource.setrlimit, resource.RLIMIT_AS, (1 << 34,) * 2)
    )
    assert result.code == 1 and "memory" in result.error() and not list((tmp_path / "large").glob("*.pt"))


def test_a_validation_of_nan_is_never_the_best(data, tmp_path, monkeypatch, command):
    """R7: neither as the first, nor later; and --check has nothing to compare."""
    values, real = iter([math.nan, None, math.nan]), evaluate.evaluate

    def sometimes(*args, **kwargs):
        result, value = real(*args, **kwargs), next(values, math.nan)
        if value is not None:
            result["bits_per_byte"]["mean"] = value
        return result

    monkeypatch.setattr(evaluate, "evaluate", sometimes)
    train(data, tmp_path / "run")
    best = checkpoint.read(tmp_path / "run" / "best.pt")
    assert best["step"] == 8 and math.isfinite(best["best"])
    assert checkpoint.read(tmp_path / "run" / "latest.pt")["best"] == best["best"]
    assert [m["bits_per_byte"] is None for m in metrics(tmp_path / "run") if "bits_per_byte" in m] == [
        True,
        False,
        True,
    ]
    result = command("train_diffusion", *flags(data, tmp_path / "none", "--max_steps", 2, "--check"))
    assert result.code == 1 and "not finite" in result.error() and not (tmp_path / "none" / "best.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# R8: wrong commands


WRONG = """--max_step 5 | --bogus 1 | --preset | --preset huge | --device cuda:77 | --device gpu | --d_model 33
--lr 0 | --lr inf | --lr nan | --batch_size 0 | --seq_len 0 | --seq_len 9999999 | --grad_accum x | --dropout 1 | --ema 1
--time_mode disc | --masking_strategy words | --timesteps 0 | --min_mask_rate 0.5 --max_mask_rate 0.5 | --warmup 2
--max_mask_rate 1.1 | --data_dir /nowhere | --data_dir /dev/null
--mean_span_length 0 | --loss_weight none | --optimizer sgd | --amp fp8 | --grad_clip -1 | --n_heads 3 | --n_layers 0
--keep -1 | --seed -1 | --eval_masks 0 | --mean_span_length nan | --dropout nan | --plan 3 | extra
--weight_decay nan | --block_length -1 | --block_length 4 --window 4 | --block_length 4 --masking_strategy span
--init /nowhere"""


@pytest.mark.parametrize("wrong", [w.strip() for w in WRONG.replace("\n", "|").split("|")])
def test_a_wrong_command_is_refused_before_any_work(command, data, tmp_path, monkeypatch, wrong):
    """R8: no folder, no model; abbreviations too."""
    monkeypatch.setattr(checkpoint, "MODELS", {"transformer": (config.TransformerConfig, None)})
    result = command("train_diffusion", *flags(data, tmp_path / "run"), *wrong.split())
    assert result.code == 2 and result.error() and not result.out
    assert not (tmp_path / "run").exists()


def test_the_error_names_flag_and_numbers(command, data, tmp_path):
    for wrong, words in {"--seq_len 99999": ["99,999", "tokens", "--seq_len"], "--device cuda:77": ["--device cuda:77"],
                         "--max_step 5": ["--max_step"], "--dropout 1.5": ["--dropout is 1.5"]}.items():  # fmt: skip
        error = command("train_diffusion", *flags(data, tmp_path / "run"), *wrong.split()).error()
        assert all(word in error for word in words), error
    debug = command("train_diffusion", *flags(data, tmp_path / "run", "--dropout", 2, "--debug"))
    assert debug.code == 2 and "Traceback" in debug.err and "error: --dropout is 2.0" in debug.err


# ---------------------------------------------------------------------------------------------------------------------
# R5, watching: what must not change a run


def close(a, b, tolerance):
    a, b = (checkpoint.read(folder / "latest.pt")["model"] for folder in (a, b))
    return max(float((a[k] - b[k]).abs().max()) for k in a) < tolerance


PARTS = ["--max_steps", 4, "--dropout", 0, "--eval_interval", 0]


@pytest.mark.parametrize("more", [[], ["--masking_strategy", "span", "--loss_weight", "low_var"]])
def test_accumulation_splits_are_the_one_big_batch(data, tmp_path, more):
    """R5: the same losses, gradient norms and weights, up to the order of summation."""
    runs = {(batch, 8 // batch): tmp_path / str(batch) for batch in (8, 4, 1)}
    for (batch, accum), out in runs.items():
        train(data, out, *PARTS, *more, "--batch_size", batch, "--grad_accum", accum)
    one, *others = runs.values()
    for other in others:
        for name in ("loss", "grad_norm"):
            a, b = ([m[name] for m in metrics(out) if "loss" in m] for out in (one, other))
            assert a == pytest.approx(b, rel=2e-5), name
        assert close(one, other, 1e-4)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(data, tmp_path):
    """R5, by torchrun; and the checkpoint of two is resumed by one."""
    argv = [*PARTS, "--save_interval", 2, "--batch_size", 2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [ROOT / "train_diffusion.py", *flags(data, tmp_path / "two", *argv, "--grad_accum", 2)]
    done = subprocess.run([*torchrun, *script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads((tmp_path / "two" / "config.json").read_text())["world"] == 2, (
        done.stderr
    )
    train(data, tmp_path / "one", *argv, "--grad_accum", 4)
    a, b = ([m["loss"] for m in metrics(tmp_path / name) if "loss" in m] for name in ("one", "two"))
    assert a == pytest.approx(b, rel=2e-5) and len(a) == 4 and close(tmp_path / "one", tmp_path / "two", 1e-4)
    train(data, tmp_path / "two", *argv, "--grad_accum", 4, "--resume", "--max_steps", 5)
    assert checkpoint.read(tmp_path / "two" / "latest.pt")["step"] == 5


def test_watching_changes_nothing(trained, data, tmp_path):
    """Validation, samples, logs and saves, each at every step or never: the same weights, averages and moments."""
    much = [
        "--eval_interval",
        1,
        "--sample_interval",
        2,
        "--sample_steps",
        3,
        "--log_interval",
        5,
        "--save_interval",
        3,
    ]
    none = ["--eval_interval", 0, "--sample_interval", 0, "--log_interval", 100, "--save_interval", 100]
    for name, argv in (("much", much), ("none", none)):
        train(data, tmp_path / name, *argv)
        a, b = (checkpoint.read(folder / "latest.pt") for folder in (trained, tmp_path / name))
        assert not difference(a, b, ignore=("seconds", "config", "best"))
    samples = [m for m in metrics(tmp_path / "much") if "samples" in m]
    assert [m["step"] for m in samples] == [2, 4, 6, 8, 10, 12] and all(
        isinstance(s, str) for s in samples[0]["samples"]
    )


@pytest.mark.parametrize("seq_len", [1, 2, 8])
def test_short_windows_are_watched_too(data, tmp_path, seq_len):
    """Where no fixed prompt fits, the samples are written freely."""
    train(data, tmp_path / "run", "--max_steps", 1, "--seq_len", seq_len, "--sample_interval", 1)
    assert [len(m["samples"]) for m in metrics(tmp_path / "run") if "samples" in m] == [1]


def test_recomputing_the_blocks_changes_nothing(data, tmp_path, trained):
    train(data, tmp_path / "run", "--activation_checkpointing")
    assert not same_run_but(trained, tmp_path / "run", "activation_checkpointing")


def same_run_but(a, b, *names):
    a, b = (checkpoint.read(folder / "latest.pt") for folder in (a, b))
    return difference(a, b, ignore=("seconds", "output_dir", *names))


# ---------------------------------------------------------------------------------------------------------------------
# E3, E4: what happens around a run


class Wandb(types.ModuleType):
    """A wandb that fails in one of its calls."""

    def __init__(self, fails):
        super().__init__("wandb")
        self.fails, self.logged = fails, []

    def init(self, **kwargs):
        return self.fail("init") or self

    def log(self, record, step):
        self.fail("log")
        self.logged.append(step)

    def finish(self):
        self.fail("finish")

    def fail(self, name):
        if name == self.fails:
            raise ConnectionError("wandb is down")


@pytest.mark.parametrize("fails", ["init", "log", "finish", "nothing"])
def test_wandb_never_stops_or_changes_a_run(trained, data, tmp_path, monkeypatch, capsys, fails):
    """E4."""
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails))
    train(data, tmp_path / "run", "--wandb")
    assert not same_run_but(trained, tmp_path / "run", "wandb")
    assert [m["step"] for m in metrics(tmp_path / "run")] == [m["step"] for m in metrics(trained)]
    assert ("wandb is down" in capsys.readouterr().err) == (fails != "nothing")
    assert len(sys.modules["wandb"].logged) == (15 if fails in ("nothing", "finish") else 0)  # 12 losses, 3 validations


def test_a_torn_line_of_metrics_costs_no_record(trained, data, tmp_path):
    """E3."""
    train(data, tmp_path / "run", "--max_steps", 8)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')
    train(data, tmp_path / "run", "--max_steps", 10, "--resume")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    good = [json.loads(line) for line in lines]
    steps = [m["step"] for m in good if "loss" in m]
    assert {9, 10} <= set(steps) and len(steps) == len(set(steps))


def without_git():
    os.environ["PATH"] = ""


def test_a_machine_without_git_can_train(run, data, tmp_path):
    argv = flags(data, tmp_path / "run", "--max_steps", 1)
    assert run("train_diffusion", *argv, before=without_git).code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["git_commit"] == ""


# ---------------------------------------------------------------------------------------------------------------------
# the loop itself


OPTIONS = [
    "--masking_strategy span --mean_span_length 2",
    "--time_mode discrete --timesteps 7 --timestep_sampling uniform",
    "--mask_schedule cosine --loss_weight mix --lr_schedule cosine",
    "--min_mask_rate 0.15 --max_mask_rate 0.85 --loss_weight low_var --lr_schedule constant --grad_clip 0 --ema 0",
    "--amp bf16 --optimizer adamw",
    "--block_length 5 --sample_interval 40 --sample_steps 3",
    "--block_length 1 --amp bf16 --activation_checkpointing --sample_interval 40 --sample_steps 3",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_trains(data, tmp_path, options):
    """The loss falls below log V, that of a model that knows nothing."""
    last = train(
        data, tmp_path / "run", "--max_steps", 40, "--eval_interval", 0, "--save_interval", 99, *options.split()
    )
    losses = [m["loss"] for m in metrics(tmp_path / "run") if "loss" in m]
    assert losses[0] == pytest.approx(math.log(360), rel=0.05)
    assert last["nats_per_token"]["mean"] < 0.7 * math.log(360) and sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_check_wants_a_bound_below_the_unigram(command, data, tmp_path):
    """--check: 1 for a model of two steps, 0 for one that has learnt."""
    result = command("train_diffusion", *flags(data, tmp_path / "short", "--max_steps", 2, "--check"))
    assert result.code == 1 and "18%" in result.error() and "unigram" in result.out
    argv = [
        "--max_steps",
        120,
        "--eval_interval",
        0,
        "--dropout",
        0,
        "--lr",
        0.02,
        "--batch_size",
        8,
        "--grad_accum",
        1,
        "--check",
    ]
    result = command("train_diffusion", *flags(data, tmp_path / "long", *argv))
    assert result.code == 0 and not result.err and "bigram" in result.out
    assert (tmp_path / "long" / "latest.pt").exists()


def test_plan_starts_nothing(command, data, tmp_path):
    result = command("train_diffusion", *flags(data, tmp_path / "run", "--plan", "--max_steps", 1000))
    assert result.code == 0 and "plan for 1,000 steps" in result.out and "nothing was started" in result.out
    assert "it fits" in result.out and not (tmp_path / "run").exists() and not result.err


def test_learning_rate():
    """Numbers by hand: 100 steps, a rise over 10, a fall over 40."""
    run = config.TrainConfig(max_steps=100, warmup=0.1, decay=0.4)
    rate = lambda step, **k: train_diffusion.learning_rate(step, config.TrainConfig(**(vars(run) | k)))  # noqa: E731
    assert [rate(s) for s in (0, 4, 9, 30, 60)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [rate(s) for s in (70, 80, 99, 100)] == pytest.approx([0.75, 0.5, 0.025, 0])
    assert [rate(s, lr_schedule="constant") for s in (4, 50, 99)] == pytest.approx([0.5, 1, 1])
    assert [rate(s, lr_schedule="cosine") for s in (25, 50, 75, 100)] == pytest.approx([0.8535534, 0.5, 0.1464466, 0])
    assert [rate(s, warmup=0.0, decay=0.0) for s in (0, 50, 99)] == [1, 1, 1]
    assert all(0 < rate(s, lr_schedule=name) <= 1 for s, name in itertools.product(range(100), ("linear", "cosine")))


def test_the_learning_rate_reaches_every_group(data, trained):
    logged = {m["step"]: m["lr"] for m in metrics(trained) if "lr" in m}
    run = config.TrainConfig(max_steps=12)
    assert logged == pytest.approx({s: 0.01 * train_diffusion.learning_rate(s - 1, run) for s in range(1, 13)})
    groups = [g for o in checkpoint.read(trained / "latest.pt")["optimizers"] for g in o["param_groups"]]
    assert len({g["lr"] for g in groups}) == 1 and len(groups) >= 2


def test_metrics_count(trained, data):
    """Tokens seen, and the validations, which stand in best.pt too."""
    records = metrics(trained)
    assert [m["tokens"] for m in records if "tokens" in m] == [step * 8 * 32 for step in range(1, 13)]
    bits = {m["step"]: m["bits_per_byte"] for m in records if "bits_per_byte" in m}
    best = checkpoint.read(trained / "best.pt")
    assert list(bits) == [4, 8, 12] and best["best"] == min(bits.values()) == bits[best["step"]]


def test_one_loop():
    """DESIGN: optimizer.step() occurs in one file."""
    assert [p.name for p in ROOT.glob("*.py") if "optimizer.step()" in p.read_text("utf-8")] == ["train_diffusion.py"]

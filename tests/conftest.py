"""What several test files share: a tiny corpus, data prepared from it, one trained run, and scripts as processes."""

import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import checkpoint
import config
import prepare
import train_autoregressive
import train_diffusion

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are too small for more

TINY = (
    "--d_model 32 --n_layers 2 --n_heads 2 --d_ff 64 --seq_len 32 --batch_size 4 --grad_accum 2 --max_steps 12 "
    "--lr 0.01 --dropout 0.1 --ema 0.9 --save_interval 4 --eval_interval 4 --log_interval 1 --eval_windows 8 "
    "--eval_masks 2 --amp off --device cpu"
).split()

# ---------------------------------------------------------------------------------------------------------------------
# text, data, a run


def hindi(documents, seed=0):
    """Documents of a small world: who does what where, so that a word tells much about the next."""
    rng = random.Random(seed)
    who = ["राम", "सीता", "लड़की", "बूढ़ा आदमी", "मेरी माँ", "डॉक्टर"]
    where = ["बाज़ार", "नदी के किनारे", "स्कूल", "खेत", "शहर", "मंदिर"]
    what = ["गया था", "बैठी थी", "पानी लाता है", "किताब पढ़ती है", "गीत सुनता है"]
    line = lambda: f"{rng.choice(who)} {rng.choice(where)} में {rng.choice(what)}।"  # noqa: E731
    return "\n\n".join("\n".join(line() for _ in range(rng.randint(3, 9))) for _ in range(documents)) + "\n"


def make_data(folder, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    text = folder.parent / f"{folder.name}_{seed}.txt"
    text.write_text(hindi(300, seed), encoding="utf-8")
    prepare.prepare(config.PrepareConfig(input=str(text), output_dir=str(folder), vocab_size=360, val_fraction=0.2))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of prepare.py: about 9,000 tokens, 360 kinds. Not to be written to."""
    return make_data(tmp_path_factory.mktemp("prepared") / "data")


def flags(data, out, *more):
    return [*TINY, "--data_dir", str(data), "--output_dir", str(out), *map(str, more)]


def train(data, out, *more, kind="transformer"):
    """A tiny run in this process; returns its last validation."""
    argv = flags(data, out, *more)
    knobs = config.parse("", config.MaskConfig, checkpoint.MODELS[kind][0], config.TrainConfig, argv=argv)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train_diffusion.train(kind, *knobs, quiet=True)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A finished run of 12 steps with checkpoints at 4, 8 and 12. Not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    train(data, out)
    return out


@pytest.fixture(scope="session")
def twin(data, tmp_path_factory):
    """A run of train_autoregressive.py, by way of its main. Not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "twin"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        more = ["--sample_interval", 4, "--dropout", 0, "--weight_decay", 0.3, "--seq_len", 32]
        patch.setattr(sys, "argv", ["train_autoregressive.py", *flags(data, out, *more)])
        config.run_main(train_autoregressive.main)
    assert not e.value.code
    return out


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def difference(a, b, ignore=("seconds",), at=""):
    """Where two checkpoints (or anything inside) first differ, bit for bit; '' if nowhere."""
    if isinstance(a, torch.Tensor):
        return "" if a.dtype == b.dtype and torch.equal(a, b) else at
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{at}: {a.keys() ^ b.keys()}"
        return next(filter(None, (difference(a[k], b[k], ignore, f"{at}.{k}") for k in a if k not in ignore)), "")
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (difference(*pair, ignore, f"{at}[{i}]") for i, pair in pairs)), "")
    return "" if a == b else f"{at}: {a} and {b}"


# ---------------------------------------------------------------------------------------------------------------------
# scripts as processes: forked from a server that has torch imported, so that one costs no seconds


@dataclass
class Result:
    code: int
    out: str
    err: str

    def error(self):
        """The one line of a refusal; asserts that there is nothing else but warnings."""
        lines = [x for x in self.err.splitlines() if not re.search(r"^$|^(warning|note): ", x)]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


def in_child(script, argv, folder, before):
    os.chdir(folder)
    for fd in (1, 2):
        os.dup2(os.open(f"{folder}/std{fd}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *argv]
    if before:
        before()
    config.run_main(importlib.import_module(script).main)


class Child:
    def __init__(self, context, folder, script, argv, before):
        self.folder = folder
        self.process = context.Process(target=in_child, args=(script, [str(a) for a in argv], str(folder), before))
        self.process.start()

    def send(self, number):
        os.kill(self.process.pid, number)

    def wait_for(self, path, seconds=60):
        end = time.monotonic() + seconds
        while not (path.exists() and path.stat().st_size):
            assert self.process.is_alive() and time.monotonic() < end, (self.folder / "std2").read_text("utf-8")
            time.sleep(0.02)

    def wait(self, seconds=60):
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s")
        texts = [(self.folder / f"std{fd}").read_text("utf-8", errors="replace") for fd in (1, 2)]
        return Result(self.process.exitcode, *texts)


@pytest.fixture(scope="session")
def forks():
    """A multiprocessing context whose processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train_diffusion", "sample_diffusion", "evaluate", "prepare", "pytest", "torch._dynamo"]
    )
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
    context.Process(target=time.sleep, args=(0,)).start()  # the server starts, with this path
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    return context


@pytest.fixture
def start(forks, tmp_path_factory):
    """start("train_diffusion", "--flag", ..., before=function) → a Child; `before` runs in it first."""
    children = []

    def start(script, *argv, before=None):
        children.append(Child(forks, tmp_path_factory.mktemp("child"), script, argv, before))
        return children[-1]

    yield start
    for child in children:
        if child.process.is_alive():
            child.process.kill()


@pytest.fixture
def run(start):
    """run("train_diffusion", "--flag", ..., before=function) → its Result, in a process of its own."""
    return lambda *args, **kwargs: start(*args, **kwargs).wait()


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train_diffusion", "--flag", ...) → its Result, in this process."""

    def command(script, *argv):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as e:
                config.run_main(importlib.import_module(script).main)
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        return Result(e.value.code or 0, *capsys.readouterr())

    return command

"""checkpoint.py and resuming: kills, full disks, flipped bytes; what was saved loads, and goes on bit for bit."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from itertools import count
from pathlib import Path

import pytest
import torch
import toys
from conftest import contents, difference, flags, make_data, metrics, train

import checkpoint
import dataset

root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")


def small(step, size=8):
    """A checkpoint, as far as `read` looks."""
    return {"format": 1, "kind": "transformer", "step": step, "weights": torch.full((size,), float(step))}


def whole(path):
    """The step of a `small` checkpoint, read as a resuming run reads it, its content checked."""
    state = checkpoint.read(path)
    assert (state["weights"] == state["step"]).all()
    return state["step"]


def flip(path, at=0.5):
    with open(path, "r+b") as f:
        f.seek(int(path.stat().st_size * at))
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run that may be written to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def tmpfs():
    """tmpfs(path, options) mounts one; all go at the end."""
    mounted = []

    def mount(path, options):
        path.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no mount here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path])


# ---------------------------------------------------------------------------------------------------------------------
# C1, C2: killed while saving


def count_down(n):
    """From now on the n-th call of anything that touches a file ends the process; torch.save leaves half a file."""
    calls = count()

    def wrap(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            if next(calls) == n:
                if name == "save":
                    original(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, counted)

    os.fsync = lambda fd: None  # the files of a killed process survive without
    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace"), (Path, "write_text"), (Path, "read_text"),
                         (Path, "unlink"), (checkpoint, "sha256")):  # fmt: skip
        wrap(module, name)


def forked(work):
    """Run work() in a fork of this process; True if it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), status
    return status == 0


def killed_save(path, step, n):
    def work():
        count_down(n)
        checkpoint.save(path, small(step))

    return forked(work)


def kill_at_every_boundary():
    """In folder I: step 1 saved, the save of 2 killed at its I-th call. In I_J, where I left what none before it did:
    the save of 3 killed at its J-th call after that."""
    seen = []
    Path("first").mkdir()
    checkpoint.save("first/x.pt", small(1))
    for i in count():
        shutil.copytree("first", "second")
        done = killed_save("second/x.pt", 2, i)
        left = {re.sub(r"\d+", "", name): data for name, data in contents("second").items()}
        for j in count() if left not in seen else []:
            shutil.copytree("second", f"{i}_{j}")
            if killed_save(f"{i}_{j}/x.pt", 3, j):
                break
        seen.append(left)
        shutil.copytree("second", f"{i}")
        shutil.rmtree("second")
        if done:
            raise SystemExit(0)


def test_sigkill_at_every_file_boundary_of_a_save_leaves_the_old_or_the_new(start):
    """C1. The second save starts from whatever the first kill left; a save that was not killed is the new one."""
    child = start("train_diffusion", before=kill_at_every_boundary)
    assert child.wait(120).code == 0
    boundaries = len([p for p in child.folder.glob("*") if p.name.isdecimal()])
    once = [whole(child.folder / str(i) / "x.pt") for i in range(boundaries)]
    assert boundaries >= 12 and set(once) == {1, 2} and once == sorted(once), once
    differing = {int(p.name.split("_")[0]) for p in child.folder.glob("*_*")}
    assert len(differing) >= 5
    for i in differing:
        steps = [whole(child.folder / f"{i}_{j}" / "x.pt") for j in range(len(list(child.folder.glob(f"{i}_*"))))]
        assert len(steps) >= 12 and steps[0] == once[i] and steps[-1] == 3 and set(steps) == {once[i], 3}, (i, steps)


def test_sigkill_during_the_first_save_leaves_nothing_or_the_file(tmp_path):
    for n in count():
        path = tmp_path / str(n) / "x.pt"
        path.parent.mkdir()
        if killed_save(path, 1, n):
            break
        if path.exists():
            assert whole(path) == 1
    assert n >= 10


def save_until_killed():
    """50 times a process that saves without end, killed at a random moment."""
    rng = random.Random(0)
    for k in range(50):
        folder = Path(f"run{k}")
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            for step in count(1):
                checkpoint.save(folder / "x.pt", small(step, size=20_000))
        while not (folder / "x.pt").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise SystemExit(0)


def test_50_random_kills_leave_no_unloadable_checkpoint(start):
    """C2."""
    child = start("train_diffusion", before=save_until_killed)
    assert child.wait(120).code == 0
    steps = [whole(child.folder / f"run{k}" / "x.pt") for k in range(50)]
    assert len(set(steps)) > 1 and any(child.folder.glob("*/*.tmp"))  # the kills fell at different moments, some inside


# ---------------------------------------------------------------------------------------------------------------------
# C3, C10: disks


def do_not_sleep():
    checkpoint.time.sleep = lambda seconds: None  # between the attempts


@root_only
@pytest.mark.parametrize("left", [0, 20_000, 300_000])
def test_disk_full_while_saving_keeps_the_previous_checkpoints(run, data, tmp_path, tmpfs, left):
    """C3: also with no byte left; after room is made the run goes on, to the same end as without the fault."""
    disk = tmpfs(tmp_path / "disk", "size=6m")
    out = disk / "run"
    train(data, out, "--max_steps", 4, "--eval_interval", 100)
    before = contents(out)
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - left)))
    argv = flags(data, out, "--resume", "--max_steps", 8, "--eval_interval", 100)
    result = run("train_diffusion", *argv, before=do_not_sleep)
    assert result.code == 1 and ("space" in result.error() or "cannot write" in result.error()), result.err
    after = contents(out)
    assert all(after[name] == before[name] for name in before if name.endswith(".pt"))
    assert not list(out.glob("*.tmp")) and checkpoint.read(out / "latest.pt")["step"] == 4
    (disk / "ballast").unlink()
    assert run("train_diffusion", *argv).code == 0 and checkpoint.read(out / "latest.pt")["step"] == 8


@root_only
def test_a_full_disk_is_tried_again(tmp_path, tmpfs, monkeypatch):
    disk = tmpfs(tmp_path / "disk", "size=1m")
    checkpoint.save(disk / "x.pt", small(1, 50_000))
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: (disk / "ballast").unlink())
    checkpoint.save(disk / "x.pt", small(2, 50_000))
    assert whole(disk / "x.pt") == 2


@root_only
def test_a_folder_that_cannot_be_written_is_a_wrong_command(command, data, tmp_path, tmpfs):
    """C10: read-only, under a file, or a file."""
    (tmp_path / "file").write_text("x")
    places = [tmpfs(tmp_path / "readonly", "ro") / "run", tmp_path / "file" / "run", tmp_path / "file", "/proc/run"]
    for out in places:
        result = command("train_diffusion", *flags(data, out))
        assert result.code == 2 and Path(out).name in result.error(), (out, result)


# ---------------------------------------------------------------------------------------------------------------------
# C4, C5, C9: files that are not whole, or not ours


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def garbage(path):
    path.write_bytes(bytes(range(256)) * 8)


def foreign_sum(path):
    Path(f"{path}.sha256").write_text("0" * 64 + "  latest.pt\n")


def binary_sum(path):
    Path(f"{path}.sha256").write_bytes(b"\xff\xfe\x00")


def empty_sum(path):
    Path(f"{path}.sha256").write_bytes(b"")


DAMAGES = (flip, truncate, garbage, lambda path: path.write_bytes(b""), foreign_sum, binary_sum, empty_sum)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_passed_over(copy, command, trained, data, damage):
    """C4: and the run goes on from the one before to the same end."""
    for name in ("latest.pt", "step_000012.pt"):
        damage(copy / name)
    result = command("train_diffusion", *flags(data, copy, "--resume"))
    assert result.code == 0 and "latest.pt" in result.err and "step_000012.pt" in result.err, result.err
    assert "step_000008.pt at step 8" in result.out
    assert not same_run(trained, copy)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_asked_for_by_name_is_an_error(copy, command, damage):
    damage(copy / "latest.pt")
    for script in ("sample_diffusion", "evaluate"):
        result = command(script, "--ckpt", copy / "latest.pt")
        assert result.code == 1 and "latest.pt" in result.error()


def test_every_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save(path, small(1))
    for at in range(0, path.stat().st_size, 7):
        flip(path, at / path.stat().st_size)
        with pytest.raises(RuntimeError, match="damaged"):
            checkpoint.read(path)
        flip(path, at / path.stat().st_size)
    assert whole(path) == 1


def test_nothing_valid_is_an_error_and_never_a_new_start(copy, command, data):
    """C5."""
    for path in copy.glob("*.pt"):
        flip(path)
    before = contents(copy)
    result = command("train_diffusion", *flags(data, copy, "--resume"))
    assert result.code == 1 and "no readable checkpoint" in result.error()
    assert contents(copy) == before


def test_resuming_what_is_not_there(command, data, tmp_path):
    result = command("train_diffusion", *flags(data, tmp_path / "none", "--resume"))
    assert result.code == 2 and "none" in result.error() and not (tmp_path / "none").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_has_no_effect(tmp_path, copy, command, data, form, summed):
    """C9: also where its sha256 stands beside it, and where it hides among the keys of a checkpoint."""
    state = torch.load(copy / "latest.pt", weights_only=True) | {"best": Evil(tmp_path / "harm")}
    path = copy / "latest.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(state["best"]))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    side = Path(f"{path}.sha256")
    side.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  latest.pt\n") if summed else side.unlink()
    (tmp_path / "harm").unlink(missing_ok=True)
    for script in ("sample_diffusion", "evaluate"):
        result = command(script, "--ckpt", path)
        assert result.code == 1 and "latest.pt" in result.error()
    result = command("train_diffusion", *flags(data, copy, "--resume"))
    assert result.code == 0 and "warning" in result.err
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("kind", ["transformer", "eco_hybrid", "autoregressive"])
def test_a_model_of_before_value_residuals_is_what_it_was(trained, tmp_path, kind):
    """Without the first layer's values in it, whatever the shares of a new one are."""
    state, model = checkpoint.read(trained / "best.pt"), toys.build(kind, n_layers=3)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(".shares")}
    assert len(weights) == len(model.state_dict()) - 2
    old = dict(kind=kind, model_config=dataclasses.asdict(model.config), model=weights, ema={})
    checkpoint.save(tmp_path / "old.pt", state | old)
    for name, p in model.named_parameters():
        if name.endswith(".shares"):
            p.data = torch.tensor([1.0, 0.0])
    x = torch.randint(11, (2, 16), generator=toys.seeded())
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "old.pt").denoiser(x), model.eval()(x))


def test_files_of_other_projects(tmp_path):
    for n, state in enumerate([{}, [1], small(1) | {"format": 2}, small(1) | {"kind": "gpt2"}, torch.ones(3)]):
        checkpoint.save(tmp_path / f"{n}.pt", state)
        with pytest.raises(RuntimeError, match="not a checkpoint of this project"):
            checkpoint.read(tmp_path / f"{n}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# C6, E2: stopped and resumed is the same run


def same_run(a, b):
    """'' if the two runs ended in the same files, but for clocks and for the flags that name the folder."""
    for name in ("latest.pt", "best.pt"):
        one, two = (checkpoint.read(folder / name) for folder in (a, b))
        for state in (one, two):
            state["config"] = {
                k: v for k, v in state["config"].items() if k not in ("output_dir", "resume", "data_dir")
            }
        if at := difference(one, two):
            return f"{name}{at}"
    return ""


def signal_at(step, number):
    """Send this process a signal while it makes the batch of a step."""
    batch = dataset.batch

    def signalling(ids, seq_len, rows, rows_a_step, seed, now):
        if len(rows) and now == step:
            os.kill(os.getpid(), number)
        return batch(ids, seq_len, rows, rows_a_step, seed, now)

    dataset.batch = signalling


def losses(folder):
    return {m["step"]: m["loss"] for m in metrics(folder) if "loss" in m}


RUNS = {  # dropout, EMA and accumulation are on in all
    "muon": [],
    "adamw": ["--optimizer", "adamw", "--lr_schedule", "cosine", "--masking_strategy", "span"],
    "fp16": ["--amp", "fp16", "--loss_weight", "mix", "--ema", 0],
}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_is_the_uninterrupted_run_bit_for_bit(run, references, data, tmp_path, name, number):
    """C6: everything in the file; and a stop by SIGINT or SIGTERM leaves a checkpoint of that very step."""
    if name != "muon" and number == signal.SIGINT:
        pytest.skip("as SIGTERM")
    argv, reference = flags(data, tmp_path / "run", *RUNS[name]), references(name)
    result = run("train_diffusion", *argv, before=functools.partial(signal_at, 6, number))
    codes = {signal.SIGKILL: (-9, 4), signal.SIGTERM: (143, 7), signal.SIGINT: (130, 7)}
    assert (result.code, checkpoint.read(tmp_path / "run" / "latest.pt")["step"]) == codes[number]
    assert not result.err
    train(data, tmp_path / "run", *RUNS[name], "--resume")
    assert not same_run(reference, tmp_path / "run")
    assert losses(reference) == losses(tmp_path / "run")


@pytest.fixture(scope="session")
def references(data, tmp_path_factory):
    """references(name): the uninterrupted run."""
    made = {}

    def reference(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("reference") / name
            train(data, made[name], *RUNS[name])
        return made[name]

    return reference


@pytest.mark.parametrize("kind", checkpoint.OURS)
def test_every_kind_stops_resumes_and_loads(data, tmp_path, kind):
    """C6 in this process: the same steps with a stop after 6, and the weights come back into a fresh model."""
    train(data, tmp_path / "one", kind=kind)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(dataset, "batch", dataset.batch)  # undone at the end
        signal_at(6, signal.SIGTERM)
        train(data, tmp_path / "two", kind=kind)
    train(data, tmp_path / "two", "--resume", kind=kind)
    assert not same_run(tmp_path / "one", tmp_path / "two")
    loaded = checkpoint.load(tmp_path / "one" / "latest.pt", ema=False)
    assert (
        not difference(dict(loaded.denoiser.state_dict()), dict(checkpoint.read(loaded.path)["model"]))
        and loaded.step == 12
    )


def test_a_resumed_run_refuses_another_configuration(copy, command, data, trained):
    """C8: the difference is named, and what may change does not stop it."""
    before = contents(copy)
    changes = {"lr": 0.02, "dropout": 0.2, "d_model": 64, "batch_size": 8, "masking_strategy": "span", "seed": 1,
               "ema": 0.5, "optimizer": "adamw", "seq_len": 16}  # fmt: skip
    for name, value in changes.items():
        result = command("train_diffusion", *flags(data, copy, "--resume", f"--{name}", value))
        named = {"batch_size": "rows_a_step", "seq_len": "max_seq_len"}.get(name, name)
        assert result.code == 2 and f"{named} was " in result.error() and str(value) in result.error(), result.err
        assert contents(copy) == before
    may = ["--batch_size", 8, "--grad_accum", 1, "--keep", 1, "--eval_interval", 3, "--max_steps", 13]
    assert command("train_diffusion", *flags(data, copy, "--resume", *may)).code == 0
    assert checkpoint.read(copy / "latest.pt")["step"] == 13


def test_a_run_of_an_older_model_is_not_resumed(copy, command, data):
    state = checkpoint.read(copy / "latest.pt")
    state["model"] = {k: v for k, v in state["model"].items() if not k.endswith(".shares")}
    checkpoint.save(copy / "latest.pt", state)
    before = contents(copy)
    result = command("train_diffusion", *flags(data, copy, "--resume"))
    assert result.code == 2 and "older version of this model" in result.error() and contents(copy) == before


def test_a_run_begins_with_another_s_averaged_weights(trained, data, tmp_path):
    """At a rate of nothing they stay, bit for bit; block_length and dropout may differ, steps count anew."""
    other = checkpoint.load(trained, ema=True)
    assert difference(
        dict(other.denoiser.state_dict()), dict(checkpoint.load(trained, ema=False).denoiser.state_dict())
    )
    for name, path in (("folder", trained), ("file", trained / "best.pt")):
        more = ["--lr", 1e-30, "--dropout", 0.2, "--block_length", 8, "--max_steps", 2]
        train(data, tmp_path / name, "--init", path, *more)
        state = checkpoint.read(tmp_path / name / "latest.pt")
        assert not difference(dict(state["model"]), dict(other.denoiser.state_dict()))
        assert state["step"] == 2 and state["config"]["init"] == str(path) and state["config"]["block_length"] == 8
        assert checkpoint.load(tmp_path / name).denoiser.block_length == 8


def test_a_begun_run_stops_and_resumes_without_the_other(trained, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    more = ["--init", other, "--block_length", 8]
    train(data, tmp_path / "one", *more)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(dataset, "batch", dataset.batch)  # undone at the end
        signal_at(6, signal.SIGTERM)
        train(data, tmp_path / "two", *more)
    shutil.rmtree(other)
    train(data, tmp_path / "two", *more[2:], "--resume")
    assert not same_run(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["init"] == str(other)


def test_a_run_that_cannot_begin_another(trained, data, tmp_path, command):
    """Kind, sizes and tokenizer are named, and no folder is made."""
    others = make_data(tmp_path / "others", seed=1)
    for script, folder, more, words in (
        ("train_diffusion", data, ["--d_ff", 96, "--n_layers", 3], ("d_ff 64, here 96", "n_layers 2, here 3")),
        ("train_diffusion", data, ["--seq_len", 16], ("max_seq_len 32, here 16",)),
        ("train_diffusion", data, ["--window", 4], ("window 0, here 4",)),
        ("train_eco_hybrid", data, [], ("kind 'transformer', here 'eco_hybrid'",)),
        ("train_autoregressive", data, [], ("kind 'transformer', here 'autoregressive'",)),
        ("train_diffusion", others, [], ("tokenizer '",)),
    ):
        result = command(script, *flags(folder, tmp_path / "run", "--init", trained, *more))
        assert result.code == 2 and all(word in result.error() for word in words), result
        assert "cannot begin" in result.error() and not (tmp_path / "run").exists()


def test_data_prepared_again(trained, data, tmp_path, command):
    """D9: the job goes on undisturbed, with the old file, and its resume is refused; so is a tokenizer exchanged."""
    mine, out, batch = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "run", dataset.batch

    def preparing(ids, seq_len, rows, rows_a_step, seed, step):
        if step == 5 and rows.start == 0:
            make_data(mine, seed=1)
        return batch(ids, seq_len, rows, rows_a_step, seed, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "batch", preparing)
        train(mine, out)
    assert dataset.load(mine).hash != dataset.load(data).hash
    assert not same_run(trained, out)
    before = contents(out)
    result = command("train_diffusion", *flags(mine, out, "--resume", "--max_steps", 16))
    assert result.code == 2 and "data_sha256 was" in result.error() and "tokenizer_sha256 was" in result.error()
    (mine / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    result = command("train_diffusion", *flags(mine, tmp_path / "new"))
    assert result.code == 2 and "is not the tokenizer" in result.error() and not (tmp_path / "new").exists()
    assert contents(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# C7, C11, E1, E2: the run folder


@pytest.mark.parametrize("first", [True, False])
def test_compiled_and_not_compiled_read_each_other(data, tmp_path, monkeypatch, first):
    """C7: the names of the weights stay, and a run may change over; Dynamo traces, the eager backend computes."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="eager"))
    small_run = ["--max_steps", 2, "--eval_interval", 0, "--dropout", 0, "--n_layers", 1]
    train(data, tmp_path / "run", *small_run, *["--compile"] * first)
    assert all("_orig_mod" not in name for name in checkpoint.read(tmp_path / "run" / "latest.pt")["model"])
    train(data, tmp_path / "run", *small_run, "--max_steps", 3, "--resume", *["--compile"] * (not first))
    assert checkpoint.load(tmp_path / "run" / "latest.pt").step == 3


def test_pruning_keeps_the_newest_with_latest_and_best(data, tmp_path, monkeypatch):
    """C11. The oldest go, by number and not by name; temporaries of a killed run go when it is resumed."""
    out = tmp_path / "run"
    train(data, out, "--save_interval", 2, "--max_steps", 9, "--keep", 3)
    for stale in ("latest.pt.17.tmp", "latest.pt.sha256.17.tmp"):
        (out / stale).write_bytes(b"half")
    train(data, out, "--save_interval", 2, "--max_steps", 9, "--keep", 3, "--resume")
    names = {"latest.pt", "best.pt", "step_000004.pt", "step_000006.pt", "step_000008.pt"}
    both = names | {f"{name}.sha256" for name in names}
    assert set(contents(out)) == both | {"config.json", "metrics.jsonl", ".lock"}
    assert all(checkpoint.read(out / name)["step"] for name in names)
    (out / "latest.pt").unlink()
    for step in (999_999, 1_000_000):
        checkpoint.save(out / f"step_{step:06d}.pt", small(step))
    checkpoint.prune(out, 1)
    assert [p.name for p in out.glob("step_*.pt")] == ["step_1000000.pt"]
    checkpoint.save(out / "step_999999.pt", small(999_999))
    assert checkpoint.read_newest(out)[1].name == "step_1000000.pt"


def test_one_run_a_folder(start, command, data, tmp_path):
    """E1, E2: a second one is refused while the first runs, and after it without --resume."""
    out = tmp_path / "run"
    first = start("train_diffusion", *flags(data, out, "--max_steps", 100_000, "--save_interval", 2))
    first.wait_for(out / "latest.pt.sha256")
    for more in ([], ["--resume"]):
        result = command("train_diffusion", *flags(data, out, "--max_steps", 100_000, *more))
        assert result.code == 1 and "locked" in result.error()
    first.send(signal.SIGTERM)
    result = first.wait()
    assert result.code == 143 and not result.err and "--resume" in result.out
    before = contents(out)
    result = command("train_diffusion", *flags(data, out, "--max_steps", 100_000))
    assert result.code == 2 and "--resume" in result.error() and contents(out) == before


def test_config_json_and_the_checkpoint_agree(trained, data):
    config, state = json.loads((trained / "config.json").read_text()), checkpoint.read(trained / "latest.pt")
    assert {k: config[k] for k in state["config"]} == state["config"]
    assert config["parameters"] == sum(v.numel() for v in state["model"].values())
    assert config["data_sha256"] == dataset.load(data).hash
    assert state["tokenizer"].numpy().tobytes() == (data / "tokenizer.model").read_bytes()


def test_newest_run(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(checkpoint, "IN_THE_BOX", tmp_path / "no box")
    with pytest.raises(FileNotFoundError, match="no run"):
        checkpoint.newest_run(tmp_path)
    for n, name in enumerate(["old", "new", "middle"]):
        shutil.copytree(trained, tmp_path / name)
        for path in (tmp_path / name).iterdir():
            os.utime(path, (0, [10, 30, 20][n]))
    assert checkpoint.newest_run(tmp_path).name == "new"

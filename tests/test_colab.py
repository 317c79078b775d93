"""colab_train_eco.py: one shot end to end, interrupted and resumed; its refusals, its sizes, and each check by hand."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import hindi, metrics

import checkpoint
import colab_train_eco as colab
import config
import prepare

SHOT = "--allow_cpu --seq_len 144 --batch_size 2 --grad_accum 1 --save_interval 8 --log_interval 4".split()
GIB = 2**30


def no_gpu():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def calm():
    """No GPU, and a throughput that a busy machine cannot spoil."""
    no_gpu()
    colab.SWING = 1e9


def by_name(report):
    return {c["name"]: c for c in report["checks"]}


def read_report(out):
    return json.loads((out / "report.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A prepared folder whose validation split is soon scored."""
    folder = tmp_path_factory.mktemp("colab")
    (folder / "a.txt").write_text(hindi(120), encoding="utf-8")
    knobs = dict(input=str(folder / "a.txt"), output_dir=str(folder / "data"), vocab_size=360)
    prepare.prepare(config.PrepareConfig(**knobs))
    return folder / "data"


# ---------------------------------------------------------------------------------------------------------------------
# one shot


@pytest.mark.slow
def test_a_shot_is_interrupted_resumed_and_passes(start, small, tmp_path):
    out = tmp_path / "run"
    argv = ["colab_train_eco", *SHOT, "--data_dir", small, "--output_dir", out, "--max_steps", 24]
    first = start(*argv, before=calm)
    first.wait_for(out / "step_000008.pt", seconds=400)
    first.send(signal.SIGTERM)
    assert first.wait(400).code == 128 + signal.SIGTERM and not (out / "report.json").exists()
    stopped = checkpoint.read(out / "latest.pt")["step"]
    assert 8 <= stopped < 24

    # another batch, the same step; length and step are those of the run
    done = start(*argv[:2], *SHOT[5:], *argv[-6:], "--resume", before=calm).wait(400)
    assert done.code == 0 and not done.err, done.err
    report = read_report(out)
    assert report["passed"] and all(c["passed"] for c in report["checks"]) and report["resumed_at"] == stopped
    assert report["sizes"]["seq_len"] == 144 and report["sizes"]["tokens_a_step"] == 288
    assert [r["step"] for r in metrics(out) if "loss" in r] == [1, *range(4, 25, 4)]

    # every value once more from the files
    checks, scores = by_name(report), json.loads((out / "eval.json").read_text("utf-8"))
    bound = checks["bound, bits/byte"]
    assert bound["value"] == scores["bits_per_byte"]["mean"] < bound["limit"] == pytest.approx(0.82 * bound["unigram"])
    assert {k: bound[k] for k in ("unigram", "bigram")} == scores["baselines_bits_per_byte"]
    assert checks["checkpoint at step"]["value"] == checkpoint.load(out / "step_000024.pt").step == 24
    assert checks["loss finite"]["lines"] == 7 and checks["throughput p90/p10"]["lines"] >= 1
    assert 0 < checks["distinct-2"]["tokens"] <= 4 * 64
    for prompt, text in zip(config.PROMPTS, report["samples"], strict=True):
        assert text.startswith(prompt) and text in done.out
    for name in checks:
        assert re.search(rf"^{re.escape(name)} .* ok", done.out, re.M), name
    assert checks["distinct-2"]["tokens"] == count_new(out)


def count_new(out):
    """Tokens that the shot's samples have beyond their prompts."""
    loaded = checkpoint.load(out)
    cfg = config.SampleConfig(max_new_tokens=64)
    samples = colab.sample_diffusion.generate(loaded, config.PROMPTS, cfg)
    given = sum(len(loaded.tokenizer.encode(p)) for p in config.PROMPTS)
    return sum(map(len, samples.texts)) - given


@pytest.mark.slow
def test_a_short_run_fails_the_bound_alone(start, small, tmp_path):
    """Two steps, fewer than a log or save interval: the checks of speed and checkpoint adapt, the bound does not."""
    argv = [
        "--allow_cpu",
        "--seq_len",
        48,
        "--batch_size",
        2,
        "--grad_accum",
        1,
        "--max_steps",
        2,
    ]  # not all prompts fit
    result = start("colab_train_eco", *argv, "--data_dir", small, "--output_dir", tmp_path, before=calm).wait(400)
    assert result.code == 1 and "bound, bits/byte" in result.error() and "memory" not in result.error()
    report = read_report(tmp_path)
    assert not report["passed"]
    passed = {c["name"]: c["passed"] for c in report["checks"] if c["name"] not in ("distinct-2", "repeated 4-grams")}
    assert passed.pop("bound, bits/byte") is False and all(passed.values()) and len(passed) == 5
    checks = by_name(report)
    assert checks["checkpoint at step"]["value"] == 2 and checks["throughput p90/p10"]["lines"] == 1


def test_a_training_that_fails_is_reported(start, small, tmp_path):
    """Another process holds the folder: the trainer exits 1, and what is left to say is said."""
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = [*SHOT, "--data_dir", small, "--output_dir", tmp_path]
        result = start("colab_train_eco", *argv, before=no_gpu).wait(400)
    assert result.code == 1 and "is locked" in result.err and "--batch_size 1 --grad_accum 2" in result.err
    report = read_report(tmp_path)
    assert not report["passed"] and report["checks"][0]["value"] == 1 and len(report["checks"]) == 3
    assert report["samples"] == [] and not any(c["passed"] for c in report["checks"])


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def test_help_explains_every_flag(command):
    result = command("colab_train_eco", "--help")
    text = re.sub(r"\s+", " ", result.out)
    assert result.code == 0
    for f in dataclasses.fields(config.ColabConfig):
        assert re.sub(r"\s+", " ", f"{f.metadata['help']} (default: ") in text, f.name


@pytest.mark.parametrize("argv, words", [
    ([], ["no GPU", "--allow_cpu"]),
    (["--allow_cpu", "--data_dir", "."], ["meta.json", "prepare.py"]),
    (["--allow_cpu", "--data_dir", "a", "--dataset", "b"], ["exclude"]),
    (["--allow_cpu", "--seq_len", "-1"], ["--seq_len is -1"]),
    (["--allow_cpu", "--max_steps", "0"], ["--max_steps is 0"]),
    (["--allow_cpu", "--batch_size", "-1"], ["--batch_size is -1"]),
    (["--preset", "tiny"], ["--preset", "--help"]),
])  # fmt: skip
def test_refusals_come_before_any_work(start, argv, words):
    child = start("colab_train_eco", *argv, before=no_gpu)
    result = child.wait()
    assert result.code == 2 and all(word in result.error() for word in words)
    assert {p.name for p in child.folder.iterdir()} == {"std1", "std2"}


def test_a_wrong_command_of_a_script_is_passed_on(capfd):
    """2 ends the shot with the script's own line; 0 and 1 come back."""
    with pytest.raises(SystemExit) as e:
        colab.start("plot.py", bogus=1)
    assert e.value.code == 2 and capfd.readouterr().err.startswith("error: ")
    assert colab.start("plot.py", help=True, nothing="", off=False) == 0
    assert "$ python plot.py --help\n" in capfd.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# data


def test_the_default_corpus_is_prepared_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = colab.prepared(config.ColabConfig())
    meta = tmp_path / folder / "meta.json"
    known = json.loads(meta.read_text("utf-8"))
    assert known["vocab_size"] == 1024 and "Devdas" in known["source"]
    made = meta.stat().st_mtime_ns
    assert colab.prepared(config.ColabConfig()) == folder and meta.stat().st_mtime_ns == made


def test_a_data_set_goes_to_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(colab, "start", lambda script, **flags: calls.append((script, flags)) or 0)
    hub = dict(dataset="wikimedia/wikipedia", dataset_config="20231101.hi", text_field="body")
    folder = colab.prepared(config.ColabConfig(**hub))
    assert [(script, {k: flags[k] for k in hub}) for script, flags in calls] == [("prepare.py", hub)]
    assert str(calls[0][1]["output_dir"]) == folder and "vocab_size" not in calls[0][1]
    others = [dict(hub, text_field="text"), dict(hub, dataset_config="20231101.ur"), dict(hub, dataset="a/b"), {}]
    assert len({folder, *(colab.prepared(config.ColabConfig(**other)) for other in others)}) == 5
    assert colab.prepared(config.ColabConfig()) == "data/colab"
    monkeypatch.setattr(colab, "start", lambda script, **flags: 1)
    with pytest.raises(SystemExit) as e:
        colab.prepared(config.ColabConfig(**hub))
    assert e.value.code == 1


# ---------------------------------------------------------------------------------------------------------------------
# sizes


@pytest.mark.parametrize("size, tokens", [("tiny", 2048), ("laptop", 16384), ("base", 65536)])
def test_tokens_a_step_are_the_same_whatever_the_memory(size, tokens):
    before = 0
    for memory in (0.5, 1, 2, 4, 6, 8, 11, 14.7, 22.2, 39.4, 79.2, 139):
        T, B, accum = colab.plan(size, memory * GIB, 8192)
        assert T * B * accum == tokens and T in (256, 512, 1024)
        assert B == 1 or 2 * T * B * colab.bytes_a_token(size, 8192) <= memory * GIB
        assert accum == 1 or 4 * T * B * colab.bytes_a_token(size, 8192) > memory * GIB  # twice as many do not fit
        assert before <= T * B
        before = T * B
    assert accum == 1  # the largest takes a step at once


def test_sizes_of_the_runbook():
    table = {14.7: ((512, 32, 1), (256, 16, 16)), 22.2: ((512, 32, 1), (256, 32, 8)),
             39.4: ((512, 32, 1), (512, 32, 4)), 79.2: ((512, 32, 1), (1024, 32, 2))}  # fmt: skip
    for memory, (laptop, base) in table.items():
        assert colab.plan("laptop", memory * GIB, 8192) == laptop and colab.plan("base", memory * GIB, 8192) == base
        assert colab.plan("tiny", memory * GIB, 1024) == (256, 8, 1)


def test_what_is_given_stays():
    plan = lambda **given: colab.plan("laptop", 14.7 * GIB, 8192, **given)  # noqa: E731
    assert plan(batch_size=8) == (512, 8, 4) and plan(grad_accum=8) == (512, 4, 8)
    assert plan(seq_len=1024) == (1024, 16, 1) and plan(seq_len=200) == (200, 81, 1)  # more would fit
    assert plan(seq_len=256, batch_size=3, grad_accum=5) == (256, 3, 5)
    assert plan(tokens=6 * 5 * 200, seq_len=200) == (200, 30, 1)
    assert colab.plan("laptop", 1.75 * GIB, 8192, tokens=6 * 5 * 200, seq_len=200) == (200, 10, 3)  # 13 fit


def remember(seen, t):
    seen[t.untyped_storage().data_ptr()] = t
    return t


@pytest.mark.parametrize("size, V", [("tiny", 1024), ("laptop", 8192)])
def test_the_estimate_of_memory_covers_what_a_forward_keeps(size, V):
    """Counted: the storages that autograd saves, of two windows less those of one."""
    config_class, model_class = checkpoint.MODELS["eco_hybrid"]
    sizes = {k: v for k, v in config.PRESETS[size].items() if hasattr(config_class, k)}
    model, T, kept = model_class(config_class(vocab_size=V, max_seq_len=256, **sizes)), 256, []
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    for B in (1, 2):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, seen), lambda t: t):
            loss = model.loss(
                torch.zeros(B, T, dtype=torch.long), config.MaskConfig(), torch.Generator().manual_seed(0)
            )
        kept.append(sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in own))
        del loss
    measured, estimated = (kept[1] - kept[0]) / T, colab.bytes_a_token(size, V)
    assert measured < estimated < 1.5 * measured, (measured, estimated)


# ---------------------------------------------------------------------------------------------------------------------
# the checks, counted by hand


@pytest.mark.parametrize("texts, distinct, repeated", [
    ([[1, 2, 1, 2, 1, 2]], 2 / 5, 1 / 3),  # 12 21 12 21 12; 1212 2121 1212
    ([[1, 2], [3, 4]], 1, 1),  # no pair across texts, and no 4-gram at all
    ([[1, 2, 3, 4, 5]] * 2, 4 / 8, 2 / 4),  # the same text behind two prompts
    ([[1, 2, 3, 4], [4, 3, 2, 1]], 1, 0),
    ([[7] * 64] * 4, 1 / 252, 243 / 244),
    ([[], []], 0, 1),
])  # fmt: skip
def test_distinct_pairs_and_repeated_fours(texts, distinct, repeated):
    assert colab.spread(texts) == pytest.approx((distinct, repeated))


def test_the_real_texts_own_spread():
    assert colab.real_spread(np.arange(64 * 50)) == [1.0, 0.0]
    circle = np.tile(np.arange(8), 200)  # every piece of 64 is the same
    assert colab.real_spread(circle) == pytest.approx([8 / 252, 1 - 8 / 244])


def test_collapse_is_judged_against_the_real_text():
    passed = lambda texts, real: [c["passed"] for c in colab.check_collapse(texts, real)]  # noqa: E731
    varied = [list(range(n, n + 64)) for n in (0, 100, 200, 300)]
    assert passed(varied, (0.95, 0.005)) == [True, True] and passed([varied[0]] * 4, (0.95, 0.005)) == [False, False]
    assert passed([[], [], [], []], (0.95, 0.005)) == [False, False]
    # 40 tokens, then 12 times the last one: 39 + 1 of 51 pairs, 37 + 3 of 49 4-grams, in each of four different texts
    stuck = [list(range(n, n + 40)) + [n + 39] * 12 for n in (0, 100, 200, 300)]
    found = list(colab.check_collapse(stuck, (0.95, 0.005)))
    assert [c["value"] for c in found] == pytest.approx([40 / 51, 1 - 40 / 49])
    assert [c["limit"] for c in found] == pytest.approx([0.475, 0.105])
    assert [c["passed"] for c in found] == [True, False]
    assert passed(stuck, (0.95, 0.13)) == [True, True] and passed(stuck, (1.7, 0.13)) == [False, True]


def log(rates, losses=None, start=0):
    losses = losses or [2.0] * len(rates)
    return [{"step": start + 10 * (i + 1), "loss": loss, "seconds": {"tokens_a_second": rate}}
            for i, (rate, loss) in enumerate(zip(rates, losses, strict=True))]  # fmt: skip


def test_the_log_is_judged_after_the_first_steps():
    judge = lambda lines, first=20: [c["passed"] for c in colab.check_log(lines, first)]  # noqa: E731
    validation = [{"step": 50, "bits_per_byte": None, "seconds": {"validation": 1.0}}]
    assert judge(log([3, 5, *[1000, 900, 1100] * 10]) + validation) == [True, True]  # compiling until step 20
    assert judge(log([3, 5, *[1000, 900, 1100] * 10]), first=0) == [True, True]  # two lines of 32 are no tenth
    assert judge(log([3, 5, *[1000] * 8]), first=0) == [True, False]
    assert judge(log([1000] * 40 + [100] * 10)) == [True, False]  # stalls in the last fifth
    assert judge(log([1000] * 20 + [400] * 20)) == [True, True]  # a neighbour takes half of the machine
    assert judge(log([1000] * 10, [2.0] * 9 + [None])) == [False, True]
    assert judge(log([1000] * 10, [float("nan")] + [2.0] * 9)) == [False, True]
    assert judge([]) == [False, False]
    swing = list(colab.check_log(log([1, 1, *range(100, 201)]), 20))[1]
    assert swing["value"] == pytest.approx(190 / 110) and swing["tokens_a_second"] == 150 and swing["lines"] == 101


def test_the_newest_checkpoint_must_load(trained, tmp_path):
    judge = lambda folder, due: [colab.check_checkpoint(folder, due)[k] for k in ("value", "passed")]  # noqa: E731
    assert (
        judge(trained, 12) == [12, True] and judge(trained, 16) == [12, False] and judge(tmp_path, 4) == [None, False]
    )
    broken = shutil.copytree(trained, tmp_path / "broken")
    with open(broken / "step_000012.pt", "r+b") as f:
        f.seek(1000)
        f.write(b"\xff" * 8)
    assert judge(broken, 4) == [None, False]


def test_the_bound_must_be_well_below_the_unigrams():
    for mean, passed in ((0.819, True), (0.821, False)):
        scores = dict(step=7, bits_per_byte=dict(mean=mean, standard_error=0.1))
        found = colab.check_bound(scores | dict(baselines_bits_per_byte=dict(unigram=1.0, bigram=0.5)))
        assert found["passed"] is passed and found["limit"] == pytest.approx(0.82) and found["bigram"] == 0.5

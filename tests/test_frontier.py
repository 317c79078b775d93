"""frontier.py, by way of `benchmark.py sample`: figures of a real small run, and the verdict on made-up ones."""

import json
import re

import pytest
import torch
from conftest import train
from toys import build, seeded

import benchmark
import checkpoint
import frontier
import sampling


@pytest.fixture
def sample(command, trained, twin, tmp_path):
    """sample("--flag", ...) → (its Result, the JSON it wrote)."""
    path = tmp_path / "figures.json"

    def sample(*argv, **given):
        runs = dict(ckpt=trained, twin=twin) | given
        named = [x for k, v in runs.items() if v for x in (f"--{k}", v)]
        result = command("benchmark", "sample", *named, "--output", path, *argv)
        return result, json.loads(path.read_text("utf-8")) if path.exists() else None

    return sample


def test_every_way_writes_the_same_number_of_tokens(sample, trained, twin, tmp_path):
    result, figures = sample("--samples", 2, "--prompt_tokens", 8, "--new_tokens", 16, "--block", 4)
    assert result.code == 0, result.err
    rows = {(row["strategy"], row["label"]): row for row in figures["rows"]}
    assert {name for name, _ in rows} >= {*sampling.STRATEGIES, frontier.TWIN, "ReMDM loop", "blocks, random"}
    assert {(name, label): row["forwards"] for (name, label), row in rows.items() if name == "entropy"} == {
        ("entropy", f"{n} steps"): n for n in (16, 8, 4, 2, 1)
    }
    assert rows[frontier.TWIN, "1 a forward"]["forwards"] == 16
    for row in figures["rows"]:
        assert row["quality"]["samples"] == 2 and row["quality"]["tokens"] == 32
        assert row["tokens_a_second"] == pytest.approx(16 / row["seconds"]) and row["forwards"] <= 16
        assert sorted(row["all_seconds"])[0] <= row["seconds"] <= sorted(row["all_seconds"])[1]
    for (name, label), row in rows.items():
        if name == "blocks, no cache":  # what the cache changes is time, and little else
            assert row["forwards"] == rows["blocks, random", label]["forwards"]
    assert figures["drift"]["mean"] > -1e-6 and figures["verdict"]["times_the_reference"] >= 1
    assert (tmp_path / "figures.png").stat().st_size > 10_000
    # the judge's figure of the real text, computed from the logits
    judge, ids = checkpoint.load(twin), figures["real_text"]
    data = torch.from_numpy(benchmark.dataset.load(judge.config["data_dir"]).val.astype("int64"))
    whole = len(data) // 24
    x = torch.stack([data[24 * (i * whole // 2) :][:24] for i in range(2)])
    log_p = judge.denoiser(x).log_softmax(2).gather(2, x[:, :, None]).squeeze(2)[:, 8:]
    assert ids["judge_nats_per_token"]["mean"] == pytest.approx(float(-log_p.mean()), rel=1e-4)


def test_the_same_seed_writes_the_same_text(sample):
    argv = ("--samples", 1, "--prompt_tokens", 4, "--new_tokens", 8, "--block", 4)
    texts = [[row["text"] for row in sample(*argv)[1]["rows"]] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 5


@pytest.mark.parametrize("argv, given, message", [
    ((), dict(twin=""), "--twin is missing"), (("--new_tokens", 30), {}, "38 together.*32"),
    (("--samples", 4000, "--new_tokens", 8), {}, "--samples is 4000"), (("--samples", 0), {}, "--samples is 0"),
    (("--temperature", 0), {}, "--temperature is 0"), (("--top_p", 2), {}, "--top_p is 2")])  # fmt: skip
def test_wrong_commands(sample, argv, given, message):
    result, figures = sample("--prompt_tokens", 8, *argv, **given)
    assert result.code == 2 and figures is None
    assert re.search(message, result.error())


def test_the_two_models_cannot_be_exchanged(command, trained, twin, tmp_path):
    small = ("--samples", 1, "--prompt_tokens", 4, "--new_tokens", 8, "--output", tmp_path / "x.json")
    result = command("benchmark", "sample", "--ckpt", twin, "--twin", twin, *small)
    assert result.code == 2 and "autoregressive" in result.error()
    result = command("benchmark", "sample", "--ckpt", trained, "--twin", trained, *small)
    assert result.code == 2 and "cannot judge" in result.error()


def test_a_model_of_blocks_is_refused(command, data, twin, tmp_path):
    train(data, tmp_path / "blocks", "--block_length", 8, "--max_steps", 1)
    result = command("benchmark", "sample", "--ckpt", tmp_path / "blocks", "--twin", twin)
    assert result.code == 2 and "blocks of 8" in result.error()


def row(strategy, seconds, nats, entropy, reference=False):
    figures = {"judge_nats_per_token": {"mean": nats, "standard_error": 0.1}, "unigram_entropy": entropy}
    return dict(strategy=strategy, label="", seconds=seconds, quality=figures, reference=reference)


def test_the_verdict():
    """The fastest whose nats are at most 5 % above and whose entropy is within 3 % of the plain sampler's."""
    rows = [
        row(frontier.TWIN, 0.6, 4.0, 5.0, True),
        row(frontier.REFERENCE, 2.0, 5.0, 5.0, True),
        row("worse", 0.1, 5.26, 5.0),
        row("poor", 0.2, 4.0, 4.84),
        row("noisy", 0.2, 5.0, 5.16),
        row("good", 0.25, 5.24, 4.86),
        row("better", 0.4, 4.0, 5.14),
    ]
    best = frontier.verdict(rows)
    assert best["strategy"] == "good" and best["times_the_reference"] == 8 and best["times_the_twin"] == 2.4
    assert best["as_good"] == [f"{name}, " for name in (frontier.REFERENCE, "good", "better")]
    assert frontier.verdict(rows[:5])["times_the_reference"] == 1  # nothing but the reference itself


def test_the_drift_of_a_cache():
    """With one layer keys and values of the prefix depend on nothing behind it; with two they do."""
    for layers, most in ((1, 1e-5), (2, 10.0)):
        model = build("transformer", noise=0.5, n_layers=layers).eval()
        watched = frontier.Watched(model)
        x = torch.full((1, 16), 11).index_fill(1, torch.arange(2), 3)
        list(sampling.denoise(watched, x, "random", 12, block_length=4, generator=seeded()))
        assert len(watched.drift) > 8 and abs(max(watched.drift)) < most
        assert layers == 1 or max(watched.drift) > 1e-3

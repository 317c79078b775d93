"""A race: clocks that run alone, memory that is counted, a judge that reads text."""

import math
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import race


def test_the_one_behind_goes_on_and_each_clock_counts_its_own_work(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(race.time, "perf_counter", lambda: now[0])

    def racer(name, cost, steps):
        for n in range(steps):
            now[0] += cost
            yield f"{name}{n}"

    seen = []
    for who, step, seconds in race.race([racer("a", 3, 2), racer("b", 1, 4)]):
        seen.append((who, step, seconds))
        now[0] += 100  # what is done with a step is nobody's time
    assert seen == [(0, "a0", 3), (1, "b0", 1), (1, "b1", 2), (1, "b2", 3), (0, "a1", 6), (1, "b3", 4)]


def test_peak_memory_is_weights_and_the_most_that_is_held_at_once():
    model = torch.nn.Linear(10, 100)  # 1,100 numbers

    def decode():
        a = torch.zeros(250_000)  # 1,000,000 bytes
        b = torch.ones(500_000)  # 2,000,000 more
        del a
        torch.ones(100_000) + b[:100_000]

    got = race.peak_memory(model, decode)
    assert got == pytest.approx(4 * 1100 + 3_000_000, rel=1e-3), "not the most that was held"


def test_the_judge_reads_what_was_written_alone(twin):
    judge = checkpoint.load(twin)
    prompt, text = "राम बाज़ार", "राम बाज़ार में गया था।"
    ids, given = judge.tokenizer.encode(text), judge.tokenizer.encode(prompt)
    assert ids[: len(given)] == given
    with torch.no_grad():
        logp = judge.denoiser(torch.tensor([ids])).log_softmax(2)[0]  # (T, V)
    nats = -sum(float(logp[t, ids[t]]) for t in range(len(given), len(ids)))
    n_bytes = len(text.encode()) - len(prompt.encode())
    assert race.judged(judge, prompt, text) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    assert race.judged(judge, text, text) is None  # nothing was written
    assert race.judged(judge, "", "राम " * 99) is None  # longer than the judge's window


def test_what_was_written_ends_at_an_end_that_was_not_given():
    ids = [5, 9, 6, 7, 9, 9]  # 9 is EOS, 8 is MASK
    assert race.written(ids, {0, 1}, 9, 8) == ([5, 9, 6, 7], 2)
    assert race.written([5, 8, 6], {0}, 9, 8) == ([5, 8, 6], 1)


def test_figures_and_medians():
    got = race.figures([0.25, 1.0, 2.0], 4, 10)
    assert got == dict(seconds=2.0, first=0.25, tokens=10, tokens_per_second=5.0, forwards=4, tokens_per_forward=2.5)
    assert race.figures([], 0, 0)["tokens_per_second"] is None
    rows = [got | dict(judge=j, memory=None) for j in (1.0, None, 4.0, 2.0)]
    assert race.medians(rows) == got | dict(judge=2.0, memory=None)
    assert set(race.medians(rows)) == set(race.FIGURES)


def test_a_race_of_iterators_that_never_step():
    assert list(race.race([iter(()), iter([SimpleNamespace()])]))[0][0] == 1

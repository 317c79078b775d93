"""sampling.py with exact denoisers: what is drawn is counted against what enumeration says, by chi-square."""

import collections
import itertools
import math

import pytest
import torch
import toys
from toys import KINDS, MARKOV, SOURCES, STEP, STRINGS, UNIGRAM, T, Toy, V, build, seeded, surprise

import diffusion
import sampling
from sampling import STRATEGIES, blocks, denoise, draw, filter_probs, forbid_repeats, risen

EVEN = dict(threshold=1.0, entropy_bound=0.0)  # no strategy decides more than its share
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
SKEW = torch.randn(6, 5, V, generator=seeded(3))  # logits of six states at five places


def skewed():
    """A denoiser that depends on how much is open, of any length."""
    return Toy(lambda x_t: SKEW[(x_t == V).sum(1) % 6][:, torch.arange(x_t.shape[1]) % 5])


def last(denoiser, x, **settings):
    return list(denoise(denoiser, x, **settings))[-1]


def holes(*rows):
    return torch.tensor([[V if c == "_" else int(c) for c in row] for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# one token


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -300.0, -math.inf])
    p = (logits.double() / temperature).exp()
    probs = filter_probs(logits.expand(40000, -1), temperature)
    torch.testing.assert_close(probs[0].double(), p / p.sum(), rtol=1e-5, atol=1e-7)
    counts = torch.bincount(draw(probs, seeded()), minlength=6)
    assert counts[4:].sum() == 0 and surprise(counts[:4], p[:4]) < 4


def test_draw_inverts_the_distribution_function(monkeypatch):
    """Given u, the token is the first whose cumulative probability exceeds it; never one of probability zero."""
    probs = torch.rand(2000, 7, generator=seeded(1)) * (torch.rand(2000, 7, generator=seeded(2)) < 0.5)
    probs[:, 3] += 0.1
    u = torch.rand(2000, 1, generator=seeded(), dtype=torch.float64)
    expected = []
    for p, limit in zip(probs.double().tolist(), u.flatten().tolist(), strict=True):
        expected.append(next(i for i in range(7) if sum(p[: i + 1]) > limit * sum(p)))
    drawn = draw(probs, seeded())
    assert drawn.tolist() == expected and (probs.gather(1, drawn[:, None]) > 0).all()
    for u, token in ((0.0, 1), (1.0, 2)):  # the ends: 1 - 2^-53 times the total may round up to the total
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **_: torch.full(size, u, dtype=torch.float64))
        assert draw(torch.tensor([[0.0, 0.4, 0.6, 0.0]])).tolist() == [token]


def test_top_k_and_top_p_keep_the_fewest():
    logits = 2 * torch.randn(300, 9, generator=seeded())
    p = logits.softmax(1)
    for k in (0, 1, 4, 9, 50):
        kept = filter_probs(logits, top_k=k) > 0
        assert (kept.sum(1) == (min(k, 9) or 9)).all()
        assert (p.masked_fill(~kept, 2).amin(1) >= p.masked_fill(kept, -1).amax(1)).all()
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        q = filter_probs(logits, top_p=top_p)
        mass, least = (p * (q > 0)).sum(1), p.masked_fill(q == 0, 2).amin(1)
        assert (mass >= top_p - 1e-6).all() and (mass - least < top_p).all()  # the crossing token stays, no other
        assert (least >= p.masked_fill(q > 0, -1).amax(1)).all()
        torch.testing.assert_close(q * mass[:, None], p * (q > 0))  # what is kept keeps its proportions
    torch.testing.assert_close(filter_probs(logits, top_p=1.0), p)
    exact = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert (filter_probs(exact, top_p=0.5) > 0).tolist() == [[True, False, False, False]]
    assert (filter_probs(exact, top_p=0.51) > 0).tolist() == [[True, True, False, False]]
    both = filter_probs(exact, 0.5, top_k=3, top_p=0.9)  # 16 : 4 : 1, of which 16 and 4 hold 0.95
    torch.testing.assert_close(both, torch.tensor([[0.8, 0.2, 0.0, 0.0]]))


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-39, 1e-10])
def test_temperature_towards_zero_is_argmax(temperature):
    logits = torch.randn(50, 9, generator=seeded())
    logits[:, 4] = -math.inf  # forbidden
    for settings in ({}, dict(top_k=3), dict(top_p=0.5)):
        probs = filter_probs(logits, temperature, **settings)
        torch.testing.assert_close(probs, torch.eye(9)[logits.argmax(1)])
    torch.testing.assert_close(filter_probs(logits, 1e39)[0], (torch.arange(9) != 4) / 8)  # and towards infinity, flat


# ---------------------------------------------------------------------------------------------------------------------
# whole strings


@each_strategy
@pytest.mark.parametrize("source", SOURCES)
def test_one_token_a_forward_draws_from_the_joint(strategy, source):
    """Any order that does not look at the token it is about to draw is exact: each conditional is the posterior's."""
    p, n = SOURCES[source], 20000
    denoiser = toys.oracle(p)
    step = last(denoiser, torch.full((n, T), V), strategy=strategy, steps=T, **EVEN, generator=seeded())
    assert step.forwards == len(denoiser.seen) == T
    assert surprise(torch.bincount(toys.code(step.x), minlength=81), p) < 4


def test_all_at_once_draws_from_the_product_of_the_marginals():
    step = last(toys.oracle(MARKOV), torch.full((20000, T), V), strategy="random", steps=1, generator=seeded())
    marginals = torch.stack([UNIGRAM @ torch.linalg.matrix_power(STEP, i) for i in range(T)])  # (T, V)
    assert surprise(torch.bincount(toys.code(step.x), minlength=81), marginals[torch.arange(T), STRINGS].prod(1)) < 4


def test_two_a_step_in_random_order_is_the_mixture_over_pairs():
    n, expected, denoiser = 20000, torch.zeros(81).double(), toys.oracle(MARKOV)
    for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        first = torch.zeros(T).bool().index_fill(0, torch.tensor(pair), True)
        likely = torch.ones(81).double()
        for mask, places in ((torch.ones(T).bool(), first), (~first, ~first)):
            probs = denoiser(STRINGS.masked_fill(mask, V)).softmax(2).gather(2, STRINGS[:, :, None]).squeeze(2)
            likely *= probs[:, places].prod(1)
        expected += likely / 6
    step = last(denoiser, torch.full((n, T), V), strategy="random", steps=2, generator=seeded())
    assert surprise(torch.bincount(toys.code(step.x), minlength=81), expected) < 4


@each_strategy
def test_infilling_draws_from_the_posterior(strategy):
    x, fits = holes("_1__").expand(10000, T), (STRINGS[:, 1] == 1).double()
    step = last(toys.oracle(MARKOV), x, strategy=strategy, steps=9, **EVEN, generator=seeded())
    assert step.forwards == 3 and surprise(torch.bincount(toys.code(step.x), minlength=81), MARKOV * fits) < 4
    possible = last(toys.oracle(MARKOV), x, strategy=strategy, steps=9, temperature=3.0, **EVEN, generator=seeded()).x
    assert (MARKOV[toys.code(possible)] > 0).all() and (possible[:, 1] == 1).all()


@pytest.mark.parametrize("strategy, expected", [
    ("left_to_right", [0, 1, 2, 3]), ("confidence", [2, 0, 3, 1]), ("dilated", [0, 2, 1, 3]),
    ("margin", [2, 3, 0, 1]), ("entropy", [2, 0, 3, 1])])  # fmt: skip
def test_order_of_each_strategy(strategy, expected):
    p = torch.tensor([[0.60, 0.39, 0.01], [0.35, 0.33, 0.32], [0.9, 0.05, 0.05], [0.5, 0.25, 0.25]])
    toy = Toy(lambda x_t: p.log().expand(len(x_t), T, V))
    order = [s.revealed[0].nonzero().item() for s in denoise(toy, holes("____"), strategy, 4, generator=seeded())]
    assert order == expected


def test_dilated_keeps_what_is_decided_together_apart():
    for n, steps, apart in ((16, 4, 4), (16, 8, 8), (64, 16, 16), (12, 6, 2)):
        for s in denoise(skewed(), torch.full((1, n), V), "dilated", steps, generator=seeded()):
            places = s.revealed[0].nonzero().flatten()
            assert len(places) == n // steps and places.diff().min() >= apart


def test_random_order_is_uniform():
    steps = list(denoise(toys.fixed(0.0, 0.0, 0.0), torch.full((6000, T), V), "random", 4, generator=seeded()))
    places = torch.stack([s.revealed.int().argmax(1) for s in steps], 1)  # (rows, T)
    counts = torch.bincount((places * 4 ** torch.arange(3, -1, -1)).sum(1), minlength=256)
    assert (counts > 0).sum() == 24 and surprise(counts[counts > 0], torch.ones(24)) < 4


# ---------------------------------------------------------------------------------------------------------------------
# the loop


@each_strategy
@pytest.mark.parametrize("steps", [1, 3, 5, 16, 100])
def test_every_step_does_its_share(strategy, steps):
    """Given tokens stay, MASK goes, each step reveals something, and rows of unequal holes end together or early."""
    x = holes("________________", "0_____1____2____", "0120120120120120", "_0_________1____", "01201201201_0120")
    before, denoiser = x.clone(), skewed()
    shown, wanted = x, (x == V).sum(1)
    forwards = min(steps, 16)
    for i, s in enumerate(denoise(denoiser, x, strategy, steps, **EVEN, generator=seeded())):
        assert torch.equal(x, before) and torch.equal(s.x[~s.revealed], shown[~s.revealed])
        assert (shown[s.revealed] == V).all() and (s.x[s.revealed] < V).all() and s.revealed.any()
        done = (wanted * (i + 1) // forwards).maximum(wanted.clamp(max=i + 1))  # the share, and at least one a step
        assert torch.equal((s.x == V).sum(1), wanted - done)
        assert s.forwards == i + 1 == len(denoiser.seen) and torch.equal(denoiser.seen[-1], shown)
        probs = denoiser.f(shown).softmax(2)
        sure = torch.where(s.revealed, probs.gather(2, s.x.clamp(max=V - 1)[:, :, None]).squeeze(2), probs.amax(2))
        torch.testing.assert_close(s.confidence, sure.masked_fill(shown != V, 1.0))
        shown = s.x
    assert s.forwards == forwards and (s.x < V).all()


def test_threshold_decides_all_that_is_sure_and_finishes_early():
    easy = toys.fixed(9.0, 0.0, 0.0)
    assert last(easy, torch.full((2, 12), V), strategy="threshold", steps=12).forwards == 1
    hard = last(toys.fixed(0.0, 0.0, 0.0), torch.full((2, 12), V), strategy="threshold", steps=12, generator=seeded())
    assert hard.forwards == 12  # at least one a step
    p = torch.tensor([0.95, 0.5, 0.91, 0.6, 0.89, 0.97])
    toy = Toy(lambda x_t: torch.stack([p, (1 - p) / 2, (1 - p) / 2], 1).log().expand(len(x_t), 6, 3))
    steps = list(denoise(toy, holes("______"), "threshold", 6, threshold=0.9, generator=seeded()))
    assert [s.revealed[0].nonzero().flatten().tolist() for s in steps] == [[0, 2, 5], [4], [3], [1]]


# ---------------------------------------------------------------------------------------------------------------------
# confidence_stop


@pytest.mark.parametrize("stop, shares", [
    (0.0, [1] * 6), (0.49, [6]), (0.55, [1, 1, 4]), (0.65, [1, 1, 1, 1, 2]), (0.88, [1, 1, 1, 1, 2]), (0.9, [1] * 6),
    (1.0, [1] * 6)])  # fmt: skip
def test_confidence_stop_waits_for_the_least_sure(stop, shares):
    """From the left, the least sure of what is open is 0.5, 0.5, 0.6, 0.6, 0.89, 0.97."""
    p = torch.tensor([0.95, 0.5, 0.91, 0.6, 0.89, 0.97])
    toy = Toy(lambda x_t: torch.stack([p, (1 - p) / 2, (1 - p) / 2], 1).log().expand(len(x_t), 6, 3))
    for temperature in (0, 1.0, 5.0):  # of the tokens, not of the places
        steps = list(denoise(toy, holes("______"), "left_to_right", 6, temperature, confidence_stop=stop))
        assert [int(s.revealed.sum()) for s in steps] == shares
        assert [s.forwards for s in steps] == list(range(1, len(shares) + 1))


def test_confidence_stop_means_surer():
    half, certain, x = toys.fixed(0.0, 0.0, -200.0), toys.fixed(200.0, 0.0, 0.0), holes("____")
    for toy, stop, forwards in ((half, 0.5, 4), (half, 0.4999, 1), (certain, 1.0, 4), (certain, 0.9999, 1)):
        assert last(toy, x, steps=4, confidence_stop=stop).forwards == forwards


@each_strategy
def test_confidence_stop_finishes_a_row_whose_open_places_are_all_sure(strategy):
    """Every row of every step against its own probabilities, place by place; otherwise it does its share."""
    x, denoiser, stop, early = holes("____________", "0___1_1_____", "_0___1__1__2", "012012012012"), skewed(), 0.5, 0
    shown, settings = x, dict(strategy=strategy, steps=8, temperature=2.0, **EVEN, confidence_stop=stop)
    for i, s in enumerate(denoise(denoiser, x, **settings, generator=seeded())):
        probs = denoiser.f(shown).softmax(2).amax(2).tolist()
        for b in range(4):
            places = [t for t in range(12) if shown[b, t] == V]
            wanted = int((x[b] == V).sum())
            share = max(wanted * (i + 1) // 8 - wanted + len(places), min(1, len(places)))
            sure = all(probs[b][t] > stop for t in places)
            early += sure and len(places) > share
            assert int(s.revealed[b].sum()) == (len(places) if sure else share)
        assert s.forwards == i + 1 == len(denoiser.seen)
        shown = s.x
    assert early >= 2 and (shown < V).all()


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "random"])  # whose noise the rows share
def test_confidence_stop_is_each_rows_own(strategy):
    """Step by step a row has in a batch the canvas that it has alone; the batch takes what its slowest row takes."""
    x = holes("____________", "0___1_1_____", "_0___1__1__2", "01201201201_", "012012012012")
    settings = dict(strategy=strategy, steps=8, temperature=0, **EVEN, confidence_stop=0.5)
    together, counts = list(denoise(skewed(), x, **settings)), []
    for b in range(5):
        alone = list(denoise(skewed(), x[b : b + 1], **settings))
        counts.append(alone[-1].forwards)
        for i, s in enumerate(together):
            assert torch.equal(s.x[b], alone[min(i, len(alone) - 1)].x[0])
    assert together[-1].forwards == len(together) == max(counts)
    early = [n < min(8, wanted) for n, wanted in zip(counts, (x == V).sum(1).tolist(), strict=True)]
    assert any(early) and len(set(counts)) >= 4, counts


@each_strategy
def test_confidence_stop_is_off_by_default(strategy):
    """Not given, 0, or out of reach: the same bits in every step, and the generator is left in the same state."""
    runs = []
    for settings in ({}, dict(confidence_stop=0.0), dict(confidence_stop=1.0)):
        g = seeded()
        steps = list(denoise(skewed(), torch.full((4, 12), V), strategy, 7, **EVEN, generator=g, **settings))
        assert steps[-1].forwards == len(steps) == 7
        runs.append([*(v for s in steps for v in (s.x, s.revealed, s.confidence)), g.get_state()])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@pytest.mark.parametrize("bound, shares", [
    (0.0, [1, 1, 1, 1]), (0.05, [1, 1, 1, 1]), (0.2, [2, 1, 1]), (0.7, [2, 1, 1]), (0.8, [3, 1]), (1.5, [3, 1]),
    (1.6, [4])])  # fmt: skip
def test_entropy_bounded_adds_up_entropies(bound, shares):
    """In sum 0.098, 0.735, 1.553: the last that is decided may cross the bound, the next may not come."""
    p = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.98, 0.02, 0.0], [0.7, 0.15, 0.15], [1 / 3, 2 / 3, 0.0]])
    entropies = [-sum(q * math.log(q) for q in row if q) for row in p.double().tolist()]
    assert [round(h, 3) for h in entropies] == [1.099, 0.098, 0.819, 0.637]
    toy = Toy(lambda x_t: p.log().clamp(min=-300).expand(len(x_t), T, V))
    steps = list(denoise(toy, holes("____"), "entropy_bounded", 4, entropy_bound=bound, generator=seeded()))
    assert [int(s.revealed.sum()) for s in steps] == shares
    assert steps[0].revealed[0, 1] and steps[-1].revealed[0, 0]  # the surest first


# ---------------------------------------------------------------------------------------------------------------------
# blocks


def prefixes(p):
    """An exact denoiser of canvases that are shorter than T too: what is not there is unknown."""
    whole = toys.oracle(p)
    return Toy(lambda x_t: whole.f(torch.nn.functional.pad(x_t, (0, T - x_t.shape[1]), value=V))[:, : x_t.shape[1]])


@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 9])
@each_strategy
def test_blocks_of_one_token_a_forward_draw_from_the_joint(strategy, block_length):
    denoiser, x = prefixes(MARKOV), torch.full((20000, T), V)
    steps = list(denoise(denoiser, x, strategy, T, **EVEN, block_length=block_length, generator=seeded()))
    assert surprise(torch.bincount(toys.code(steps[-1].x), minlength=81), MARKOV) < 4
    shown = x
    for i, (s, seen) in enumerate(zip(steps, denoiser.seen, strict=True)):  # nothing behind the block is shown
        end = min(T, (i // block_length + 1) * block_length)
        assert torch.equal(seen, shown[:, :end]) and not s.revealed[:, end:].any() and (s.x[:, end:] == V).all()
        assert torch.equal(s.confidence[:, end:], torch.zeros(20000, T - end))
        shown = s.x


@pytest.mark.parametrize("counts, steps, length, expected", [
    ([12], 6, 4, [2, 2, 2]), ([12], 7, 4, [2, 2, 3]), ([12], 3, 4, [1, 1, 1]), ([12], 12, 4, [4, 4, 4]),
    ([12], 99, 4, [4, 4, 4]), ([12], 5, 5, [2, 2, 1]), ([12], 5, 0, [5]), ([12, 3], 6, 4, [2, 2, 2]),
    ([2, 2, 2], 3, 6, [2]), ([9], 3, 4, [1, 1, 1])])  # fmt: skip
def test_steps_are_shared_out_over_blocks(counts, steps, length, expected):
    """Rows of 12 whose last n are open: blocks without any get no step, the others their share and at least one."""
    is_open = torch.stack([torch.arange(12) >= 12 - n for n in counts])
    plan = blocks(is_open, steps, length)
    assert [n for *_, n in plan] == expected
    assert plan[-1][1] == 12 and all((end - start <= length or not length) for start, end, _ in plan)
    assert all(is_open[:, start:end].any() for start, end, _ in plan)


def test_blocks_that_cannot_be():
    with pytest.raises(ValueError, match="2 steps cannot fill 3 blocks"):
        last(skewed(), torch.full((1, 12), V), steps=2, block_length=4)
    with pytest.raises(ValueError, match="behind a blank"):
        last(skewed(), holes("0__1__"), steps=6, block_length=2)
    lengths = torch.tensor([3, 6])  # what pads a short row is not given
    step = last(skewed(), holes("0__000", "0_____"), steps=6, block_length=2, lengths=lengths, generator=seeded())
    assert (step.x < V).all()


def watched(kind, **sizes):
    """A small model and the list of canvases that it will read."""
    model, read = build(kind, noise=0.5, **sizes).eval(), []
    model.embed.register_forward_pre_hook(lambda m, args: read.append(tuple(args[0].shape)))
    return model, read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, (16, 11, 13)])
def test_cached_blocks(kind, lengths):
    """With one layer, keys and values of the prefix depend on the prefix alone, and the cache is exact; with one
    forward a block it is made anew each time. Otherwise it drifts. Inner steps read only their block."""
    x = torch.full((3, 16), 11).index_fill(1, torch.arange(3), 5)
    if lengths is not None:
        lengths = torch.tensor(lengths)
        x[torch.arange(16) >= lengths[:, None]] = 0
    settings = dict(strategy="entropy", temperature=0, block_length=4, lengths=lengths)
    for layers, steps, same in ((1, 13, True), (2, 4, True), (2, 13, False)):
        model, read = watched(kind, n_layers=layers, **(dict(attn_every=0) if kind == "eco_hybrid" else {}))
        runs = [list(denoise(model, x, steps=steps, cache=c, **settings)) for c in (True, False)]
        confidences = [torch.stack([s.confidence for s in run]) for run in runs]
        if same or not model.can_cache:
            assert torch.equal(runs[0][-1].x, runs[1][-1].x)
            torch.testing.assert_close(*confidences, rtol=1e-4, atol=1e-5)
        else:
            assert (confidences[0] - confidences[1]).abs().max() > 1e-3
        widths, plan = [w for _, w in read], blocks(x == 11, steps, 4)
        whole = [end for _, end, n in plan for _ in range(n)]
        inner = [end if i == 0 else end - start for start, end, n in plan for i in range(n)]
        assert widths == (inner if model.can_cache else whole) + whole


def fresh(x, L, lengths=None, **settings):
    """(runs, widths, plan) of a model of two layers, trained with blocks, with a cache and without one."""
    model, read = watched("transformer", block_length=L)
    room = model.cache
    model.cache = lambda *shape: room(*shape).fill_(math.nan)  # what is not filled in is not read
    runs = [list(denoise(model, x, cache=c, lengths=lengths, generator=seeded(), **settings)) for c in (True, False)]
    return runs, [w for _, w in read], blocks(x == 11, settings["steps"], L, settings.get("remask", 0) > 0)


@each_strategy
@pytest.mark.parametrize("L", [1, 4, 7])
@pytest.mark.parametrize("given, lengths", [((0, 0, 0), None), ((6, 3, 5), None), ((6, 3, 5), (16, 11, 13))])
def test_the_cache_of_a_model_trained_with_blocks_is_exact(strategy, L, given, lengths):
    """Every step of every strategy; and each forward reads only what the cache does not hold yet: what stands before
    the first open block, then each block once more when it is done, with the next one."""
    x = torch.randint(11, (3, 16), generator=seeded())
    x[torch.arange(16) >= torch.tensor(given)[:, None]] = 11
    if lengths is not None:
        lengths = torch.tensor(lengths)
        x[torch.arange(16) >= lengths[:, None]] = 0
    for steps in (16, 40):
        (cached, plain), widths, plan = fresh(x, L, lengths, strategy=strategy, steps=steps)
        assert len(cached) == len(plain)
        for a, b in zip(cached, plain, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.revealed, b.revealed) and a.forwards == b.forwards
            torch.testing.assert_close(a.confidence, b.confidence, rtol=1e-4, atol=1e-5)
        if strategy in ("threshold", "entropy_bounded"):  # done before their steps are
            continue
        whole, first, held = [], [], 0
        for start, end, n in plan:
            whole += [end] * n
            first += [end - held] + [end - start] * (n - 1)
            held = start
        assert widths == first + whole


@pytest.mark.parametrize("settings", [
    dict(remask=0.5), dict(remask=0.3, loop=0.5), dict(confidence_stop=0.2), dict(eos_id=3),
    dict(no_repeat=2)])  # fmt: skip
def test_the_exact_cache_under_every_setting(settings):
    x = torch.full((4, 16), 11).index_fill(1, torch.arange(2), 5)
    (cached, plain), _, _ = fresh(x, 4, steps=24, **settings)
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a.x, b.x)
        torch.testing.assert_close(a.confidence, b.confidence, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_token_are_drawn_by_their_likelihood():
    """20,000 strings against exp(-T · bound), which is exact here."""
    model = build("transformer", 0.5, vocab_size=V, max_seq_len=T, block_length=1).eval()
    p = (-T * diffusion.bound(model, STRINGS).double()).exp()
    step = last(model, torch.full((20000, T), V), steps=T, generator=seeded())
    assert step.forwards == T and surprise(torch.bincount(toys.code(step.x), minlength=81), p) < 4


def test_blocks_of_the_model_are_taken_and_no_others():
    model, x = build("transformer", block_length=4).eval(), torch.full((1, 16), 11)
    runs = [last(model, x, steps=8, block_length=L, generator=seeded()) for L in (0, 4)]
    assert torch.equal(runs[0].x, runs[1].x) and torch.equal(runs[0].confidence, runs[1].confidence)
    for L in (2, 8):
        with pytest.raises(ValueError, match=f"block_length is {L}, .* with 4"):
            last(model, x, steps=8, block_length=L)
    with pytest.raises(ValueError, match="behind a blank"):
        last(model, x.index_fill(1, torch.tensor([7]), 0), steps=8)


# ---------------------------------------------------------------------------------------------------------------------
# hiding again


def hidden_again(p, steps, remask, loop):
    """Probability (81,) of every string, by following all 256 canvases through the steps of random order."""
    posterior = toys.oracle(p).f(torch.tensor(list(itertools.product(range(V + 1), repeat=T)))).double().softmax(2)
    now, (rises, rising) = {(V,) * T: 1.0}, risen(steps, loop)
    for i in range(steps):
        then = collections.defaultdict(float)
        still = i > 0 and rises[i] == rises[i - 1]
        for canvas, weight in now.items():
            closed = [t for t in range(T) if canvas[t] < V]
            opened, due = [t for t in range(T) if canvas[t] == V], T * rises[i] // rising
            may = closed if i < steps - 1 and (still or not loop) else []
            sigma = min(remask, (T - due) / max(1, len(closed)))
            probs = posterior[sum(c * 4 ** (T - 1 - t) for t, c in enumerate(canvas))].tolist()
            for hide in itertools.chain.from_iterable(itertools.combinations(may, n) for n in range(len(may) + 1)):
                w = weight * sigma ** len(hide) * (1 - sigma) ** (len(may) - len(hide))
                quota = min(max(0, due - len(closed) + len(hide)), len(opened))
                choices = list(itertools.combinations(opened, quota))
                for places in choices if w else ():
                    for tokens in itertools.product(range(V), repeat=quota):
                        v = w / len(choices) * math.prod(probs[t][c] for t, c in zip(places, tokens, strict=True))
                        if v:
                            new = dict(zip(places, tokens, strict=True)) | dict.fromkeys(hide, V)
                            then[tuple(new.get(t, canvas[t]) for t in range(T))] += v
        now = then
    return torch.tensor([now.get(tuple(s), 0.0) for s in STRINGS.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("steps, remask, loop", [(4, 0.5, 0.0), (6, 0.3, 0.0), (6, 1.0, 0.0), (7, 0.4, 0.5)])
def test_remasking_against_enumeration(steps, remask, loop):
    expected = hidden_again(MARKOV, steps, remask, loop)
    assert abs(float(expected.sum()) - 1) < 1e-9
    settings = dict(strategy="random", steps=steps, remask=remask, loop=loop, generator=seeded())
    step = last(toys.oracle(MARKOV), torch.full((20000, T), V), **settings)
    assert step.forwards == steps and surprise(torch.bincount(toys.code(step.x), minlength=81), expected) < 4


def test_a_loop_of_single_tokens_keeps_the_joint():
    """A token hidden alone and drawn again is a step of Gibbs sampling: what was right stays right."""
    p, x = MARKOV, torch.full((20000, T), V)
    drawn = hidden_again(p, 9, 0.02, 0.5)  # two at a time are rare
    assert float((drawn - p).abs().sum()) < 0.02
    step = last(toys.oracle(p), x, strategy="random", steps=9, remask=0.02, loop=0.5, generator=seeded())
    assert surprise(torch.bincount(toys.code(step.x), minlength=81), drawn) < 4


@pytest.mark.parametrize("steps, loop, expected, rising", [
    (4, 0.0, [1, 2, 3, 4], 4), (20, 0.5, [1, 2, 3, 4, 5, 6, 7, 8, 9] + [9] * 10 + [10], 10), (1, 0.9, [1], 1),
    (4, 0.5, [1, 1, 1, 2], 2)])  # fmt: skip
def test_the_schedule_of_a_loop(steps, loop, expected, rising):
    assert risen(steps, loop) == (expected, rising)


@each_strategy
def test_what_is_hidden_again_was_ours_and_returns(strategy):
    x = holes("________________", "0_____1____2____", "0120120120120120", "_0_________1____")
    shown, hidden = x, 0
    for s in denoise(skewed(), x, strategy, 8, remask=0.5, eos_id=2, **EVEN, generator=seeded()):
        again = (s.x == V) & (shown != V)
        hidden += int(again.sum())
        assert (x[again] == V).all() and (shown[again] != 2).all() and not (again & s.revealed).any()  # an end stays
        assert (s.confidence[again] == 0).all()
        shown = s.x
    assert hidden > 5 and (shown < V).all() and torch.equal(shown[x < V], x[x < V])


# ---------------------------------------------------------------------------------------------------------------------
# ends, and no n-gram twice


@each_strategy
@pytest.mark.parametrize("block_length", [0, 4])
def test_an_end_is_an_end(strategy, block_length):
    """Behind the first EOS drawn nothing is open, and what was is EOS, in the same step; none before min_new."""
    x = holes("0___________", "00000_______", "____________")
    denoiser, settings = toys.fixed(0.0, 0.0, 1.0), dict(block_length=block_length, eos_id=2, **EVEN, steps=12)
    for min_new in (0, 5, 12):
        shown = x
        for s in denoise(denoiser, x, strategy, min_new=min_new, **settings, generator=seeded(3)):
            for row, before, revealed, first in zip(s.x.tolist(), shown.tolist(), s.revealed, (1, 5, 0), strict=True):
                end = row.index(2) if 2 in row else 12
                assert end >= min(12, first + min_new) and V not in row[end:]
                filled = [t for t in range(end, 12) if before[t] == V]
                assert revealed[filled].all() and all(row[t] == 2 for t in filled)
            assert torch.equal(s.x[~s.revealed], shown[~s.revealed])
            shown = s.x
        assert (shown < V).all() and (min_new or s.forwards < 12) and (min_new < 12 or s.forwards == 12)
    x, steps = holes("0____1", "_____0"), dict(strategy=strategy, steps=5)  # in front of what was given it ends nothing
    texts = [last(denoiser, x, **steps, eos_id=eos_id, generator=seeded()).x for eos_id in (None, 2)]
    assert torch.equal(*texts) and (texts[0][:, :4] == 2).any()


def test_forbidden_repeats_are_those_that_repeat():
    """Against trying every token: the row's n-grams that have no hole are counted before and after."""
    x = torch.randint(4, (40, 9), generator=seeded())
    x[torch.rand(40, 9, generator=seeded(1)) < 0.3] = 3
    row, at = (x == 3).nonzero().unbind(1)
    for n in (2, 3, 4, 12):
        found = forbid_repeats(torch.zeros(len(row), 3), x, 3, row, at, n).isneginf()
        for i, (b, t) in enumerate(zip(row.tolist(), at.tolist(), strict=True)):
            repeats = []
            for v in range(3):
                text = x[b].tolist()
                whole = [tuple(text[s : s + n]) for s in range(9 - n + 1) if 3 not in text[s : s + n]]
                text[t] = v
                new = [tuple(text[s : s + n]) for s in range(9 - n + 1) if s <= t < s + n and 3 not in text[s : s + n]]
                repeats.append(any(gram in whole for gram in new))
            assert found[i].tolist() == ([False] * 3 if all(repeats) else repeats)
    assert torch.equal(forbid_repeats(torch.zeros(len(row), 3), x, 3, row, at, 12), torch.zeros(len(row), 3))


@each_strategy
def test_no_n_gram_twice(strategy):
    """One token a forward, 30 ids: no pair of tokens stands twice, where chance would repeat many."""
    toy = Toy(lambda x_t: torch.zeros(*x_t.shape, 30), V=30)
    for n, repeats in ((0, True), (2, False), (3, False)):
        settings = dict(strategy=strategy, steps=40, no_repeat=n, **EVEN, generator=seeded())
        x = last(toy, torch.full((20, 40), 30), **settings).x
        twice = []
        for row in x.tolist():  # at two places that do not overlap
            grams = [tuple(row[i : i + (n or 2)]) for i in range(41 - (n or 2))]
            twice.append(any(g in grams[i + (n or 2) :] for i, g in enumerate(grams)))
        assert any(twice) == repeats


# ---------------------------------------------------------------------------------------------------------------------
# edges


def test_nothing_to_fill():
    denoiser, x = skewed(), holes("0120", "2222")
    (step,) = denoise(denoiser, x, generator=seeded())
    assert step.forwards == len(denoiser.seen) == 0 and torch.equal(step.x, x) and not step.revealed.any()


@pytest.mark.parametrize("settings", [
    dict(steps=0), dict(steps=-3), dict(temperature=math.nan), dict(temperature=-0.1), dict(temperature=math.inf),
    dict(top_p=0.0), dict(top_p=1.1), dict(top_p=math.nan), dict(top_k=-1), dict(strategy="nonsense"),
    dict(confidence_stop=-0.1), dict(confidence_stop=1.1), dict(confidence_stop=math.nan), dict(remask=1.1),
    dict(remask=math.nan), dict(loop=0.5), dict(loop=-0.5, remask=0.1),
    dict(loop=1.0, remask=0.1), dict(block_length=-1), dict(min_new=-2),
    dict(no_repeat=1), dict(no_repeat=-1), dict(entropy_bound=-0.1), dict(entropy_bound=math.nan)])  # fmt: skip
def test_wrong_settings(settings):  # S3, S4
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        last(skewed(), holes("____"), **settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(bad):  # S5
    toy = Toy(lambda x_t: torch.zeros(*x_t.shape, V).masked_fill((x_t == 1)[:, :, None], bad))
    poisoned = Toy(lambda x_t: torch.zeros(*x_t.shape, V).index_fill(2, torch.tensor(1), bad))
    assert last(toy, holes("1___"), steps=1, temperature=0).x[0, 0] == 1  # only open places are looked at
    with pytest.raises(FloatingPointError, match="step 1"):
        last(poisoned, holes("1___"))


@each_strategy
def test_seeds(strategy):  # S6
    torch.manual_seed(0)
    before, x = torch.get_rng_state(), torch.full((8, 12), V)
    texts = [last(skewed(), x, strategy=strategy, steps=5, generator=seeded(s)).x for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.get_rng_state(), before)
    sure = [last(skewed(), x, strategy=strategy, steps=12, temperature=0, generator=seeded(s)).x for s in (1, 2)]
    if strategy != "random":  # whose order is drawn
        assert torch.equal(*sure)
    once = last(skewed(), x, strategy=strategy, steps=1, temperature=0, generator=seeded()).x
    assert torch.equal(once, skewed()(x).argmax(2))


@pytest.mark.parametrize("kind", ["transformer", "autoregressive"])
def test_who_observes_sees_the_models_probabilities_and_changes_nothing(kind):
    model, x, seen = build(kind), torch.full((2, 8), 11), []
    x[0, :3] = 4
    run = denoise if kind == "transformer" else sampling.write
    settings = dict(steps=3) if kind == "transformer" else {}
    plain = list(run(model, x, temperature=0.5, forbid=[2], generator=seeded(), **settings))
    observed = run(
        model, x, temperature=0.5, forbid=[2], generator=seeded(), observe=lambda *a: seen.append(a), **settings
    )
    before = x
    for step, same in zip(observed, plain, strict=True):
        probs, row, at = seen[-1]
        logits = model(before)[row, at]  # the twin's see only what stands before
        logits[:, 2] = -math.inf
        torch.testing.assert_close(probs, logits.softmax(1), rtol=1e-4, atol=1e-6)
        open_now = (before == 11).nonzero().tolist()
        here = [[r, t] for r, t in zip(row.tolist(), at.tolist(), strict=True)]
        assert here == open_now if kind == "transformer" else all(p in open_now for p in here)
        assert torch.equal(step.x, same.x) and torch.equal(step.confidence, same.confidence)
        before = step.x
    assert len(seen) == plain[-1].forwards


def test_forbidden_ids_never_come():
    x = torch.full((2000, 4), V)
    step = last(toys.fixed(0.5, 3.0, 1.0), x, forbid=(1,), steps=2, generator=seeded())
    counts = torch.bincount(step.x.flatten(), minlength=3)
    assert surprise(counts, torch.tensor([math.exp(0.5), 0.0, math.e])) < 4
    assert (last(toys.fixed(0.5, 3.0, 1.0), x, forbid=(1,), temperature=0).x == 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_not_see_each_other(kind):
    """Greedy rows of three lengths in one batch, against each row alone; MASK behind a row's end is filled unseen."""
    model, lengths = build(kind, noise=0.5).eval(), torch.tensor([16, 9, 12])
    x = torch.randint(11, (3, 16), generator=seeded())
    x[torch.rand(3, 16, generator=seeded(1)) < 0.6] = 11
    x[torch.arange(16) >= lengths[:, None]] = 0
    for strategy in ("confidence", "left_to_right"):
        together = last(model, x, strategy=strategy, steps=16, temperature=0, lengths=lengths).x
        for i, n in enumerate(lengths):
            assert torch.equal(
                last(model, x[i : i + 1, :n], strategy=strategy, steps=16, temperature=0).x[0], together[i, :n]
            )
        assert together.max() < 11 and torch.equal(together[x != 11], x[x != 11])

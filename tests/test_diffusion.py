"""diffusion.py against worlds that can be enumerated: every expectation is a sum over all strings and all masks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import toys
from toys import KINDS, MARKOV, MASK_PROBS, MASKS, SOURCES, STRINGS, T, Toy, V, build, seeded, surprise

import diffusion
from config import MaskConfig
from sampling import STRATEGIES, denoise

STRING = torch.tensor([[0, 1, 2, 0]])  # a string the Markov source can write
SCHEDULES = list(itertools.product(("linear", "cosine"), ("continuous", "discrete"), ("stratified", "uniform")))


def cfg(schedule="linear", mode="continuous", sampling="stratified", **rest):
    return MaskConfig(
        mask_schedule=schedule, time_mode=mode, timestep_sampling=sampling, **{"loss_weight": "elbo"} | rest
    )


def within(estimate, expected, error, sigmas=4):
    assert abs(float(estimate) - float(expected)) < sigmas * float(error), (estimate, expected, error)


def words(B, T, seed=0):
    return torch.rand(B, T, generator=seeded(seed)) < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# the bound


@pytest.mark.parametrize("source", SOURCES)
def test_bound_is_the_entropy_for_an_exact_denoiser_and_above_it_for_any_other(source):
    p = SOURCES[source]
    possible = p > 0
    entropy = -(p[possible] * p[possible].log()).sum() / T
    x0 = STRINGS[possible]
    exact = toys.costs(toys.oracle(p), x0) @ MASK_PROBS  # (strings,) the bound's expectation, by all 15 masks
    torch.testing.assert_close(exact, -p[possible].log() / T, rtol=0, atol=1e-9)
    wrong = toys.costs(toys.oracle(p, tilt=0.5), x0) @ MASK_PROBS
    assert (p[possible] * wrong).sum() > entropy + 0.05

    rows = x0.repeat(400, 1)
    for denoiser, expected in ((toys.oracle(p), exact), (toys.oracle(p, tilt=0.5), wrong)):
        nats = diffusion.bound(denoiser, rows, seeded()).view(400, -1).double()  # (draws, strings)
        z = (nats.mean(0) - expected) / (nats.std(0) / 20 + 1e-6)  # rows share strata: the error is an upper limit
        assert z.abs().max() < 5 and z.square().mean() < 2


@pytest.mark.parametrize("source", SOURCES)
def test_bound_of_given_masks_equals_the_enumeration(source):
    """hidden_nll and row_means on all 15 masks, against dense logits."""
    denoiser = toys.oracle(SOURCES[source], tilt=0.5)
    x0, masked = STRINGS.repeat_interleave(15, 0), MASKS.repeat(81, 1)
    nll, row = diffusion.hidden_nll(denoiser, x0.masked_fill(masked, V), masked, x0, chunk=100)
    means = diffusion.row_means(nll, row, len(x0)).view(81, 15).double()
    torch.testing.assert_close(means, toys.costs(denoiser, STRINGS), rtol=1e-5, atol=1e-5)


def test_every_row_draws_every_mask_as_often_as_it_should():
    """k uniform on 1..T in each row alone, and within one k every subset alike."""
    g, x0 = seeded(), STRINGS[[5, 40, 80, 7, 7]]
    drawn = torch.zeros(5, 16)
    for _ in range(2000):
        x_t, masked = diffusion.corrupt(x0, V, generator=g)
        assert torch.equal(x_t, torch.where(masked, V, x0))
        drawn[torch.arange(5), (masked * 2 ** torch.arange(T - 1, -1, -1)).sum(1)] += 1
    assert drawn[:, 0].sum() == 0
    for row in drawn:
        assert surprise(row[1:], MASK_PROBS) < 4


@pytest.mark.parametrize("T", [1, 2, 7, 100])
def test_counts_are_exact(T):
    k = torch.arange(1, T + 1)
    x0 = torch.zeros(T, T, dtype=torch.long)
    assert torch.equal(diffusion.corrupt(x0, V, k, seeded())[1].sum(1), k)
    drawn = diffusion.corrupt(x0, V, generator=seeded())[1].sum(1)  # T rows, T strata: each count once
    assert torch.equal(drawn.sort().values, k)


def test_a_mean_over_the_batch_is_no_bound():
    mean, _ = toys.by_count(toys.costs(toys.oracle(MARKOV), STRINGS[MARKOV > 0]))  # (strings, T) by k
    p, k = MARKOV[MARKOV > 0], torch.arange(1.0, T + 1).double()
    entropy = -(p * p.log()).sum() / T
    row_mean, batch_mean = p @ mean.mean(1), p @ (mean @ k) / k.sum()
    within(row_mean, entropy, 1e-9)
    assert batch_mean > 1.1 * entropy
    x0 = STRINGS[torch.multinomial(MARKOV, 40000, True, generator=seeded())]
    for weight, expected in (("elbo", row_mean), ("low_var", batch_mean)):
        losses = [
            diffusion.training_loss(toys.oracle(MARKOV), rows, cfg(loss_weight=weight), seeded(1))
            for rows in x0.split(1000)
        ]
        within(torch.stack(losses).mean(), expected, torch.stack(losses).std() / 40**0.5)


# ---------------------------------------------------------------------------------------------------------------------
# times, rates, weights


@pytest.mark.parametrize("schedule, low, high", list(itertools.product(("linear", "cosine"), (0.0, 0.2), (0.7, 1.0))))
def test_weight_is_the_slope_of_the_rate(schedule, low, high):
    n, h = 20000, 1e-6
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    rate, weight = diffusion.rate_and_weight(t, schedule, low, high)
    up, down = (diffusion.rate_and_weight(t + d, schedule, low, high)[0] for d in (h, -h))
    torch.testing.assert_close(weight, (up - down) / (2 * h) / (high - low), rtol=0, atol=1e-6)
    within(weight.mean(), 1, 1e-8)
    ends = diffusion.rate_and_weight(torch.tensor([0.0, 0.5, 1.0]), schedule, low, high)[0]
    torch.testing.assert_close(ends, torch.tensor([low, (low + high) / 2, high]))
    for levels in (1, 7, 1000):  # every level once, from a time within it
        t = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
        rate, weight = diffusion.rate_and_weight(t, schedule, low, high, levels)
        within(weight.mean(), 1, 1e-9)
        torch.testing.assert_close(rate, low + (high - low) * (weight.cumsum(0) / levels))  # r is the sum of its steps
        assert abs(rate[-1] - high) < 1e-9


@pytest.mark.parametrize("weight, strategy", list(itertools.product(("elbo", "low_var", "mix"), ("token", "span"))))
@pytest.mark.parametrize("schedule, mode, sampling", SCHEDULES)
def test_a_constant_model_costs_its_constant(schedule, mode, sampling, weight, strategy):
    x0, denoiser, constant = (
        torch.zeros(12, 10).long(),
        toys.fixed(0.3, 1.0, -2.0),
        math.log1p(math.exp(0.7) + math.exp(-2.3)),
    )
    for rates in ((0.0, 1.0), (0.2, 0.7)):
        c = cfg(schedule, mode, sampling, loss_weight=weight, masking_strategy=strategy, timesteps=20,
                min_mask_rate=rates[0], max_mask_rate=rates[1])  # fmt: skip
        for n in (1, 4):
            losses = [
                diffusion.training_loss(denoiser, x0[: 12 // n], c, seeded(3), (i, n), words(12 // n, 10))
                for i in range(n)
            ]
            within(torch.stack(losses).mean(), constant, 1e-6)


@pytest.mark.parametrize("schedule, mode, sampling", SCHEDULES)
def test_every_schedule_trains_the_bound(schedule, mode, sampling):
    """The weight undoes the schedule: the loss is what all masks, k uniform, give."""
    denoiser, x0 = toys.oracle(MARKOV, tilt=0.5), STRING.expand(4000, T)
    g, c = seeded(), cfg(schedule, mode, sampling, timesteps=1000)
    losses = torch.stack([diffusion.training_loss(denoiser, x0, c, g) for _ in range(20)]).double()
    within(
        losses.mean(), toys.costs(denoiser, STRING) @ MASK_PROBS, losses.std() / 20**0.5 + 2e-3 * (mode == "discrete")
    )


def hidden_counts(c, rows, T, seed=0, part=(0, 1), starts=None):
    """How many tokens training_loss hides in each row."""
    toy = toys.fixed(0.0, 0.0)
    diffusion.training_loss(toy, torch.zeros(rows, T).long(), c, seeded(seed), part, starts)
    return (toy.seen[-1] == toy.mask_id).sum(1)


@pytest.mark.parametrize("T", [7, 64, 100])
def test_discrete_levels_hide_exact_counts(T):
    """levels = T: each count once, though 0.07 · 100 is more than 7 in floating point."""
    assert hidden_counts(cfg(mode="discrete", timesteps=T), T, T).sort().values.tolist() == list(range(1, T + 1))
    assert hidden_counts(cfg(mode="discrete", timesteps=1), 5, T).tolist() == [T] * 5
    narrow = hidden_counts(cfg(min_mask_rate=0.3, max_mask_rate=0.5), 1000, T)
    assert narrow.min() == math.floor(0.3 * T) + 1 and narrow.max() == math.ceil(0.5 * T)


def test_times_are_uniform_in_every_row_and_one_a_slice():
    n, draws, g = 8, 2000, seeded()
    t = torch.stack([diffusion.draw_times(n, generator=g) for _ in range(draws)])  # (draws, n)
    assert t.min() > 0 and t.max() <= 1
    assert torch.equal((t * n).ceil().sort(1).values, torch.arange(1.0, n + 1).double().expand(draws, n))
    for row in t.T:
        assert surprise(torch.histc(row, 5 * n, 0, 1), torch.ones(5 * n)) < 4
    alone = torch.stack([diffusion.draw_times(n, "uniform", g) for _ in range(draws)])
    assert surprise(torch.histc(alone, 50, 0, 1), torch.ones(50)) < 4


def test_stratification_takes_away_the_variance_between_counts():
    """16 rows, 4 slices a count: independent times vary by count and by mask, stratified ones by mask alone."""
    denoiser, x0, draws = toys.oracle(MARKOV, tilt=0.5), STRING.expand(16, T), 1000
    mean, var = toys.by_count(toys.costs(denoiser, STRING))
    expected = {"uniform": (var.mean() + mean.var(correction=0)) / 16, "stratified": var.mean() / 16}
    assert expected["uniform"] > 1.4 * expected["stratified"]
    for sampling, variance in expected.items():
        g = seeded()
        losses = torch.stack([diffusion.training_loss(denoiser, x0, cfg(sampling=sampling), g) for _ in range(draws)])
        deviations = (losses - losses.mean()).double().square()
        within(deviations.mean(), variance, deviations.std() / draws**0.5)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_any_slice_of_a_step_hides_as_much_as_another(parts):
    rows, T = 32 // parts, 128
    shares = torch.stack([
        torch.stack([hidden_counts(cfg(sampling=s), rows, T, seed, (i, parts)).sum() for i in range(parts)])
        for s in ("stratified", "uniform") for seed in range(40)]).view(2, 40, parts) / (rows * T)  # fmt: skip
    assert abs(shares[1].std() / (1 / (12 * rows)) ** 0.5 - 1) < 0.25  # independent times: uniform's own deviation
    assert shares[0].std() < 0.4 / rows  # 1 / rows, where independent times have 0.29 / √rows
    assert shares[0].mean(1).std() < 1.5 * (1 / 12 / 32**3) ** 0.5  # whole step: one uniform draw in each of 32 slices


# ---------------------------------------------------------------------------------------------------------------------
# spans


def test_spans_hide_whole_words_until_k():
    B, T, g = 2000, 24, seeded()
    starts = words(B, T)
    k = torch.randint(1, T + 1, (B,), generator=g)
    masked = diffusion.hide_spans(torch.rand(B, T, generator=g), torch.rand(B, T, generator=g), k, starts, 3.0)
    starts[:, 0] = True
    word = starts.cumsum(1)  # (B, T) number of the word
    for row, hidden, n in zip(word, masked, k, strict=True):
        sizes, inside = torch.bincount(row), torch.bincount(row, hidden.double())
        assert ((inside == 0) | (inside == sizes)).all()
        count, longest = int(hidden.sum()), int(sizes[inside > 0].max())
        assert n <= count <= n + longest - 1


def test_spans_are_as_long_as_asked_and_reach_every_place():
    """Spans are memoryless, so k tokens begin 1 + (k - 1) / L of them; two neighbours look like one."""
    B, T, k, g = 300, 4000, 40, seeded()
    for L in (1.0, 3.0, 6.0):
        noise, coin = torch.rand(B, T, generator=g), torch.rand(B, T, generator=g)
        masked = diffusion.hide_spans(noise, coin, torch.full((B,), k), torch.ones(B, T).bool(), L)
        assert (masked.sum(1) == k).all()
        runs = (masked & ~F.pad(masked, (1, 0))[:, :-1]).sum(1).double()
        n = 1 + (k - 1) / L
        within(runs.mean(), n - n * (n - 1) / (T / L), runs.std() / B**0.5 + 0.05)
    noise, coin = torch.rand(2000, 16, generator=g), torch.rand(2000, 16, generator=g)
    for k in (1, 8, 16):
        masked = diffusion.hide_spans(noise, coin, torch.full((2000,), k), torch.ones(2000, 16).bool(), 3.0)
        assert masked.any(0).all()


# ---------------------------------------------------------------------------------------------------------------------
# the loss of real models


def hidden_by(model, c, x0, part=(0, 1), starts=None):
    """(loss, gradients, x_t) of one call of the training loss."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = model.loss(x0, c, seeded(5), part=part, starts=starts)
    hook.remove()
    return loss, torch.autograd.grad(loss, list(model.parameters())), seen[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [
    cfg(), cfg("cosine", sampling="uniform"), cfg(loss_weight="low_var"),
    cfg(mode="discrete", masking_strategy="span")])  # fmt: skip
def test_parts_of_a_step_make_the_one_big_batch(kind, c):
    model, starts = build(kind), words(8, 16)
    x0 = torch.randint(11, (8, 16), generator=seeded())
    loss, grads, x_t = hidden_by(model, c, x0, starts=starts)
    for n in (2, 4, 8):
        pieces = [
            hidden_by(model, c, x, (i, n), s) for i, (x, s) in enumerate(zip(x0.chunk(n), starts.chunk(n), strict=True))
        ]
        assert torch.equal(torch.cat([p[2] for p in pieces]), x_t)
        torch.testing.assert_close(sum(p[0] for p in pieces) / n, loss, rtol=1e-6, atol=0)
        for i, g in enumerate(grads):
            torch.testing.assert_close(sum(p[1][i] for p in pieces) / n, g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_head_is_the_dense_head(kind):
    """Losses and gradients of elbo and low_var against all logits; low_var is the plain mean over hidden tokens."""
    model = build(kind)
    x0 = torch.randint(11, (8, 16), generator=seeded())
    for weight in ("elbo", "low_var"):
        loss, grads, x_t = hidden_by(model, cfg(loss_weight=weight), x0)
        masked = x_t == model.mask_id
        nll = F.cross_entropy(model(x_t).flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)
        dense = nll[masked].mean() if weight == "low_var" else ((nll * masked).sum(1) / masked.sum(1)).mean()
        torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)
        for a, b in zip(grads, torch.autograd.grad(dense, list(model.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        where = masked.flatten().nonzero().squeeze(1)
        nats = [diffusion.hidden_nll(model, x_t, masked, x0, chunk)[0] for chunk in (1, 7, 4096)]
        for n in nats:
            torch.testing.assert_close(n, nll.flatten()[where], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_hidden_token_and_all_hidden_are_finite(kind):  # R4
    model = build(kind)
    x0 = torch.randint(11, (3, 16), generator=seeded())
    for masked in (
        torch.zeros(3, 16).bool(),
        torch.ones(3, 16).bool(),
        torch.eye(3, 16).bool() & (x0 >= 0).cumsum(0).eq(1),
    ):
        nll, row = diffusion.hidden_nll(model, x0.masked_fill(masked, 11), masked, x0)
        means = diffusion.row_means(nll, row, 3)
        assert len(nll) == masked.sum() and torch.isfinite(means).all()
        assert torch.equal(means > 0, masked.any(1))  # a row that hides nothing costs nothing
        for g in torch.autograd.grad(means.sum(), list(model.parameters())):
            assert torch.isfinite(g).all()


# ---------------------------------------------------------------------------------------------------------------------
# blocks


def blockwise(L, noise=0.5, **sizes):
    return build("transformer", noise, **dict(vocab_size=V, max_seq_len=T) | sizes, block_length=L).eval()


def block_costs(model, x0, L):
    """(p, cost, k), one a block, of x0 (B, T): all masks of the block, how likely each is, the mean cross-entropy of
    x0's tokens under it (B, masks) given clean blocks before, by plain forwards, and how many it hides."""
    for s in range(0, x0.shape[1], L):
        n = min(L, x0.shape[1] - s)
        masks = torch.tensor(list(itertools.product([False, True], repeat=n)))[1:]
        p = torch.tensor([1 / (n * math.comb(n, int(m.sum()))) for m in masks], dtype=torch.float64)
        canvas, cost = x0[:, : s + n], []
        for m in masks:
            x_t = canvas.masked_fill(F.pad(m, (s, 0)), model.mask_id)
            logp = model(x_t).log_softmax(2).gather(2, canvas[:, :, None]).squeeze(2)
            cost.append(-logp[:, s:][:, m].mean(1))
        yield p, torch.stack(cost, 1).detach().double(), masks.sum(1)


@pytest.mark.parametrize("L", [1, 2, 3, 4])
def test_the_bound_of_blocks_is_the_mean_over_all_their_masks(L):
    """And the training losses: elbo the same, low_var with every hidden token alike. L 3 leaves a rest of one."""
    model, x0 = blockwise(L), STRINGS[::4]
    blocks = list(block_costs(model, x0, L))
    sizes = [min(L, T - s) for s in range(0, T, L)]
    expected = sum(n / T * cost @ p for n, (p, cost, _) in zip(sizes, blocks, strict=True))  # (strings,)
    draws = diffusion.bound(model, x0.repeat(2000, 1), seeded()).view(2000, -1).double()
    z = (draws.mean(0) - expected) / (draws.std(0) / 2000**0.5 + 1e-6)
    assert z.abs().max() < 5 and z.square().mean() < 2
    low_var = sum((cost * k) @ p for p, cost, k in blocks).mean() / sum(float(p @ k.double()) for p, _, k in blocks)
    assert L == 1 or abs(low_var / expected.mean() - 1) > 1e-3
    for c, value in ((cfg(), expected.mean()), (cfg(loss_weight="low_var"), low_var), (cfg("cosine"), expected.mean())):
        g = seeded(1)
        losses = torch.stack([diffusion.training_loss(model, x0.repeat(20, 1), c, g).detach() for _ in range(30)])
        within(losses.mean(), value, losses.std() / 30**0.5 + 1e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_blocks_of_one_token_cost_the_likelihood_from_left_to_right(length):
    """T plain forwards, each of what stands before and a MASK; whatever the seed, as there is one mask."""
    model = blockwise(1, vocab_size=11, max_seq_len=16)
    x0 = torch.randint(11, (5, length), generator=seeded())
    chain = torch.zeros(5)
    for t in range(length):
        logp = model(F.pad(x0[:, :t], (0, 1), value=11))[:, t].log_softmax(1)
        chain -= logp.gather(1, x0[:, t : t + 1]).squeeze(1).detach() / length
    for seed in (0, 1):
        torch.testing.assert_close(diffusion.bound(model, x0, seeded(seed)), chain, rtol=1e-5, atol=1e-5)
        nats, hidden = diffusion.bound_windows(model, list(x0), 2, seed)
        torch.testing.assert_close(nats, chain[:, None].expand(5, 2), rtol=1e-5, atol=1e-5)
        assert (hidden == 1).all()
        for c in (cfg(), cfg(loss_weight="low_var"), cfg("cosine", min_mask_rate=0.5)):
            loss = model.loss(x0, c, seeded(seed)).detach()
            if c.mask_schedule == "linear":  # cosine weighs the blocks by their times
                torch.testing.assert_close(loss, chain.mean(), rtol=1e-5, atol=1e-5)


def test_the_likelihoods_of_all_strings_add_up_to_one():
    nats = diffusion.bound(blockwise(1), STRINGS, seeded()).double()
    assert abs(float((-T * nats).exp().sum()) - 1) < 1e-5
    for L in (2, 3, 4):  # a bound on -log p: less than all
        blocks = zip(block_costs(blockwise(L), STRINGS, L), range(0, T, L), strict=True)
        cost = sum(min(L, T - s) * cost @ p for (p, cost, _), s in blocks)
        assert 0.5 < float((-cost).exp().sum()) < 1 - 1e-4


@pytest.mark.parametrize("L", [16, 17, 99])
def test_one_block_is_the_plain_bound(L):
    model, plain = (blockwise(n, vocab_size=11, max_seq_len=16) for n in (L, 0))
    x0 = torch.randint(11, (8, 16), generator=seeded())
    assert torch.equal(*(diffusion.bound(m, x0, seeded(3)) for m in (model, plain)))
    for c in (cfg(), cfg("cosine", "discrete", masking_strategy="span")):
        assert torch.equal(*(m.loss(x0, c, seeded(3)) for m in (model, plain)))
    windows = [*x0, x0[0, :5]]
    for a, b in zip(*(diffusion.bound_windows(m, windows, 3) for m in (model, plain)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T, L", [(4, 2), (5, 3)])
def test_every_block_draws_every_mask_as_often_as_it_should(T, L):
    """Each alone: two of a step never share a slice of their times."""
    sizes = diffusion.block_sizes(blockwise(L), T)
    assert sizes.tolist() == [min(L, T - s) for s in range(0, T, L)]
    masks = torch.tensor(list(itertools.product([0, 1], repeat=T)))
    p = torch.ones(len(masks)).double()
    for block in masks.split(L, 1):
        n = block.shape[1]
        p *= torch.tensor([1 / (n * math.comb(n, k)) if k else 0.0 for k in block.sum(1).tolist()])
    drawn, g = torch.zeros(len(masks)), seeded()
    x0 = torch.randint(V, (1, T), generator=g)
    for _ in range(5000):
        x_t, masked = diffusion.corrupt(x0, V, generator=g, sizes=sizes)
        assert torch.equal(x_t, torch.where(masked, V, x0))
        drawn[int((masked[0] * 2 ** torch.arange(T - 1, -1, -1)).sum())] += 1
    for s, n in zip(range(0, T, L), sizes.tolist(), strict=True):
        inside = masks[:, s : s + n] @ 2 ** torch.arange(n - 1, -1, -1)
        count = torch.zeros(2**n).index_add(0, inside, drawn)
        assert surprise(count, torch.zeros(2**n).double().index_add(0, inside, p)) < 4


def test_counts_of_blocks_are_exact_and_stratified_over_a_step():
    sizes = diffusion.block_sizes(blockwise(8), 60)  # seven of 8 and one of 4
    k = (torch.rand(50, 8, generator=seeded()) * sizes).ceil().long()
    _, masked = diffusion.corrupt(torch.zeros(50, 60).long(), V, k, seeded(), sizes)
    assert torch.equal(torch.stack([m.sum(1) for m in masked.split(8, 1)], 1), k)
    noise = torch.full((3, 4096), 1 - 2**-24)  # the largest that torch.rand draws
    noise[:, 1::2] = torch.rand(3, 2048, generator=seeded())
    masked = diffusion.hide_tokens(noise, torch.full((3, 256), 5), 16)
    assert (masked.view(3, 256, 16).sum(2) == 5).all()

    model, seen = blockwise(4, max_seq_len=32), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for i in range(2):
        model.loss(torch.zeros(4, 32).long(), cfg(), seeded(2), part=(i, 2))
    hidden = (torch.cat(seen) == V).view(64, 4).sum(1)  # 8 rows of 8 blocks: each count in a quarter of the step's
    assert torch.bincount(hidden).tolist() == [0, 16, 16, 16, 16]
    assert (hidden.view(8, 8).amin(1) < hidden.view(8, 8).amax(1)).all()  # each block has its own time


@pytest.mark.parametrize("weight", ["elbo", "low_var", "mix"])
@pytest.mark.parametrize("schedule, mode, sampling", SCHEDULES)
def test_blocks_of_a_constant_model_cost_its_constant(schedule, mode, sampling, weight):
    denoiser, x0 = toys.fixed(0.3, 1.0, -2.0), torch.zeros(12, 10).long()
    denoiser.block_length, plain = 4, denoiser.forward
    denoiser.forward = lambda x_t, where, x0: plain(x_t, where)
    constant, c = math.log1p(math.exp(0.7) + math.exp(-2.3)), cfg(schedule, mode, sampling, loss_weight=weight)
    for n in (1, 4):
        losses = [diffusion.training_loss(denoiser, x0[: 12 // n], c, seeded(3), (i, n)) for i in range(n)]
        within(torch.stack(losses).mean(), constant, 1e-6)
    within(diffusion.bound(denoiser, x0, seeded()).mean(), constant, 1e-6)


@pytest.mark.parametrize("c", [cfg(), cfg("cosine", sampling="uniform"), cfg(loss_weight="low_var")])
def test_parts_of_a_step_of_blocks_make_the_one_big_batch(c):
    model, x0 = blockwise(5, vocab_size=11, max_seq_len=16), torch.randint(11, (8, 16), generator=seeded())
    loss, grads, x_t = hidden_by(model, c, x0)
    for n in (2, 8):
        pieces = [hidden_by(model, c, x, (i, n)) for i, x in enumerate(x0.chunk(n))]
        assert torch.equal(torch.cat([p[2] for p in pieces]), x_t)
        torch.testing.assert_close(sum(p[0] for p in pieces) / n, loss, rtol=1e-6, atol=0)
        for i, g in enumerate(grads):
            torch.testing.assert_close(sum(p[1][i] for p in pieces) / n, g, rtol=1e-4, atol=1e-6)


def test_bound_windows_of_blocks_is_unbiased_and_knows_short_windows():
    """Windows of 4 and 3 tokens in blocks of 2; the hidden fraction is what the model was shown."""
    model, seen = blockwise(2), []
    windows = [STRINGS[17]] * 1500 + [STRINGS[40, :3]] * 1500
    expected = [
        float(sum(min(2, len(w) - s) / len(w) * (cost @ p)[0] for s, (p, cost, _) in zip((0, 2), blocks, strict=True)))
        for w, blocks in ((w, list(block_costs(model, w[None], 2))) for w in (windows[0], windows[-1]))
    ]
    model.register_forward_pre_hook(lambda _, args: seen.append((args[0] == V).float().mean(1)))
    nats, hidden = diffusion.bound_windows(model, windows, 3, batch_size=1500)
    for half, value in zip(nats.double().split(1500), expected, strict=True):
        within(half.mean(), value, half.mean(1).std() / 1500**0.5)
    torch.testing.assert_close(hidden, torch.stack(seen).view(2, 3, 1500).transpose(1, 2).flatten(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# many windows


def test_bound_windows_scores_every_window_by_itself():
    """Each window is one token repeated, so that its bound is exactly that token's cost, whatever is hidden."""
    denoiser = toys.fixed(0.5, 0.0, -0.5, 1.0)
    cost = -torch.tensor([0.5, 0.0, -0.5, 1.0]).log_softmax(0)
    sizes = (10, 10, 10, 3, 10, 7)
    windows = [torch.full((n,), i % 4) for i, n in enumerate(sizes)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    nats, share = diffusion.bound_windows(denoiser, windows, 5, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(nats, cost[torch.arange(6) % 4][:, None].expand(6, 5))
    k = share * torch.tensor(sizes)[:, None]
    torch.testing.assert_close(k, k.round())
    for j in range(5):  # one mask in each fifth of 1..T
        assert (k[:, j].round() >= torch.tensor([n * j // 5 for n in sizes])).all()
        assert (k[:, j].round() <= torch.tensor([-(-n * (j + 1) // 5) for n in sizes])).all()
    shown = torch.cat([(x == denoiser.mask_id).sum(1) for x in denoiser.seen])
    assert sorted(shown.tolist()) == sorted(k.round().long().flatten().tolist())
    again = diffusion.bound_windows(denoiser, windows, 5, batch_size=2)
    assert torch.equal(again[0], nats) and torch.equal(again[1], share)
    assert not torch.equal(diffusion.bound_windows(denoiser, windows, 5, seed=1, batch_size=2)[1], share)


@pytest.mark.parametrize("masks", [1, 3, 16])
def test_bound_windows_is_unbiased(masks):
    denoiser = toys.oracle(MARKOV, tilt=0.5)
    expected = float(toys.costs(denoiser, STRING) @ MASK_PROBS)
    nats, share = diffusion.bound_windows(denoiser, [STRING[0]] * (6000 // masks), masks, batch_size=1000)
    within(nats.mean(), expected, nats.mean(1).std() / len(nats) ** 0.5)
    assert surprise(torch.bincount((share * T).round().long().flatten(), minlength=T + 1)[1:], torch.ones(T)) < 4


def test_the_loss_is_a_pure_function_of_its_generator():
    toy = Toy(lambda x_t: torch.zeros(*x_t.shape, V))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for c in (cfg(), cfg(sampling="uniform", masking_strategy="span")):
        for _ in range(2):
            diffusion.training_loss(toy, STRINGS, c, seeded(7))
        assert torch.equal(toy.seen[-1], toy.seen[-2])
    diffusion.bound(toy, STRINGS, seeded(7))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# the chain rule

ORDERS = {"None": None, **{name: score for name, score in STRATEGIES.items() if name != "random"}}
each_order = pytest.mark.parametrize("name", ORDERS)


def stepwise(denoiser, string, score):
    """-log p of one string, a place at a time in plain Python, and the order of places."""
    shown, nats, order = [V] * T, 0.0, []
    for _ in range(T):
        probs = denoiser(torch.tensor([shown]))[0].double().softmax(1)  # (T, V)
        places = [i for i in range(T) if shown[i] == V]
        scores = [float(score(probs[i : i + 1].float(), torch.tensor([i]), None)) for i in places] if score else [0]
        place = places[scores.index(max(scores))]
        nats -= math.log(probs[place, string[place]])
        shown[place] = string[place]
        order.append(place)
    return nats, order


@each_order
@pytest.mark.parametrize("source", SOURCES)
def test_chain_rule_of_an_exact_denoiser_is_the_logarithm_of_p_in_any_order(source, name):
    p = SOURCES[source]
    x0 = STRINGS[p > 0]
    nats = diffusion.chain_rule(toys.oracle(p), x0, ORDERS[name]) * T
    torch.testing.assert_close(nats, -p[p > 0].log(), rtol=0, atol=1e-5)


@each_order
def test_chain_rule_of_a_wrong_denoiser_is_a_likelihood(name):
    """Against the same sums by hand; and p sums to 1 over all strings, as no order that peeks at the answer does."""
    denoiser = toys.oracle(MARKOV, tilt=1.0)
    nats = diffusion.chain_rule(denoiser, STRINGS, ORDERS[name]) * T  # (81,)
    by_hand, orders = zip(*(stepwise(denoiser, s.tolist(), ORDERS[name]) for s in STRINGS), strict=True)
    torch.testing.assert_close(nats, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert nats.dtype == torch.float64 and abs(float((-nats).exp().sum()) - 1) < 1e-5
    ways = {tuple(order) for order in orders}
    fixed = {"None": (0, 1, 2, 3), "left_to_right": (0, 1, 2, 3), "dilated": (0, 2, 1, 3)}
    assert ways == {fixed[name]} if name in fixed else len(ways) >= 4
    for chunk in (1, 7):
        again = diffusion.chain_rule(denoiser, STRINGS, ORDERS[name], chunk) * T
        torch.testing.assert_close(again, nats, rtol=1e-6, atol=1e-6)


def test_of_equals_the_first_is_next():
    toy = toys.fixed(0.3, 1.0, 0.3)
    diffusion.chain_rule(toy, STRINGS, STRATEGIES["confidence"])
    for t, x_t in enumerate(toy.seen):
        assert torch.equal(x_t, STRINGS.masked_fill(torch.arange(T) >= t, V))


def test_the_bound_is_the_mean_of_the_chain_rule_over_all_orders():
    """So that the mixture of the orders costs less than the bound, and one order may cost less or more."""
    denoiser, costs = toys.oracle(MARKOV, tilt=0.5), []
    for order in itertools.permutations(range(T)):
        rank = torch.tensor(order).argsort()
        costs.append(diffusion.chain_rule(denoiser, STRINGS, lambda probs, position, g, rank=rank: -rank[position]))
    costs = torch.stack(costs)  # (24, 81)
    expected = toys.costs(denoiser, STRINGS) @ MASK_PROBS
    torch.testing.assert_close(costs.mean(0), expected, rtol=1e-5, atol=1e-5)
    assert costs.std(0).min() > 0.01
    mixture = -((-costs * T).exp().mean(0).log()) / T
    assert (mixture < expected).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["None", "confidence"])
def test_chain_rule_goes_the_samplers_way(kind, name):
    """The text that the sampler writes greedily is scored in the order in which it was written, and each forward sees
    what the sampler saw. Rows of a batch are scored as they are alone."""
    model, canvas = build(kind, noise=0.5).eval(), torch.full((3, 16), 11)
    strategy = "left_to_right" if name == "None" else name
    settings = dict(strategy=strategy, steps=16, temperature=0, threshold=1.0)
    steps = list(denoise(model, canvas, **settings))
    x0, seen = steps[-1].x, []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    nats = diffusion.chain_rule(model, x0, ORDERS[name])
    hook.remove()
    assert len(seen) == 16 and all(map(torch.equal, seen, [canvas, *(s.x for s in steps[:-1])]))
    log_p = sum((s.confidence * s.revealed).sum(1).double().log() for s in steps)
    torch.testing.assert_close(nats, -log_p / 16, rtol=1e-5, atol=1e-5)
    other = torch.randint(11, (5, 16), generator=seeded())
    before, together = other.clone(), diffusion.chain_rule(model, other, ORDERS[name])
    alone = torch.cat([diffusion.chain_rule(model, row[None], ORDERS[name]) for row in other])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(other, before) and not together.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# observers


@pytest.mark.parametrize("kind", KINDS)
def test_an_observer_sees_each_hidden_token_once_and_changes_nothing(kind):
    model, windows = build(kind).eval(), [torch.randint(11, (n,), generator=seeded(n)) for n in (16, 16, 16, 7)]
    forwards, seen = [], []
    hook = model.register_forward_hook(lambda _, args, logits: forwards.append(logits))
    plain = diffusion.bound_windows(model, windows, 5, batch_size=2)
    count = len(forwards)
    nats, hidden = diffusion.bound_windows(model, windows, 5, batch_size=2, observe=lambda *a: seen.append(a))
    hook.remove()
    assert torch.equal(nats, plain[0]) and torch.equal(hidden, plain[1]) and len(forwards) == 2 * count
    k = (hidden * torch.tensor([len(w) for w in windows])[:, None]).round().long()
    logits, target, share = (torch.cat(parts) for parts in zip(*seen, strict=True))
    T = torch.tensor([16, 16, 16, 7])[:, None]
    counts = dict(zip(*(v.tolist() for v in share.unique(return_counts=True)), strict=True))  # each share's own tokens
    assert counts == {s: int((k * (hidden == s)).sum()) for s in hidden.unique().tolist()} and T.sum() == 55
    assert len(target) == k.sum() and torch.equal(logits, torch.cat(forwards[count:]))
    for v in (logits, target):
        assert not v.requires_grad
    parts = []
    diffusion.token_nll(logits, target, chunk=7, observe=lambda *a: parts.append(a))
    assert len(parts) == -(-len(target) // 7) and all(len(l) == len(y) <= 7 for l, y in parts)
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), (logits, target)))
    total = (nats.double() * k).sum()  # row means times counts: the sum over all hidden tokens
    torch.testing.assert_close(F.cross_entropy(logits.double(), target, reduction="sum"), total, rtol=1e-5, atol=0)

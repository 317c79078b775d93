"""The causal twin: what it may see, that its likelihood is exact, and that what it writes is drawn from it."""

import math

import pytest
import torch
import toys
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import STRINGS, build, seeded, surprise

import checkpoint
import diffusion
from config import AutoregressiveConfig, MaskConfig, TransformerConfig
from model import GPT, Denoiser, Transformer, rotary_table, rotate
from sampling import filter_probs, write

V, T = 11, 16  # of toys.build


def gpt(**sizes):
    return build("autoregressive", **sizes).eval()


def small():
    """One of the toy world: V = 3, T = 4, with likelihoods far from uniform."""
    return gpt(vocab_size=toys.V, max_seq_len=toys.T, noise=0.5)


def text(B=3, length=T, seed=0):
    return torch.randint(V, (B, length), generator=seeded(seed))


def last(model, x, **settings):
    return list(write(model, x, **settings))[-1]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# a twin


def test_parameters_and_their_beginnings_are_the_transformers():
    """The same names and shapes, in the same order; from the same seed the same values, but for where heads look."""
    sizes, models = dict(vocab_size=50, max_seq_len=32, d_model=32, n_layers=3, n_heads=4, d_ff=48), []
    for config, model in ((TransformerConfig, Transformer), (AutoregressiveConfig, GPT)):
        torch.manual_seed(0)
        models.append(model(config(**sizes)))
    ours, theirs = (list(m.named_parameters()) for m in reversed(models))
    assert [(n, p.shape) for n, p in ours] == [(n, p.shape) for n, p in theirs]
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) == (not name.endswith("qkv.bias")), name
    assert not issubclass(GPT, Denoiser) and "autoregressive" not in toys.KINDS
    assert checkpoint.MODELS["autoregressive"] == (AutoregressiveConfig, GPT)
    with pytest.raises(ValueError, match="window is 4"):
        AutoregressiveConfig(window=4)


def test_heads_begin_at_the_places_before():
    """With nothing but its biases, head h looks most at -1, -2, -3, -4: a causal model has no use for 1."""
    attention, (cos, sin) = gpt(n_heads=4, d_model=64).blocks[0].attention, rotary_table(T, 16)
    attention.prefer_neighbours()
    q, k, _ = attention.qkv.bias.view(3, 4, 1, 16).expand(3, 4, T, 16)  # (H, T, D) each
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT  # (H, T, T)
    assert (scores[:, 8].argmax(1) - 8).tolist() == [-1, -2, -3, -4]


@pytest.mark.parametrize("length", [T, 12, 1])
def test_flops_are_those_that_run(length):
    model = gpt(d_model=24, n_heads=3).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(text(1, length))
    never_seen = length**2 - length * (length + 1) // 2  # pairs that the plain kernel computes and hides
    twice = 2 * 2 * 24 * 2 * never_seen  # layers, scores and their products with the values
    assert counter.get_total_flops() == model.flops(length, 3) + twice == model.flops(length) + twice
    assert counter.get_total_flops() == build("transformer", d_model=24, n_heads=3).flops(length, length)


# ---------------------------------------------------------------------------------------------------------------------
# what it sees, what it costs


def test_logits_of_a_token_see_all_before_it_and_nothing_else():
    """Exactly: another token j changes no logits up to j, and all behind it. In gradients too, BOS included."""
    model, x = gpt(), text()
    logits = model(x)
    assert logits.shape == (3, T, V)
    for j in range(T):
        other = x.clone()
        other[:, j] = (x[:, j] + 1) % V
        changed = (model(other) != logits).any(2)  # (B, T)
        assert not changed[:, : j + 1].any() and changed[:, j + 1 :].all(), j
    seen = []
    model.embed.register_forward_hook(lambda m, args, out: seen.append(out))
    logits = model(x[:1])
    for i in range(T):
        (g,) = torch.autograd.grad(logits[0, i].square().sum(), seen[0], retain_graph=True)
        assert (g[0].abs().sum(1) > 1e-7).tolist() == [j <= i for j in range(T)]  # BOS, x[0], ..., x[i - 1]
        assert (g[0, i + 1 :] == 0).all()


def test_head_is_tied_and_has_no_column_for_bos():
    model, x = gpt(), text()
    close(model.norm(model.trunk(x)) @ model.embed.weight[:V].T, model(x))
    where = torch.tensor([0, 5, 3 * T - 1])
    close(model(x, where), model(x).flatten(0, 1)[where])
    before = model(x)
    with torch.no_grad():
        model.embed.weight[V] += 1.0
    assert (model(x) != before).any(2).all()  # BOS is read everywhere, the first place too


def test_nll_is_the_product_of_conditionals():
    """Token by token, each from a pass over nothing but its own past, in float64."""
    model, x = gpt(), text(4, 9)
    by_hand = torch.zeros(4, dtype=torch.float64)
    for t in range(9):
        past = torch.cat((x[:, :t], torch.zeros(4, 1).long()), 1)  # what stands at t must not matter
        p = model(past)[:, t].double().softmax(1)
        by_hand -= p[torch.arange(4), x[:, t]].log()
    nats = model.nll(x)
    assert nats.shape == (4,) and not nats.requires_grad
    close(nats.double(), by_hand / 9)
    c = MaskConfig(masking_strategy="span", max_mask_rate=0.3)
    close(model.loss(x, c, seeded(), part=(1, 2), starts=x > 3), nats.mean())  # masks have no part in it
    parts = [model.loss(x[i : i + 1], c) for i in range(4)]
    close(sum(parts) / 4, model.loss(x, c))


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_likelihoods_of_all_strings_sum_to_one(length):
    strings = STRINGS[: toys.V**length, toys.T - length :]  # all that are so long
    assert len(strings.unique(dim=0)) == toys.V**length
    p = (-length * small().nll(strings).double()).exp()
    assert abs(p.sum() - 1) < 1e-5 and p.max() > 1.8 / len(p)  # and far from uniform


def test_nll_has_the_unit_of_the_bound():
    """A uniform model costs log V a token by either, whatever the length."""
    model = gpt(n_layers=1)
    with torch.no_grad():
        model.embed.weight.fill_(0.1)
    for length in (1, 7, T):
        close(model.nll(text(2, length)), torch.full((2,), math.log(V)))
        close(diffusion.bound(toys.fixed(*[0.0] * V), text(2, length)), torch.full((2,), math.log(V)))


# ---------------------------------------------------------------------------------------------------------------------
# writing


def surprise_of(x, p):
    """toys.surprise of strings x (n, T) under p (81,), the rare ones pooled with one that is not."""
    counts, p = torch.bincount(toys.code(x), minlength=81), p / p.sum()
    assert counts[p == 0].sum() == 0, "what was cut has come"
    order = p.argsort(descending=True)
    n = int((p * len(x) >= 20).sum()) - 1
    counts, p = (torch.cat((v[order[:n]], v[order[n:]].sum()[None])) for v in (counts, p))
    return surprise(counts, p) if n else 0.0  # one string is all there is


SETTINGS = [
    {},
    dict(temperature=0.5),
    dict(temperature=2.0, top_k=2),
    dict(top_k=1),
    dict(top_p=0.7),
    dict(temperature=1.3, top_p=0.97, forbid=(1,)),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_written_follows_the_likelihood(settings):
    """8,000 strings against the chain rule over all 81, each conditional from a full pass; what is cut never comes."""
    model, keys = small(), dict(settings)
    logits = model(STRINGS).flatten(0, 1).detach().index_fill(1, torch.tensor(keys.pop("forbid", ())).long(), -math.inf)
    p = filter_probs(logits, **keys).view(81, toys.T, toys.V).gather(2, STRINGS[:, :, None]).double().prod(1).flatten()
    if not settings:
        close(p, (-toys.T * model.nll(STRINGS).double()).exp())
    x = last(model, torch.full((8000, toys.T), toys.V), **settings, generator=seeded()).x
    assert surprise_of(x, p) < 4


def test_prompts_of_unequal_lengths_are_continued_by_their_own_conditionals():
    """Three prompts in one batch, each against the strings that begin with it; they stand as they were given."""
    model = small()
    p, prompts = (-toys.T * model.nll(STRINGS).double()).exp(), ([2], [0, 1, 1], [])
    x = torch.full((3, 4000, toys.T), toys.V)
    for row, prompt in zip(x, prompts, strict=True):
        row[:, : len(prompt)] = torch.tensor(prompt)
    written = last(model, x.view(-1, toys.T), generator=seeded()).x.view(x.shape)
    for row, prompt in zip(written, prompts, strict=True):
        fits = (STRINGS[:, : len(prompt)] == torch.tensor(prompt)).all(1)
        assert surprise_of(row, p * fits) < 4


def prompted(lengths=(3, 9, 0, 16), wanted=(9, 4, 16, 0), seed=1):
    """A canvas (B, T) of prompts and open places, id 0 behind each row's end."""
    x = torch.zeros(len(lengths), T).long()
    for row, n, m in zip(x, lengths, wanted, strict=True):
        row[:n], row[n : n + m] = text(1, n, seed)[0], V
    return x


@pytest.mark.parametrize("cuts", [[16], [1] * 16, [5, 1, 3, 7]])
def test_cached_logits_are_the_uncached(cuts):
    model, x, at = gpt(), text(), 0
    with torch.no_grad():
        logits, inputs = model(x), torch.cat((torch.full((3, 1), V), x), 1)  # BOS, x[0], ...
        cache = model.cache(3, T)
        cache.fill_(math.nan)  # what is not filled in is not read
        for n in cuts:
            close(model.extend(inputs[:, at : at + n], cache, at), logits[:, at + n - 1])
            at += n
    assert at == T


def greedy(model, x):
    """Without a cache: a full pass a place."""
    x = x.clone()
    for t in range(x.shape[1]):
        best = model(x.clamp(max=V - 1))[:, t].argmax(1)
        x[:, t] = torch.where(x[:, t] == V, best, x[:, t])
    return x


def test_cached_tokens_are_the_uncached_and_rows_do_not_see_each_other():
    model, x = gpt(noise=0.5), prompted()
    together = last(model, x, temperature=0).x
    assert torch.equal(together, greedy(model, x)) and len(together[x == V].unique()) > 3
    for i, n in enumerate((12, 13, 16, 16)):
        assert torch.equal(last(model, x[i : i + 1, :n], temperature=0).x[0], together[i, :n])
    with torch.autocast("cpu", torch.bfloat16):  # as the training loop samples
        assert last(model, x, temperature=0).x.max() < V


def test_every_step_writes_one_place_and_reads_each_token_once():
    model, x, read = gpt(), prompted(), []
    before, shown = x.clone(), x
    model.embed.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    steps = list(write(model, x, generator=seeded()))
    assert torch.equal(x, before) and [s.forwards for s in steps] == list(range(1, T + 1)) == list(
        range(1, len(read) + 1)
    )
    for t, s in enumerate(steps):  # the third row wants every place
        assert torch.equal(s.revealed, (x == V) & (torch.arange(T) == t))
        assert torch.equal(s.x[~s.revealed], shown[~s.revealed]) and s.x[s.revealed].max() < V
        p = model(s.x.clamp(max=V - 1)).softmax(2).gather(2, s.x.clamp(max=V - 1)[:, :, None]).squeeze(2)
        expected = torch.where(s.revealed, p, (s.x != V).float())
        close(s.confidence, expected.detach())
        shown = s.x
    assert shown.max() < V
    inputs = torch.cat(read[:T], 1)
    assert torch.equal(inputs, torch.cat((torch.full((4, 1), V), shown[:, :-1]), 1))


def test_places_that_no_row_wants_cost_no_forward():
    model = gpt()
    x = prompted((3, 10), (2, 3))
    steps = list(write(model, x, temperature=0))
    assert [s.revealed.any(0).nonzero().item() for s in steps] == [3, 4, 10, 11, 12]
    assert torch.equal(steps[-1].x, greedy(model, x)) and steps[-1].forwards == 5
    (step,) = write(model, text(2))
    assert step.forwards == 0 and torch.equal(step.x, text(2)) and not step.revealed.any()
    assert torch.equal(step.confidence, torch.ones(2, T))


def test_forbidden_ids_and_seeds():
    model, x = gpt(), torch.full((50, T), V)
    texts = [last(model, x, generator=seeded(s), forbid=(0, 7)).x for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert sorted(texts[0].unique().tolist()) == [i for i in range(V) if i not in (0, 7)]


def test_an_end_is_an_end():
    """Greedy with one id always likeliest: a row is filled behind it at once, unless something given stands there."""
    model = gpt()
    with torch.no_grad():
        model.embed.weight.zero_()[7] = 1.0
        model.norm.scale.fill_(1.0)
    model.trunk = model.read = lambda x, *args: torch.ones(*x.shape, model.config.d_model)
    x = prompted((3, 9, 2), (9, 4, 14))
    x[2, 9] = 4
    for min_new in (0, 3):
        steps = list(write(model, x, temperature=0, eos_id=7, min_new=min_new, lengths=torch.tensor([12, 13, 16])))
        final = steps[-1].x
        assert torch.equal(final[x < V], x[x < V]) and final.max() < V
        for b, (first, end) in enumerate(((3, 12), (9, 13), (2, 16))):
            assert (final[b, first : first + min_new] != 7).all()
            mine = (final[b, first + min_new : end] == 7) | (x[b, first + min_new : end] < V)
            assert mine.all()
    steps = list(write(model, prompted((3,), (9,)), temperature=0, eos_id=7, lengths=torch.tensor([12])))
    assert len(steps) == 1 and steps[0].revealed[0].tolist() == [3 <= t < 12 for t in range(T)]
    assert len(list(write(model, prompted((3,), (9,)), temperature=0, lengths=torch.tensor([12])))) == 9


def test_no_n_gram_twice():
    model, x = gpt(), torch.full((8, T), V)
    for n in (2, 3):
        free, kept = (last(model, x, temperature=0.3, no_repeat=k, generator=seeded()).x.tolist() for k in (0, n))
        twice = [[len({*g}) < len(g) for g in ([tuple(r[i : i + n]) for i in range(T + 1 - n)] for r in rows)]
                 for rows in (free, kept)]  # fmt: skip
        assert any(twice[0]) and not any(twice[1])


@pytest.mark.parametrize("settings", [
    dict(temperature=math.nan), dict(temperature=-0.1), dict(temperature=math.inf), dict(top_p=0.0), dict(top_p=1.1),
    dict(top_k=-1)])  # fmt: skip
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        last(gpt(), prompted(), **settings)


def test_what_cannot_be_written():
    with pytest.raises(ValueError, match="17.*16"):
        last(gpt(), torch.full((1, T + 1), V))
    broken = gpt()
    with torch.no_grad():
        broken.embed.weight[5, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1"):
        last(broken, prompted())

"""Inside: the holes are the forward process's, beliefs are the model's softmax, attention is what the model used."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from toys import build, fixed

import checkpoint
import diffusion
import inside

TEXT = "राम बाज़ार में गया था। सीता नदी के किनारे बैठी थी।"


@pytest.fixture(scope="module")
def loaded(trained):
    return checkpoint.load(trained)


@pytest.fixture(scope="module")
def x0(loaded):
    return torch.tensor([loaded.tokenizer.encode(TEXT)])[:, :32]


@pytest.mark.parametrize("spans", [False, True])
def test_a_slider_only_adds_holes(loaded, x0, spans):
    tokenizer, mask_id, T = loaded.tokenizer, loaded.denoiser.mask_id, x0.shape[1]
    before = torch.zeros_like(x0, dtype=torch.bool)
    for t in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        rate, x_t, masked = inside.hidden(x0, tokenizer, mask_id, t, spans=spans)
        k = math.ceil(t * T - 1e-9)
        assert rate == pytest.approx(t) and (masked | ~before).all()
        assert int(masked.sum()) == k if not spans else int(masked.sum()) >= k > 0 or k == int(masked.sum()) == 0
        assert torch.equal(x_t == mask_id, masked) and torch.equal(x_t[~masked], x0[~masked])
        before = masked
    assert masked.all()
    rate, _, masked = inside.hidden(x0, tokenizer, mask_id, 0.25, "cosine")
    assert rate == pytest.approx((1 - math.cos(math.pi / 4)) / 2) and int(masked.sum()) == math.ceil(rate * T)


def test_beliefs_are_the_models_softmax(loaded, x0):
    _, x_t, masked = inside.hidden(x0, loaded.tokenizer, loaded.denoiser.mask_id, 0.4)
    trace, holes = inside.believed(loaded, x0, x_t)
    with torch.no_grad():
        probs = loaded.denoiser(x_t).softmax(2)[0]  # (T, V)
    places = masked[0].nonzero().flatten().tolist()
    assert [h["position"] for h in holes] == places
    for h, at in zip(holes, places, strict=True):
        p = probs[at]
        assert h["probability"] == pytest.approx(float(p[x0[0, at]]), abs=1e-5)
        assert h["rank"] == p.argsort(descending=True).tolist().index(int(x0[0, at])) + 1
        assert h["entropy"] == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-3)
        top = trace.steps[1]["top"][str(at)][1]
        assert [i for i, _ in top] == p.topk(5).indices.tolist()
        assert [q for _, q in top] == pytest.approx(p.topk(5).values.tolist(), abs=1e-4)
        assert trace.steps[1]["tokens"][at] == top[0][0]
    assert len(trace.steps) == 2 and trace.steps[0]["tokens"] == x_t[0].tolist()
    assert inside.believed(loaded, x0, x0)[1] == []


def test_the_bound_of_a_constant_model_is_its_constant(loaded, x0):
    class Known:
        denoiser, tokenizer = fixed(*([0.0] * loaded.tokenizer.vocab_size)), loaded.tokenizer

    found = list(inside.settling(Known, x0, batches=4))
    exact = math.log2(loaded.tokenizer.vocab_size) * x0.shape[1] / len(loaded.tokenizer.decode(x0[0].tolist()))
    assert [m for m, *_ in found] == [8, 16, 24, 32] and found[0][2] is None
    assert all(bits == pytest.approx(exact, rel=1e-5) for _, bits, _ in found)
    assert all(error < 1e-5 for *_, error in found[1:])


def test_the_bound_settles_where_the_bound_is(loaded, twin, x0):
    *_, (masks, bits, error) = inside.settling(loaded, x0, batches=24)
    nats = diffusion.bound_windows(loaded.denoiser, [x0[0]], 256, seed=5)[0].double().mean()
    other = float(nats) / math.log(2) * x0.shape[1] / len(loaded.tokenizer.decode(x0[0].tolist()))
    assert masks == 192 and 0 < error < 0.2 * bits and abs(bits - other) < 5 * error + 0.01 * bits
    assert list(inside.settling(checkpoint.load(twin), x0))[0][::2] == (0, 0.0)  # exact


def test_the_error_is_that_of_a_mean_of_independent_batches(monkeypatch, loaded, x0):
    values = iter((1.0, 2.0, 4.0))
    monkeypatch.setattr(diffusion, "bound", lambda *args: torch.full((8,), next(values)))
    (_, one, _), _, (masks, bits, error) = inside.settling(loaded, x0, batches=3)
    assert masks == 24 and bits == pytest.approx(7 / 3 * one)
    assert error == pytest.approx(one * statistics.stdev((1, 2, 4)) / math.sqrt(3))


def test_attention_weights_are_those_of_pytorch():
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()  # (B, H, T, D)
    keys = torch.rand(2, 1, 1, 6) > 0.3
    keys[..., 0] = True
    for how in ({}, dict(is_causal=True), dict(attn_mask=keys), dict(attn_mask=torch.randn(6, 6)), dict(scale=0.1)):
        weights = inside.attention_weights(q, k, v, **how)
        assert torch.allclose(weights @ v, F.scaled_dot_product_attention(q, k, v, **how), atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer", "autoregressive", "eco_hybrid"])
def test_looks_sees_every_layer_and_changes_nothing(kind):
    more = dict(memory_slots=4, attn_every=2, n_layers=4) if kind == "eco_hybrid" else {}
    model = build(kind, **more).eval()
    x = torch.randint(0, 11, (1, 12), generator=torch.Generator().manual_seed(0))
    before = model(x)
    found = inside.looks(model, x)
    assert torch.equal(model(x), before) and not any(b._forward_pre_hooks for b in model.blocks)
    shapes = {"attention": (12, 12), "write": (4, 13), "think": (4, 4), "read": (12, 4)}
    for _, part, weights in found:
        assert weights.shape[1:] == shapes[part]
        assert torch.allclose(weights.sum(2), torch.ones(weights.shape[:2]), atol=1e-4)
    parts = [(layer, part) for layer, part, _ in found]
    if kind == "eco_hybrid":  # every second layer is attention, from the second on
        own = [(layer, part) for layer in (0, 2) for part in ("write", "think", "read")]
        assert sorted(parts) == sorted([*own, (1, "attention"), (3, "attention")])
    else:
        assert parts == [(0, "attention"), (1, "attention")]
    causal = [bool((w.triu(1) == 0).all()) for _, part, w in found if part == "attention"]
    assert all(causal) if kind == "autoregressive" else not any(causal)

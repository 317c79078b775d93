"""What is EcoHybrid's own: convolution, slots, anchors, matched sizes. test_model.py runs on it too."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from toys import build, seeded

from config import PRESETS, EcoHybridConfig, TransformerConfig
from eco_hybrid import Depthwise, EcoBlock, EcoHybrid
from model import Transformer

V = 11  # of toys.build


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def slots_of(model, x, layer=0):
    """Slots (B, M, C) behind a layer."""
    seen = []
    hook = model.blocks[layer].register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[2]))
    model(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_depthwise_is_a_grouped_convolution(k):
    x, kernel = torch.randn(2, 9, 6, generator=seeded()), torch.randn(k, 6, generator=seeded(1))
    conv = nn.Conv1d(6, 6, k, padding=k // 2, groups=6, bias=False)
    conv.weight.data = kernel.T[:, None].clone()
    inputs = [v.clone().requires_grad_() for v in (x, x)]
    kernel.requires_grad_()
    ours, theirs = Depthwise.apply(inputs[0], kernel), conv(inputs[1].mT).mT
    close(ours, theirs)
    weight = torch.randn(ours.shape, generator=seeded(2))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    close(inputs[0].grad, inputs[1].grad)
    close(kernel.grad, conv.weight.grad[:, 0].T)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("own", [{}, dict(attn_every=0), dict(attn_every=3, memory_slots=8), dict(conv_kernel=15)])
def test_as_many_parameters_as_the_transformer_of_the_same_flags(preset, own):
    names = {f.name for f in dataclasses.fields(TransformerConfig)}
    sizes = {k: v for k, v in PRESETS[preset].items() if k in names}
    sizes |= dict(vocab_size=1024 if preset == "tiny" else 8192, max_seq_len=64)
    with torch.device("meta"):
        eco, plain = EcoHybrid(EcoHybridConfig(**sizes, **own)), Transformer(TransformerConfig(**sizes))
    n = [sum(p.numel() for p in model.parameters()) for model in (eco, plain)]
    assert abs(n[0] / n[1] - 1) < 0.005


@pytest.mark.parametrize("every, full", [(0, []), (2, [1, 3, 5]), (3, [1, 4]), (4, [2]), (9, [4])])
def test_which_layers_see_everything(every, full):
    model = build("eco_hybrid", n_layers=6, attn_every=every)
    assert [i for i, block in enumerate(model.blocks) if not isinstance(block, EcoBlock)] == full


def test_cost_is_linear_in_length_without_full_layers():
    for every in (0, 2):
        model = build("eco_hybrid", n_layers=2, attn_every=every)
        a, b, c = (model.flops(T, 0) for T in (100, 200, 300))
        assert (c - b == b - a) == (every == 0)


def test_slots_are_written_from_visible_tokens_alone():
    model = build("eco_hybrid")
    x = torch.randint(V, (1, 16), generator=seeded())
    x[0, 4:9] = V
    before = slots_of(model, x)
    with torch.no_grad():
        model.embed.weight[V] += 3.0  # what a hole looks like
    close(slots_of(model, x), before, 0)
    x[0, 12] = (x[0, 12] + 1) % V
    assert (slots_of(model, x) - before).abs().max() > 1e-3


def test_where_nothing_is_visible_the_slots_only_think():
    model = build("eco_hybrid")
    holes = slots_of(model, torch.full((2, 16), V))
    block, slots = model.blocks[0], model.slots[None]
    q, k, v = block.think_qkv(block.norm_think(slots)).chunk(3, -1)
    slots = slots + block.think_out(block.attend(q, k, v))
    slots = slots + block.slot_ff(block.norm_slot_ff(slots))
    close(holes, slots.expand(2, -1, -1))
    empty = model(torch.zeros(1, 16).long(), lengths=torch.tensor([0]))  # a row that holds nothing at all
    assert torch.isfinite(empty).all()


def test_anchors_and_slopes():
    model = build("eco_hybrid", memory_slots=4, n_heads=4, d_model=32)  # 16 places: anchors 2, 6, 10, 14
    for h, t, m, value in ((0, 2, 0, 0.0), (0, 6, 0, -2.0), (1, 2, 3, -3.0), (2, 13, 1, -0.5 * 7 / 4), (3, 15, 0, 0.0)):
        assert model.near[h, t, m].item() == pytest.approx(value), (h, t, m)
    assert model.near.shape == (4, 16, 4)


def test_a_far_token_is_seen_through_the_slots():
    """Two layers of three taps reach 2 places; token 0 and place 63 know of each other by the slots alone."""
    model = build("eco_hybrid", max_seq_len=64, conv_kernel=3, attn_every=0)
    x = torch.randint(V, (1, 64), generator=seeded())
    x[0, 63] = V
    other = x.clone()
    other[0, 0] = (x[0, 0] + 1) % V
    assert (model(x)[0, 63] - model(other)[0, 63]).abs().max() > 1e-3
    for block in model.blocks:
        block.read_out.weight.data.zero_()
    close(model(x)[0, 63], model(other)[0, 63], 0)


def test_channels_begin_as_neighbours_and_gates_open():
    block = EcoHybrid(EcoHybridConfig(5, 8, d_model=28, n_layers=1, n_heads=2, d_ff=64, conv_kernel=7)).blocks[0]
    x = torch.randn(1, 8, 28, generator=seeded())
    y = Depthwise.apply(x, block.kernel)[0, 4]
    places = [min(range(8), key=lambda t: abs(x[0, t, c] - y[c]).item()) - 4 for c in range(28)]
    assert {o: places.count(o) for o in set(places)} == {-1: 8, 1: 8, -2: 4, 2: 4, 0: 4}
    u, gate = block.mix_in(block.norm_mix(x)).chunk(2, -1)
    close(2 * gate.sigmoid(), torch.ones_like(gate), 0)
    assert u.abs().max() > 0
    for k in (1, 3):
        block = EcoHybrid(EcoHybridConfig(5, 8, d_model=28, n_layers=1, n_heads=2, d_ff=64, conv_kernel=k)).blocks[0]
        assert block.kernel.sum(0).tolist() == [1.0] * 28


def test_convolution_by_hand():
    """One layer whose slots and SwiGLU are silent: x + W_out(2 σ(gate) · Σ_i kernel_i · u_{t + i - 1})."""
    model = build("eco_hybrid", n_layers=1, conv_kernel=3, attn_every=0).eval()
    block = model.blocks[0]
    for silent in (block.read_out, block.ff.down):
        silent.weight.data.zero_()
    x_t = torch.randint(V + 1, (1, 16), generator=seeded())
    x = model.embed(x_t)[0]
    h = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * block.norm_mix.scale
    u, gate = h @ block.mix_in.weight[:16].T, h @ block.mix_in.weight[16:].T
    expected = []
    for t in range(16):
        total = sum(block.kernel[i] * u[t + i - 1] for i in range(3) if 0 <= t + i - 1 < 16)
        expected.append(x[t] + block.mix_out.weight @ (2 / (1 + torch.exp(-gate[t])) * total))
    close(model.trunk(x_t)[0], torch.stack(expected))


def test_what_the_first_convolution_moves_reaches_the_other_layers(monkeypatch):
    """Layers: convolution, full, convolution. Each takes its own values and those of the first by its two shares."""
    model, moved, own, attended = build("eco_hybrid", n_layers=3, attn_every=2), [], [], []
    depthwise = Depthwise.apply
    monkeypatch.setattr(Depthwise, "apply", lambda u, kernel: moved.append(u) or depthwise(u, kernel))
    for i in (0, 2):
        model.blocks[i].mix_in.register_forward_hook(lambda layer, given, out: own.append(out[..., :16]))
    model.blocks[1].attention.register_forward_hook(lambda layer, given, out: attended.append(out[1]))
    model(torch.randint(V, (2, 16), generator=seeded()))
    a, b = model.blocks[2].shares.tolist()
    assert model.blocks[0].shares is None and model.blocks[1].attention.shares is not None and abs(a - b) > 0.05
    close(moved[0], own[0], 0)
    close(moved[1], a * own[1] + b * own[0])
    close(attended[0].transpose(1, 2).flatten(2), own[0], 0)


def test_what_is_refused():
    for wrong in (
        dict(memory_slots=1),
        dict(conv_kernel=4),
        dict(conv_kernel=-1),
        dict(attn_every=-1),
        dict(attn_every=1),
        dict(window=4),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            build("eco_hybrid", **wrong)


def test_scores_of_writing_by_hand():
    """Slot m's share of each visible token: softmax of q·k / √D - slope · distance, with a key of zeros beside them."""
    model = build("eco_hybrid", memory_slots=4).eval()
    block, x_t = model.blocks[0], torch.tensor([[3, V, 5, 1, V, V, 7, 2]])
    h = block.norm_mix(model.embed(x_t))[0]
    q = block.write_q(block.norm_write(model.slots))  # (M, A)
    k, v = block.write_kv(h).chunk(2, -1)  # (T, A)
    D, out = q.shape[1] // 2, []
    for head, slope in ((0, 2.0), (1, 0.0)):
        part = slice(head * D, (head + 1) * D)
        for m in range(4):
            scores = {t: (q[m, part] @ k[t, part] / math.sqrt(D)).item() - slope * abs(t - (m + 0.5) * 4) / 4
                      for t in range(8) if x_t[0, t] != V}  # fmt: skip
            total = 1 + sum(math.exp(s) for s in scores.values())
            out.append(sum(math.exp(s) / total * v[t, part] for t, s in scores.items()))
    written = torch.cat((torch.stack(out[:4]), torch.stack(out[4:])), 1)  # (M, A)
    slots = model.slots + block.write_out(written)
    q, k, v = block.think_qkv(block.norm_think(slots[None])).chunk(3, -1)
    slots = slots + block.think_out(block.attend(q, k, v))
    close(slots_of(model, x_t), slots + block.slot_ff(block.norm_slot_ff(slots)))

"""variants.py: without flags the Transformer; each part against the same thing written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
import toys

from config import TransformerConfig, VariantConfig
from model import Transformer
from variants import Variant, VariantAttention

V, T, C, H, L = 11, 16, 16, 2, 2  # sizes of toys.build
X = torch.randint(V + 1, (3, T), generator=toys.seeded())


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def attention(**flags):
    """One layer's attention (not the first), every parameter moved away from where it starts, and an input."""
    flags = dict(values="own") | flags
    config = VariantConfig(vocab_size=V, max_seq_len=T, d_model=C, n_layers=L, n_heads=H, d_ff=24, **flags)
    layer, g = VariantAttention(config, first=False), toys.seeded(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return layer, torch.randn(2, T, C, generator=g)


def by_hand(layer, x, bias=0.0, values=lambda v: v, gate=None, norm=lambda z: z):
    """Attention without rotary positions, in loops: (B, T, C)."""
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(C, dim=2)
    out, D = [], C // H
    for h in range(H):
        part = slice(h * D, (h + 1) * D)
        scores = norm(q[..., part]) * layer.norm_q.scale @ (norm(k[..., part]) * layer.norm_k.scale).mT / math.sqrt(D)
        y = (scores + (bias[h] if torch.is_tensor(bias) else bias)).softmax(2) @ values(v)[..., part]
        out.append(y if gate is None else y * gate[..., h : h + 1])
    return torch.cat(out, 2) @ layer.out.weight.T


def rms(z):
    return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def run(layer, x, bias=None, first=None):
    first = torch.zeros(2, H, T, C // H) if first is None else first
    return layer(x, None, None, bias, first)[0]


def test_without_flags_it_is_the_transformer():
    ours, theirs = toys.build("variant"), toys.build("transformer")
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    close(ours(X), theirs(X))
    lengths = torch.tensor([16, 9, 1])
    inside = torch.arange(T) < lengths[:, None]
    close(ours(X, lengths=lengths)[inside], theirs(X, lengths=lengths)[inside])


def test_attention_without_rotary_positions_and_without_norms():
    layer, x = attention(positions="none")
    close(run(layer, x), by_hand(layer, x, norm=rms))
    layer, x = attention(positions="none", norm="no_qk")
    close(run(layer, x), by_hand(layer, x))


def test_gate_and_value_residual():
    layer, x = attention(positions="none", norm="no_qk", attention_gate=True)
    close(run(layer, x), by_hand(layer, x, gate=2 / (1 + (-(x @ layer.gate.weight.T)).exp())))
    layer, x = attention(positions="none", norm="no_qk", values="mixed")
    first = torch.randn(2, H, T, C // H, generator=toys.seeded(2))
    a, b = layer.shares.tolist()
    flat = first.transpose(1, 2).flatten(2)
    close(run(layer, x, first=first), by_hand(layer, x, values=lambda v: a * v + b * flat))


def test_the_first_layer_s_values_reach_the_others():
    model = toys.build("variant", n_layers=3)
    seen = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda layer, given, out: seen.append((given[4], out[1])))
    model(X)
    assert seen[0][0] is None and seen[1][0] is seen[2][0] is seen[0][1]
    assert model.blocks[0].attention.shares is None and model.blocks[1].attention.shares is not None


def test_relative_positions_see_offsets_alone():
    """The bias is a table of the offset key − query; a model of nothing else shifts with its input."""
    model = toys.build("variant", positions="relative", max_seq_len=64)
    seen = []
    model.blocks[0].attention.register_forward_hook(lambda layer, given, out: seen.append(given[3]))
    model(X)
    for i, j, h in ((0, 0, 0), (3, 7, 1), (15, 0, 0)):
        assert seen[0][0, h, i, j] == model.offsets[h, j - i + 63]
    layer, x = attention(positions="none", norm="no_qk")
    close(run(layer, x, bias=seen[0][..., :T, :T]), by_hand(layer, x, bias=seen[0][0]))
    fresh = Variant(
        VariantConfig(vocab_size=V, max_seq_len=8, d_model=8, n_layers=1, n_heads=4, d_ff=8, positions="relative")
    )
    assert [int(row.argmax()) - 7 for row in fresh.offsets] == [-1, 1, -2, 2]  # as the heads of the Transformer begin


@pytest.mark.parametrize("positions, told", [("none", False), ("learned", True), ("relative", True), ("rotary", True)])
def test_who_knows_the_order(positions, told):
    """Without positions the logits of a permuted text are the permuted logits; with them they are not."""
    model, order = toys.build("variant", positions=positions), torch.randperm(T, generator=toys.seeded())
    change = (model(X[:, order]) - model(X)[:, order]).abs().max()
    assert change > 1e-2 if told else change < 1e-5


@pytest.mark.parametrize(
    "f, by_hand", [("gelu", lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2), ("relu2", lambda z: z * z * (z > 0))]
)
def test_feed_forward(f, by_hand):
    ff, x = toys.build("variant", feed_forward=f).blocks[1].ff, torch.randn(5, C, generator=toys.seeded())
    close(ff(x), by_hand(x @ ff.up.weight.T) @ ff.down.weight.T)


def test_norms():
    model, x = toys.build("variant", norm="sandwich"), torch.randn(1, T, C, generator=toys.seeded())
    block = model.blocks[0]
    y = block.attention(block.norm_attention(x), model.cos, model.sin, None, None)[0]
    y = x + rms(y) * block.after_attention.scale
    y = y + rms(block.ff(block.norm_ff(y))) * block.after_ff.scale
    close(block(x, None, model.cos, model.sin, None)[0], y)
    model = toys.build("variant", norm="layer")
    h = model.trunk(X)
    h = rms(h - h.mean(2, keepdim=True)) * model.norm.weight + model.norm.bias
    close(model(X), h @ model.embed.weight[:V].T)
    block = model.blocks[0]
    centred = x - x.mean(2, keepdim=True)
    close(block.norm_ff(x), F.linear(rms(centred), block.norm_ff.weight.diag(), block.norm_ff.bias))


@pytest.mark.parametrize("flags", [
    dict(positions="relative"), dict(positions="learned"), dict(positions="none"), dict(values="own"),
    dict(attention_gate=True), dict(feed_forward="gelu"), dict(feed_forward="relu2"), dict(norm="layer"),
    dict(norm="sandwich"), dict(norm="no_qk"),
], ids=str)  # fmt: skip
def test_as_many_parameters_as_the_transformer(flags):
    sizes = dict(vocab_size=1024, max_seq_len=128, d_model=128, n_layers=4, n_heads=4, d_ff=344)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    ours, theirs = count(Variant(VariantConfig(**sizes, **flags))), count(Transformer(TransformerConfig(**sizes)))
    assert abs(ours / theirs - 1) < 0.005

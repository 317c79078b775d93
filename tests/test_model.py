"""Every model of checkpoint.MODELS, and their variants, through the same tests; then the optimizers that move them."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import KINDS, seeded

import checkpoint
from config import AutoregressiveConfig, EcoHybridConfig, MaskConfig, TransformerConfig
from eco_hybrid import EcoBlock
from model import Attention, Normalize, rotary_table, rotate
from optimizer import EMA, Muon, make_optimizers, orthogonalize

V, T = 11, 16  # sizes of toys.build
VARIANTS = {  # name -> kind, sizes
    "local": ("transformer", dict(n_layers=3, window=4)),  # two local layers, a full one
    "hybrid": ("eco_hybrid", dict(attn_every=2)),  # one layer of each sort
    "blocks": ("transformer", dict(block_length=5)),  # three, and a rest of one
    "relative": ("variant", dict(positions="relative", values="own", attention_gate=True)),
    "learned": ("variant", dict(positions="learned", feed_forward="gelu", norm="sandwich")),
    "layer_norm": ("variant", dict(norm="layer")),
    "no_qk_norm": ("variant", dict(norm="no_qk")),
}
each_kind = pytest.mark.parametrize("kind", [*KINDS, *VARIANTS])  # the denoisers
each_model = pytest.mark.parametrize("kind", [*checkpoint.OURS, *VARIANTS])


def build(kind, **sizes):
    kind, own = VARIANTS.get(kind, (kind, {}))
    return toys.build(kind, **own | sizes)


def canvas(B=3, seed=0):
    """(B, T) ids with about a third of them MASK, the first one always."""
    g = seeded(seed)
    x = torch.randint(V, (B, T), generator=g).masked_fill(torch.rand(B, T, generator=g) < 0.3, V)
    x[:, 0] = V
    return x


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# what goes in and what comes out


@each_kind
def test_logits_have_no_column_for_mask_and_a_tied_head(kind):
    model, x = build(kind), canvas()
    logits = model(x)
    assert model.mask_id == V and logits.shape == (3, T, V) and logits.dtype == torch.float32
    where = torch.tensor([0, 5, 3 * T - 1])
    close(model(x, where), logits.flatten(0, 1)[where])
    hidden = model.norm(model.trunk(x))
    close(hidden @ model.embed.weight[:V].T, logits)
    assert sum(p is model.embed.weight for p in model.parameters()) == 1
    with torch.no_grad():
        model.embed.weight[V] += 1.0
    close(model(x.clamp(max=V - 1)), build(kind)(x.clamp(max=V - 1)), 0)  # MASK's row is read by MASK alone
    assert not torch.allclose(model(x), logits)


@each_model
def test_every_parameter_gets_a_gradient(kind):
    model = build(kind)
    model.loss(canvas().clamp(max=V - 1), MaskConfig(), seeded()).backward()
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), name
        assert (p.grad.reshape(len(p), -1).abs().sum(1) > 0).all(), name  # every row, that of MASK or BOS too


@each_kind
def test_every_visible_token_reaches_every_place(kind):
    model, seen = build(kind), []
    model.embed.register_forward_hook(lambda m, args, out: seen.append(out))
    logits = model(canvas(1))
    for i in range(T):
        (g,) = torch.autograd.grad(logits[0, i].square().sum(), seen[0], retain_graph=True)
        end = min(T, (i // 5 + 1) * 5) if kind == "blocks" else T  # of its block
        reached = (g[0].abs().sum(1) > 1e-7).nonzero().flatten().tolist()
        assert reached == list(range(end)), f"place {i} sees {reached}"


@each_kind
def test_order_counts(kind):
    model, x = build(kind), canvas(1)
    x[0, 3:5] = torch.tensor([1, 2])
    swapped = x.clone()
    swapped[0, 3:5] = torch.tensor([2, 1])
    assert (model(x)[0, 0] - model(swapped)[0, 0]).abs().max() > 1e-3


def test_norm_is_pytorch_s():
    x, scale = torch.randn(3, 4, 6, generator=seeded()) * 5, torch.randn(6, generator=seeded(1))
    x[0, 0] = 0.0  # nothing to divide by
    weight, results = torch.randn(3, 4, 6, generator=seeded(2)), []
    for norm in (Normalize.apply, lambda x, scale: nn.functional.rms_norm(x, (6,), scale, 1e-6)):
        inputs = [v.clone().requires_grad_() for v in (x, scale)]
        y = norm(*inputs)
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    inputs = [v.double().requires_grad_() for v in (x[1:], scale)]
    assert torch.autograd.gradcheck(Normalize.apply, inputs)
    half = (1000 * x).bfloat16()
    ours = Normalize.apply(half, scale)  # computed in fp32, rounded once
    assert ours.dtype == torch.bfloat16
    close(ours, Normalize.apply(half.float(), scale).bfloat16(), 0)


def test_rotary_scores_know_distances_only():
    cos, sin = rotary_table(40, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=seeded()).expand(2, 1, 1, 40, 8)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0]  # (40, 40)
    for distance in (-20, 0, 1, 7):
        diagonal = scores.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))
    a, b = (torch.complex(v[0, 0, 0, :4], v[0, 0, 0, 4:]) for v in (q, k))
    close(scores[0, 7], (a.conj() * b * torch.complex(cos[7], sin[7])).real.sum())
    close(cos**2 + sin**2, torch.ones(40, 4))
    assert torch.cdist(cos, cos).add(torch.eye(40)).min() > 1e-2  # no two places look the same
    model, x = build("transformer", d_model=32, n_heads=4), canvas()
    model.cos, model.sin = cos[:, :4], sin[:, :4]
    here = model(x)
    model.cos, model.sin = cos[9:, :4], sin[9:, :4]
    close(model(x), here)  # nine places on, the same text reads the same


def test_heads_begin_at_neighbours():
    """On a canvas of MASKs, with nothing but its biases, head h looks most at -1, 1, -2, 2."""
    attention, (cos, sin) = build("transformer", n_heads=4, d_model=64).blocks[0].attention, rotary_table(T, 16)
    attention.prefer_neighbours()
    q, k, _ = attention.qkv.bias.view(3, 4, 1, 16).expand(3, 4, T, 16)  # (H, T, D) each
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT  # (H, T, T)
    assert (scores[:, 8].argmax(1) - 8).tolist() == [-1, 1, -2, 2]


@each_model
def test_neighbours_in_the_batch_and_padding_change_nothing(kind):
    model, x = build(kind).eval(), canvas(4)
    together = model(x)
    for i in range(4):
        close(model(x[i : i + 1])[0], together[i])
    lengths = torch.tensor([T, 1, 9, 15])
    alone = [model(x[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    behind = torch.arange(T) >= lengths[:, None]
    for junk in (0, V - 1, V):
        padded = x.masked_fill(behind, junk)
        for i, n in enumerate(lengths):
            close(model(padded, lengths=lengths)[i, :n], alone[i])
    where = (~behind).flatten().nonzero().squeeze(1)
    close(model(x, where, lengths), torch.cat(alone))


@each_model
def test_what_is_refused(kind):
    model = build(kind)
    with pytest.raises(ValueError, match="17.*16"):
        model(torch.zeros(1, T + 1).long())
    for sizes in (
        dict(vocab_size=0),
        dict(max_seq_len=0),
        dict(n_heads=3),
        dict(d_model=6, n_heads=2),
        dict(dropout=1.0),
    ):
        with pytest.raises(ValueError):
            build(kind, **sizes)


@each_model
def test_dropout_in_training_alone(kind):
    model, x = build(kind, dropout=0.5), canvas()
    assert not torch.equal(model(x), model(x))
    model.eval()
    close(model(x), model(x), 0)
    close(model(x), build(kind)(x), 0)


@each_model
def test_activation_checkpointing_changes_nothing(kind):
    model, x0, results, calls = build(kind, dropout=0.2), canvas().clamp(max=V - 1), [], []
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda *_: calls.append(model.activation_checkpointing))
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(0)
        loss = model.loss(x0, MaskConfig(), seeded())
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-6)
    assert calls.count(True) > 1.5 * calls.count(False)  # computed twice: it was really on


@each_kind
@pytest.mark.parametrize("T, hidden", [(16, 5), (12, 12), (16, 0)])
def test_flops_are_those_that_run(kind, T, hidden):
    model = build(kind, d_model=24, n_heads=3).requires_grad_(False)
    math_sdpa = sdpa_kernel(SDPBackend.MATH)  # two plain products: the fused kernel of a CPU is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad(), math_sdpa:
        model(torch.zeros(1, T).long(), torch.arange(hidden))
    beyond = 0  # what blocks of keys hold beyond the band, twice: scores, and their product with the values
    for reach in (m.reach for m in model.modules() if isinstance(m, Attention) and 0 < m.reach < T - 1):
        beyond += 2 * 2 * 24 * (math.ceil(T / reach) * reach * 3 * reach - int(band(T, reach).sum()))
    if kind == "blocks":  # what is masked, in each of two layers
        beyond += 2 * 2 * 2 * 24 * (T * T - int(block_causal(T, 5).sum()))
    convolution = sum(2 * T * m.kernel.numel() for m in model.modules() if isinstance(m, EcoBlock))  # is no product
    assert counter.get_total_flops() + convolution == model.flops(T, hidden) + beyond
    assert (beyond > 0) == (kind in ("local", "blocks")) and (convolution > 0) == (kind in ("eco_hybrid", "hybrid"))


@each_model
def test_initial_loss_is_that_of_a_uniform_guess(kind):
    kind, own = VARIANTS.get(kind, (kind, {}))
    config, model = checkpoint.MODELS[kind]
    torch.manual_seed(0)
    model = model(config(**own | dict(vocab_size=500, max_seq_len=64, d_model=64, n_layers=3, n_heads=2, d_ff=96)))
    x0 = torch.randint(500, (16, 64), generator=seeded())
    assert abs(model.loss(x0, MaskConfig(), seeded()).item() - math.log(500)) < 0.1


@each_model
def test_compile_is_reached_in_one_graph(kind):
    n = 2 if kind == "hybrid" else 1  # its second layer is the full one
    model, plain, graphs, ran = build(kind, n_layers=n), build(kind, n_layers=n), [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: (ran.append(1), graph(*args))[1]

    torch._dynamo.reset()
    counters.clear()
    names = list(model.state_dict())
    model.compile(backend=backend)
    assert list(model.state_dict()) == names and not any("_orig_mod" in n for n in names)
    for seed in range(4):  # the number of hidden tokens differs: a second graph may replace it by a symbol
        x0 = canvas(4, seed).clamp(max=V - 1)
        losses = [m.loss(x0, MaskConfig(), seeded(seed)) for m in (model, plain)]
        close(*losses)
    assert not counters["graph_break"] and len(graphs) <= 2 and len(ran) == 4


# ---------------------------------------------------------------------------------------------------------------------
# local attention


def band(T, reach):
    at = torch.arange(T)
    return (at[:, None] - at).abs() <= reach


@pytest.mark.parametrize("kind", ["transformer", "autoregressive"])
def test_values_are_mixed_with_those_of_the_first_layer(kind):
    model, seen = build(kind, n_layers=3), []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda layer, given, out: seen.append((layer, given[0], out[0])))
    model.trunk(canvas().clamp(max=V - 1))
    first = None
    for layer, h, y in seen:
        q, k, v = layer.qkv(h).view(3, T, 3, 2, 8).permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        if first is None:
            assert layer.shares is None
            first = v
        else:
            own, others = layer.shares.tolist()
            assert abs(own - others) > 0.03  # or the two could be exchanged
            v = own * v + others * first
        q, k = (rotate(norm(z), model.cos, model.sin) for norm, z in ((layer.norm_q, q), (layer.norm_k, k)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=kind == "autoregressive")
        close(y, layer.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "T, window", [(5, 64), (33, 64), (34, 64), (64, 64), (65, 64), (130, 64), (200, 64), (9, 2), (16, 6), (17, 30)]
)
def test_local_attention_is_full_attention_under_a_band(T, window, padded):
    """The same weights under a dense (T, T) mask: equal values, and equal gradients of every weight and input."""
    attention = toys.build("transformer", d_model=32, n_heads=4, max_seq_len=200, n_layers=1, window=window).blocks[0]
    attention, x = attention.attention, torch.randn(3, T, 32, generator=seeded()).requires_grad_()
    cos, sin = rotary_table(T, 8)
    lengths = torch.tensor([T, T // 2 + 1, 1] if padded else [T, T, T])
    inside = (torch.arange(T) < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
    assert attention.reach == window // 2
    results = []
    for reach, attend in (
        (window // 2, inside if padded else None),
        (0, band(T, window // 2) & (inside | torch.eye(T).bool())),
    ):
        attention.reach = reach
        y, _ = attention(x, cos, sin, attend)
        if window // 2 >= T - 1:  # full attention: what stands behind a row's length sees only the row, not itself too
            y = y * inside[:, 0].mT
        pull = torch.randn(y.shape, generator=seeded(1))
        results.append((y, *torch.autograd.grad((y * pull).sum(), [x, *attention.parameters()])))
    for near, dense in zip(*results, strict=True):
        assert near.isfinite().all()
        torch.testing.assert_close(near, dense, rtol=1e-5, atol=1e-5)


def test_a_window_of_twice_the_text_is_full_attention():
    x = canvas()
    full = toys.build("transformer")(x)
    assert torch.equal(toys.build("transformer", window=2 * T)(x), full)
    assert torch.equal(toys.build("transformer", window=2 * (T - 1))(x), full)
    assert not torch.allclose(toys.build("transformer", window=2 * (T - 2))(x), full)  # the two ends do not meet


def test_which_layers_are_local_and_how_far_they_see():
    far = toys.build("transformer", n_layers=7, window=4)
    assert [block.attention.reach for block in far.blocks] == [2, 2, 0, 2, 2, 0, 2]
    model, seen = toys.build("transformer", n_layers=2, window=4), []
    model.embed.register_forward_hook(lambda m, args, out: seen.append(out))
    (g,) = torch.autograd.grad(model(canvas(1))[0, 8].square().sum(), seen)
    assert g[0].abs().sum(1).nonzero().flatten().tolist() == list(range(4, 13))  # two layers: twice two to each side


def test_windows_that_are_refused_and_the_one_of_older_checkpoints():
    for window in (-2, 1, 7):
        with pytest.raises(ValueError, match=str(window)):
            TransformerConfig(window=window)
    assert TransformerConfig(vocab_size=5, max_seq_len=8).window == 0
    longer = toys.build("transformer", max_seq_len=4 * T)
    assert longer.flops(3 * T, 0) == toys.build("transformer").flops(3 * T, 0)  # sizes count, not the limit


# ---------------------------------------------------------------------------------------------------------------------
# blocks


def block_causal(T, L):
    """(T, T) bool: who sees whom, by a loop."""
    return torch.tensor([[key // L <= query // L for key in range(T)] for query in range(T)])


def streams(seed=0, B=3):
    """x0 without, and x_t with MASKs."""
    x0 = torch.randint(V, (B, T), generator=seeded(seed))
    return x0, x0.masked_fill(torch.rand(B, T, generator=seeded(seed + 1)) < 0.5, V)


@pytest.mark.parametrize("L", [1, 2, 3, 5, 8, 15, 16, 40])
def test_two_streams_are_plain_forwards_of_clean_blocks_and_a_noisy_one(L):
    """And a plain forward's blocks see nothing behind them: on a longer canvas they read the same."""
    model, (x0, x_t) = toys.build("transformer", block_length=L, noise=0.3).eval(), streams()
    both = model(x_t, x0=x0)
    assert both.shape == (3, T, V)
    where = torch.tensor([0, 7, 3 * T - 1])
    close(model(x_t, where, x0=x0), both.flatten(0, 1)[where])
    whole = model(x_t)
    for start in range(0, T, L):
        end = min(T, start + L)
        close(both[:, start:end], model(torch.cat((x0[:, :start], x_t[:, start:end]), 1))[:, start:])
        close(whole[:, start:end], model(x_t[:, :end])[:, start:])
    if L < T:
        assert not torch.allclose(whole, both, atol=1e-3)  # noisy blocks before are something else
    else:
        close(whole, toys.build("transformer", noise=0.3).eval()(x_t), 0)


@pytest.mark.parametrize("L", [1, 3, 5, 8])
def test_no_hidden_token_leaks(L):
    """Logits of a block do not change, by a bit, with x0 in it or behind it, nor with x_t outside of it."""
    model, (x0, x_t) = toys.build("transformer", block_length=L, noise=0.3).eval(), streams()
    (other, other_t), logits = streams(5), model(x_t, x0=x0)
    for start in range(0, T, L):
        mine = (torch.arange(T) >= start) & (torch.arange(T) < start + L)
        before = torch.arange(T) < start
        changed = model(torch.where(mine, x_t, other_t), x0=torch.where(before, x0, other))
        assert torch.equal(changed[:, mine], logits[:, mine])
        if start:
            changed = model(x_t, x0=torch.where(before, other, x0))
            assert (changed[:, mine] - logits[:, mine]).abs().amax((1, 2)).min() > 1e-4


def test_two_streams_of_padded_rows_are_each_alone():
    model, (x0, x_t) = toys.build("transformer", block_length=3).eval(), streams()
    lengths = torch.tensor([T, 4, 11])
    padded = model(x_t, lengths=lengths, x0=x0)
    for i, n in enumerate(lengths):
        close(padded[i, :n], model(x_t[i : i + 1, :n], x0=x0[i : i + 1, :n])[0])


@pytest.mark.parametrize("L", [0, 1, 5, 8, 16, 99])
def test_training_flops_are_those_that_run(L):
    model = toys.build("transformer", d_model=24, n_heads=3, block_length=L).requires_grad_(False)
    x0, sizes = torch.zeros(1, T).long(), [min(L or T, T - s) for s in range(0, T, L or T)]
    hidden = int(2 * sum((size + 1) / 2 for size in sizes))  # k uniform on 1..size; twice, as it may be a half
    kwargs = dict(x0=x0) if len(sizes) > 1 else {}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x0, torch.zeros(hidden).long(), **kwargs)
    head, masked = 2 * hidden * 24 * V, 0
    if kwargs:
        masked = 2 * 2 * 2 * 24 * ((2 * T) ** 2 - 2 * int(block_causal(T, L).sum()))
    assert counter.get_total_flops() == model.training_flops(T) / 3 + head / 2 + masked


def test_blocks_that_are_refused_and_the_one_of_older_checkpoints():
    for wrong in (dict(block_length=-1), dict(block_length=4, window=4)):
        with pytest.raises(ValueError, match="block_length"):
            TransformerConfig(**wrong)
    for config in (EcoHybridConfig, AutoregressiveConfig):
        with pytest.raises(ValueError, match="block_length is 4"):
            config(block_length=4)
    assert TransformerConfig(vocab_size=5, max_seq_len=8).block_length == 0


# ---------------------------------------------------------------------------------------------------------------------
# optimizers


def test_orthogonalize():
    for shape in ((2, 128, 128), (5, 16, 40), (1, 3, 200)):
        G = torch.randn(shape, generator=seeded())
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        O = orthogonalize(G)
        values = torch.linalg.svdvals(O)
        large = S > 0.05 * S[:, :1]  # five steps do not lift the smallest all the way
        assert values[large].min() > 0.6 and values.max() < 1.3
        along = torch.einsum("bri,brc,bic->bi", U, O, Vh)  # the same singular vectors
        close(along.sort(1).values, values.sort(1).values, 1e-3)
        close(orthogonalize(1000 * G), O, 1e-3)
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


@each_model
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(kind, name):
    model = build(kind)
    groups = [g for o in make_optimizers(model, name, 1e-3, 0.1, 0.95) for g in o.param_groups]
    owned = [id(p) for g in groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    decays = {id(p) for g in groups for p in g["params"] if g["weight_decay"] > 0}
    for n, p in model.named_parameters():
        assert (id(p) in decays) == (
            p.dim() == 2 and not re.search("embed|norm|slots$|kernel|positions$|offsets$", n)
        ), n


@pytest.mark.parametrize("shape, pieces", [((64, 64), 1), ((192, 64), 3), ((64, 256), 1), ((256, 64), 2)])
def test_first_muon_step_has_adamw_s_size(shape, pieces):
    p = nn.Parameter(torch.randn(shape, generator=seeded()))
    p.pieces, before = pieces, p.detach().clone()
    p.grad = torch.randn(shape, generator=seeded(1))
    Muon([p], lr=0.01, weight_decay=0.0).step()
    assert abs((p - before).square().mean().sqrt() / (0.2 * 0.01) - 1) < 0.2
    assert ((p - before) * p.grad).sum() < 0  # downhill


def test_muon_steps_pieces_and_shapes_as_if_alone():
    """One optimizer over several shapes and a stacked weight, against one a piece; decay and Nesterov by hand."""
    g, lr, decay, m = seeded(), 0.1, 0.5, 0.95
    whole = [nn.Parameter(torch.randn(s, generator=g)) for s in ((12, 4), (4, 4), (4, 9))]
    whole[0].pieces = 3
    alone = [w.detach().clone() for p in whole for w in p.chunk(getattr(p, "pieces", 1))]
    buffers = [torch.zeros_like(w) for w in alone]
    optimizer = Muon(whole, lr, decay)
    for _ in range(3):
        for p in whole:
            p.grad = torch.randn(p.shape, generator=g)
        grads = [x for p in whole for x in p.grad.chunk(getattr(p, "pieces", 1))]
        for w, grad, buffer in zip(alone, grads, buffers, strict=True):
            buffer.mul_(m).add_(grad, alpha=1 - m)
            u = grad * (1 - m) + buffer * m
            u = orthogonalize(u[None])[0] if u.shape[0] <= u.shape[1] else orthogonalize(u.T[None])[0].T
            w.mul_(1 - lr * decay).sub_(u, alpha=lr * 0.2 * max(w.shape) ** 0.5)
        optimizer.step()
    close(torch.cat([p.detach().flatten() for p in whole]), torch.cat([w.flatten() for w in alone]))


def test_average_is_the_loop_by_hand_and_gives_the_weights_back():
    model = build(KINDS[0])
    ema, by_hand = EMA(model, 0.9), {k: v.double() for k, v in model.state_dict().items()}
    for step in range(1, 100):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=seeded(step)))
        ema.update(model, step)
        d = min(0.9, (1 + step) / (10 + step))
        by_hand = {k: d * by_hand[k] + (1 - d) * v.double() for k, v in model.state_dict().items()}
    for k, v in by_hand.items():
        assert ema.shadow[k].dtype == torch.float32
        close(ema.shadow[k].double(), v)
    now = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        assert all(torch.equal(v, ema.shadow[k]) for k, v in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(v, now[k]) for k, v in model.state_dict().items())

"""EcoHybrid: a denoiser of local convolution and a memory of M slots, with a full-attention layer now and then or none.

    python train_eco_hybrid.py --preset tiny --data_dir data/processed --output_dir checkpoints/eco_hybrid_hi

A layer: write (slots look at the visible tokens) → think (slots look at each other, SwiGLU) → mix (gated depthwise
convolution over neighbours) → read (tokens look at the slots) → SwiGLU. With `attn_every` n, every n-th layer is a
Transformer block instead; without these its cost grows linearly with the length. About two fifths of a layer's
parameters work on the slots alone, whose cost all tokens share: so it is faster than a Transformer of as many
parameters. docs/ECO_HYBRID_THEORY.md has costs and evidence.
Shapes: B rows, T tokens, M slots, C width, H heads, A width of the attention between tokens and slots, about C / 4.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, Denoiser, RMSNorm, SwiGLU, rotary_table


class Depthwise(torch.autograd.Function):
    """Each channel's own convolution, as a sum of shifted, scaled copies: x (B, T, C), kernel (k, C) -> (B, T, C).

    Tap i reads the place i - k // 2 further on, zeros outside. nn.Conv1d(groups=C) computes the same, in some cases 15
    times slower (PyTorch issue 75747); autograd's own backward would fill a tensor with zeros for every tap.
    """

    @staticmethod
    def taps(x, k):
        """The k shifted views of x (B, T, C)."""
        padded = F.pad(x, (0, 0, k // 2, k // 2))
        return [padded[:, i : i + x.shape[1]] for i in range(k)]

    @staticmethod
    def forward(ctx, x, kernel):
        ctx.save_for_backward(x, kernel)
        first, *others = Depthwise.taps(x, len(kernel))
        y = first * kernel[0]
        for tap, weight in zip(others, kernel[1:], strict=True):
            y = y.addcmul_(tap, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, kernel = ctx.saved_tensors
        to_kernel = torch.stack([(grad * tap).sum((0, 1)) for tap in Depthwise.taps(x, len(kernel))])
        return Depthwise.apply(grad, kernel.flip(0)), to_kernel


def narrow_width(config):
    """A: a quarter of each head's width, so that the traffic between tokens and slots costs little."""
    return max(1, config.d_model // config.n_heads // 4) * config.n_heads


def swiglu_widths(config):
    """Inner widths of the tokens' and the slots' SwiGLU: a layer gets as many parameters as a Transformer block.

    A d_ff far below the width leaves nothing for them: they are 1 then, and the layer is larger.
    """
    C, A = config.d_model, narrow_width(config)
    transformer = 4 * C * C + 3 * C * config.d_ff
    others = 3 * C * C + 12 * C * A + (config.conv_kernel + config.memory_slots / config.n_layers) * C
    both = max(2, round((transformer - others) / (3 * C)))
    return both - both // 2, both // 2


class EcoBlock(nn.Module):
    """One layer on tokens x (B, T, C) and slots (B, M, C)."""

    def __init__(self, config, first=True):
        super().__init__()
        C, A, (f, f_slots) = config.d_model, narrow_width(config), swiglu_widths(config)
        self.n_heads, self.n_slots = config.n_heads, config.memory_slots
        self.norm_mix, self.norm_read, self.norm_ff = RMSNorm(C), RMSNorm(C), RMSNorm(C)  # tokens
        self.norm_write, self.norm_think, self.norm_slot_ff, self.norm_slots = (RMSNorm(C) for _ in range(4))  # slots
        self.write_q, self.write_kv = nn.Linear(C, A, bias=False), nn.Linear(C, 2 * A, bias=False)
        self.write_out = nn.Linear(A, C, bias=False)
        self.think_qkv, self.think_out = nn.Linear(C, 3 * A, bias=False), nn.Linear(A, C, bias=False)
        self.slot_ff = SwiGLU(C, f_slots)
        self.mix_in, self.mix_out = nn.Linear(C, 2 * C, bias=False), nn.Linear(C, C, bias=False)
        self.kernel = nn.Parameter(torch.empty(config.conv_kernel, C))
        self.read_q, self.read_kv = nn.Linear(C, A, bias=False), nn.Linear(C, 2 * A, bias=False)
        self.read_out = nn.Linear(A, C, bias=False)
        self.ff = SwiGLU(C, f)
        self.dropout = nn.Dropout(config.dropout)
        self.shares = None if first else nn.Parameter(torch.full((2,), 0.5))  # as in model.Attention
        self.think_qkv.weight.pieces = 3  # for Muon, as in model.Attention
        for linear in (self.write_kv, self.mix_in, self.read_kv):
            linear.weight.pieces = 2

    @torch.no_grad()
    def prefer_neighbours(self):
        """Every channel begins as a copy of one near place, most often -1 or 1, and every gate open.

        A position must tell its neighbours apart before anything else can be learned (model.Attention does the same):
        docs/experiments.md.
        """
        k, C = self.kernel.shape
        places = torch.tensor([o for o in (-1, 1, -1, 1, -2, 2, 0) if abs(o) <= k // 2])
        self.kernel.zero_()
        self.kernel[k // 2 + places[torch.arange(C) % len(places)], torch.arange(C)] = 1.0
        self.mix_in.weight[C:].zero_()

    def attend(self, q, k, v, bias=None):
        """q (B, N, A), k and v (B, S, A), bias broadcast to (B, H, N, S) -> (B, N, A). Queries and keys come from
        normed inputs and are not normed again."""
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if bias is not None:
            bias = bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    def forward(self, x, values, slots, seen, near, inside):
        """values (B, H, T, D): what the first layer's convolution moves, the counterpart of its values in attention.
        seen (B, H, M, 1 + T) and near (H, T, M): what is added to the scores of writing and reading.
        inside (B, T, 1): 0 behind a row's length; or None."""
        drop, h = self.dropout, self.norm_mix(x)
        # write; the first key stands for nothing, and is all there is where no token is visible
        k, v = F.pad(self.write_kv(h), (0, 0, 1, 0)).chunk(2, dim=-1)  # (B, 1 + T, A)
        slots = slots + drop(self.write_out(self.attend(self.write_q(self.norm_write(slots)), k, v, seen)))
        # think
        q, k, v = self.think_qkv(self.norm_think(slots)).chunk(3, dim=-1)  # (B, M, A)
        slots = slots + drop(self.think_out(self.attend(q, k, v)))
        slots = slots + drop(self.slot_ff(self.norm_slot_ff(slots)))
        # mix
        u, gate = self.mix_in(h).chunk(2, dim=-1)  # (B, T, C)
        if self.shares is None:
            values = u.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        else:
            u = self.shares[0] * u + self.shares[1] * values.transpose(1, 2).flatten(2)
        u = u if inside is None else u * inside.to(u.dtype)
        u = Depthwise.apply(u, 2 * self.kernel.to(u.dtype))  # the 2 belongs to the gate: it begins at 2σ(0) = 1
        x = x + drop(self.mix_out(torch.sigmoid(gate) * u))
        # read
        k, v = self.read_kv(self.norm_slots(slots)).chunk(2, dim=-1)  # (B, M, A)
        x = x + drop(self.read_out(self.attend(self.read_q(self.norm_read(x)), k, v, near)))
        return x + drop(self.ff(self.norm_ff(x))), values, slots

    def flops(self, T):
        """As Block.flops: 2 · (T · (3C² + 4CA + kC + 3Cf) + M · (8CA + 3Cf) + (4T + 2 + 2M) · MA), each f its own."""
        (k, C), M, A = self.kernel.shape, self.n_slots, len(self.write_q.weight)
        tokens = T * (3 * C * C + 4 * C * A + k * C + 3 * C * self.ff.down.in_features)
        slots = M * (8 * C * A + 3 * C * self.slot_ff.down.in_features)
        scores = (4 * T + 2 + 2 * M) * M * A  # and their products with the values: T + 1 keys, M, M
        return 2 * (tokens + slots + scores)


class EcoHybrid(Denoiser):
    def __init__(self, config):
        super().__init__(config)
        C, H, M, T = config.d_model, config.n_heads, config.memory_slots, config.max_seq_len
        every = config.attn_every
        full = [every > 0 and i % every == every // 2 for i in range(config.n_layers)]
        self.blocks = nn.ModuleList((Block if f else EcoBlock)(config, first=i == 0) for i, f in enumerate(full))
        self.slots = nn.Parameter(torch.empty(M, C))
        cos, sin = rotary_table(T, C // H)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Slot m is anchored to the middle of the m-th of M equal parts of the longest window. A token and a slot score
        # less the further they are apart, by a slope a head, halved from head to head; the last head sees all alike.
        anchor = (torch.arange(M) + 0.5) * T / M
        slope = 2.0 ** (1 - torch.arange(H)) * (torch.arange(H) < H - 1)
        near = -slope[:, None, None] * (torch.arange(T)[:, None] - anchor).abs() * M / T  # (H, T, M)
        self.register_buffer("near", near, persistent=False)
        self.init_weights()
        nn.init.normal_(self.slots)
        for block, f in zip(self.blocks, full, strict=True):
            (block.attention if f else block).prefer_neighbours()

    def trunk(self, x_t, lengths=None):
        T = x_t.shape[1]
        visible, attend, inside = x_t != self.mask_id, None, None  # (B, T)
        if lengths is not None:
            inside = torch.arange(T, device=x_t.device) < lengths[:, None]  # (B, T)
            visible, attend = visible & inside, inside[:, None, None]
        x = self.embed(x_t)  # (B, T, C)
        inside = None if inside is None else inside[..., None].to(x.dtype)
        slots = self.slots.expand(len(x), -1, -1)  # (B, M, C)
        near = self.near[:, :T]
        values = None  # the first layer's
        seen = F.pad(near.mT.masked_fill(~visible[:, None, None], -math.inf), (1, 0))  # (B, H, M, 1 + T)
        for block in self.blocks:
            if isinstance(block, EcoBlock):
                x, values, slots = self.run(block, x, values, slots, seen, near, inside)
            else:
                x, values = self.run(block, x, values, self.cos[:T], self.sin[:T], attend)
        return x

"""The denoiser: which token stands behind each MASK? A plain bidirectional Transformer answers.

    logits = denoiser(x_t)           x_t (B, T) long, hidden tokens are MASK; logits (B, T, V) over the real tokens
    logits = denoiser(x_t, where)    where (N,) flat indices into B·T; logits (N, V) at those positions only

There is no time argument: the time is the hidden fraction, which x_t shows. MASK has a row in the embedding and no
column in the head, so that it cannot be predicted. A new model subclasses Denoiser and overrides `trunk`.
Shapes: B rows, T tokens, C width, H heads, D head width, V real tokens. Nothing here names a device or a precision.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import diffusion


class RMSNorm(nn.Module):
    """x / rms(x) · scale (arXiv 1910.07467), over the last dimension."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), 1e-6)


def rotary_table(T, D):
    """cos and sin of every position's angles, (T, D / 2) each (arXiv 2104.09864).

    The slowest pair turns by little more than one radian over the window, so that all of them tell positions apart:
    base T, not 10,000.
    """
    angle = torch.arange(T)[:, None] * float(T) ** (-torch.arange(0, D, 2) / D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + D/2}) by their position's angle. x (B, H, T, D); cos, sin (T, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Every position sees every other one: rotary positions, RMSNorm on queries and keys (arXiv 2302.05442).

    Queries and keys have a bias, and head h begins with a preference for one relative position: -1, 1, -2, 2, ...
    All MASKs look alike, so without a constant part in q and k the rotary angles could not tell neighbours apart, and
    training would stall at the unigram level for some hundred steps (docs/experiments.md).
    """

    def __init__(self, config):
        super().__init__()
        C, self.n_heads, self.max_seq_len = config.d_model, config.n_heads, config.max_seq_len
        self.qkv = nn.Linear(C, 3 * C)
        self.qkv.weight.pieces = 3  # Muon treats them as three matrices
        self.out = nn.Linear(C, C, bias=False)
        self.norm_q, self.norm_k = RMSNorm(C // self.n_heads), RMSNorm(C // self.n_heads)

    @torch.no_grad()
    def prefer_neighbours(self, size=1.0, sharpness=2.0):
        """Against the constant key bias, rotated by its position, a query bias rotated by o peaks at offset o."""
        self.norm_q.scale.fill_(sharpness)
        H, D = self.n_heads, self.norm_q.scale.numel()
        offset = torch.arange(H) // 2 + 1  # 1, 1, 2, 2, ...
        cos, sin = rotary_table(self.max_seq_len, D)
        cos, sin = cos[offset % len(cos)], sin[offset % len(sin)] * (torch.arange(H) % 2 * 2 - 1)[:, None]  # left first
        key = torch.cat((torch.ones(H, D // 2), torch.zeros(H, D // 2)), dim=1)  # angle 0 in every pair
        value = torch.zeros(H, D)
        self.qkv.bias.copy_(size * torch.cat((torch.cat((cos, sin), dim=1), key, value)).flatten())

    def forward(self, x, cos, sin, attend):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """(silu(x W_gate) · x W_up) W_down (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.gate_up.weight.pieces = 2
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_attention, self.attention = RMSNorm(config.d_model), Attention(config)
        self.norm_ff, self.ff = RMSNorm(config.d_model), SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, attend):
        x = x + self.dropout(self.attention(self.norm_attention(x), cos, sin, attend))
        return x + self.dropout(self.ff(self.norm_ff(x)))


class Denoiser(nn.Module):
    """What the rest of the project knows of a model: `mask_id`, `forward`, `loss`, `flops`."""

    activation_checkpointing = False  # the trainer sets it

    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1 or config.max_seq_len < 1:
            raise ValueError(
                f"vocab_size {config.vocab_size} and max_seq_len {config.max_seq_len} need to be 1 or more"
            )
        self.config, self.mask_id = config, config.vocab_size
        self.embed = nn.Embedding(config.vocab_size + 1, config.d_model)  # the last row is MASK
        self.norm = RMSNorm(config.d_model)

    def init_weights(self):
        """Normal, 0.02; the two matrices that write into the residual stream smaller by √(2·layers), as in GPT-2."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * self.config.n_layers) ** 0.5 if into_residual else 0.02)

    def trunk(self, x_t, lengths=None):
        """x_t (B, T) -> hidden states (B, T, C), before the last norm. Subclasses implement it."""
        raise NotImplementedError

    def forward(self, x_t, where=None, lengths=None):
        """Logits over the V real tokens: (B, T, V), or (N, V) at the flat positions `where` (N,).

        lengths (B,): rows are right-padded, and what lies behind a row's length changes nothing before it.
        Raises ValueError if a row is longer than max_seq_len.
        """
        T, limit = x_t.shape[1], self.config.max_seq_len
        if T > limit:
            raise ValueError(f"{T} tokens are more than the model's {limit}")
        h = self.trunk(x_t, lengths)  # (B, T, C)
        if where is not None:
            h = h.flatten(0, 1)[where]  # (N, C)
        return F.linear(self.norm(h), self.embed.weight[: self.mask_id])  # tied head, without MASK's row

    def loss(self, x0, cfg, generator=None, **kwargs):
        """What the training loop minimises; it also passes `part` and `starts`, see diffusion.training_loss."""
        return diffusion.training_loss(self, x0, cfg, generator, **kwargs)

    def flops(self, T, hidden):
        """Multiply-adds that a forward pass of one window needs, times two; the head counts at `hidden` positions."""
        raise NotImplementedError


class Transformer(Denoiser):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        cos, sin = rotary_table(config.max_seq_len, config.d_model // config.n_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()
        for block in self.blocks:
            block.attention.prefer_neighbours()

    def trunk(self, x_t, lengths=None):
        T = x_t.shape[1]
        attend = None  # (B, 1, 1, T) bool where rows are padded
        if lengths is not None:
            attend = (torch.arange(T, device=x_t.device) < lengths[:, None])[:, None, None]
        x = self.embed(x_t)  # (B, T, C)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, self.cos[:T], self.sin[:T], attend, use_reentrant=False)
            else:
                x = block(x, self.cos[:T], self.sin[:T], attend)
        return x

    def flops(self, T, hidden):
        c = self.config
        matrices = 4 * c.d_model**2 + 3 * c.d_model * c.d_ff
        attention = 2 * T * c.d_model  # scores, and their product with the values
        return 2 * (c.n_layers * T * (matrices + attention) + hidden * c.d_model * c.vocab_size)

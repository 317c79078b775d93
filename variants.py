"""The Transformer with one part exchanged: what is each part worth? For `run_experiments.py --suite architecture`.

    python variants.py --preset tiny --positions relative --output_dir checkpoints/relative

The loop and the flags are those of train_diffusion.py. Without flags of its own it is the Transformer. What wins moves
into model.py with its number in docs/experiments.md, and nothing else needs this file.
Shapes: B rows, T tokens, C width, H heads, D head width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import run_main
from model import Attention, Block, Denoiser, RMSNorm, SwiGLU, rotary_table, rotate


class Scale(RMSNorm):
    """A norm without the norm."""

    def forward(self, x):
        return x * self.scale


class FeedForward(nn.Module):
    """f(x W_up) W_down, f GELU or relu² (arXiv 2109.08668); half as wide again as a SwiGLU of as many parameters."""

    def __init__(self, width, inner, f):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.f = dict(gelu=F.gelu, relu2=lambda x: F.relu(x).square())[f]

    def forward(self, x):
        return self.down(self.f(self.up(x)))


class VariantAttention(Attention):
    def __init__(self, config, first):
        super().__init__(config, first=first or config.values == "own")
        self.rotary = config.positions == "rotary"
        if config.norm == "no_qk":
            self.norm_q, self.norm_k = (Scale(config.d_model // config.n_heads) for _ in range(2))
        self.gate = nn.Linear(config.d_model, config.n_heads, bias=False) if config.attention_gate else None

    def forward(self, x, cos, sin, bias, values):
        """As Attention.forward. bias: what is added to the scores, or where they count, or None."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        q, k = self.norm_q(q), self.norm_k(k)
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.shares is None:
            values = v
        else:
            v = self.shares[0] * v + self.shares[1] * values
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, T, D)
        if self.gate is not None:  # by head and position (arXiv 2505.06708); it begins near 1
            y = y * 2 * torch.sigmoid(self.gate(x)).mT[..., None]
        return self.out(y.transpose(1, 2).reshape(B, T, C)), values


class VariantBlock(Block):
    def __init__(self, config, first):
        super().__init__(config)
        C, T, L = config.d_model, config.max_seq_len, config.n_layers
        self.attention = VariantAttention(config, first)
        inner = config.d_ff - (T / (3 * L) if config.positions == "learned" else 0)  # their table's parameters
        self.ff = SwiGLU(C, max(1, round(inner)))
        if config.feed_forward != "swiglu":
            self.ff = FeedForward(C, max(1, round(1.5 * inner)), config.feed_forward)
        if config.norm == "layer":
            self.norm_attention, self.norm_ff = nn.LayerNorm(C, eps=1e-6), nn.LayerNorm(C, eps=1e-6)
        self.after_attention, self.after_ff = nn.Identity(), nn.Identity()
        if config.norm == "sandwich":
            self.after_attention, self.after_ff = RMSNorm(C), RMSNorm(C)
            for norm in (self.after_attention, self.after_ff):
                nn.init.constant_(norm.scale, (2 * L) ** -0.5)  # all branches together begin as large as the embedding

    def forward(self, x, values, cos, sin, bias):
        y, values = self.attention(self.norm_attention(x), cos, sin, bias, values)
        x = x + self.dropout(self.after_attention(y))
        return x + self.dropout(self.after_ff(self.ff(self.norm_ff(x)))), values


class Variant(Denoiser):
    def __init__(self, config):
        super().__init__(config)
        C, H, T = config.d_model, config.n_heads, config.max_seq_len
        self.blocks = nn.ModuleList(VariantBlock(config, first=i == 0) for i in range(config.n_layers))
        if config.norm == "layer":
            self.norm = nn.LayerNorm(C, eps=1e-6)
        cos, sin = rotary_table(T, C // H)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.positions = nn.Parameter(torch.empty(T, C)) if config.positions == "learned" else None
        self.offsets = nn.Parameter(torch.empty(H, 2 * T - 1)) if config.positions == "relative" else None
        self.init_weights()
        for block in self.blocks:
            block.attention.prefer_neighbours()
        if self.offsets is not None:  # heads begin with a preference for -1, 1, -2, 2, ..., as with rotary positions
            nn.init.zeros_(self.offsets)
            with torch.no_grad():
                for h in range(H):
                    at = T - 1 + (h // 2 + 1) * (h % 2 * 2 - 1)
                    self.offsets[h, max(0, min(at, 2 * T - 2))] = 4.0

    def trunk(self, x_t, lengths=None):
        T, bias, values = x_t.shape[1], None, None
        at = torch.arange(T, device=x_t.device)
        if lengths is not None:
            bias = (at < lengths[:, None])[:, None, None]  # (B, 1, 1, T) bool
        x = self.embed(x_t)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions[:T].to(x.dtype)
        if self.offsets is not None:
            added = self.offsets[:, at - at[:, None] + self.config.max_seq_len - 1]  # (H, T, T)
            bias = added[None] if bias is None else added.masked_fill(~bias, float("-inf"))
            if torch.is_autocast_enabled(x.device.type):  # scores and what is added to them have one precision
                bias = bias.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            x, values = self.run(block, x, values, self.cos[:T], self.sin[:T], bias)
        return x


def main():
    from train_diffusion import main as train  # which knows this file through checkpoint.MODELS

    train("variant", __doc__, output_dir="checkpoints/variant_hi")


if __name__ == "__main__":
    run_main(main)

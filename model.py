"""The denoiser: which token stands behind each MASK? A plain bidirectional Transformer answers.

    logits = denoiser(x_t)           x_t (B, T) long, hidden tokens are MASK; logits (B, T, V) over the real tokens
    logits = denoiser(x_t, where)    where (N,) flat indices into B·T; logits (N, V) at those positions only
    logits = gpt(x0)                 the causal twin: the logits of each token look at the tokens before it alone

There is no time argument: the time is the hidden fraction, which x_t shows. MASK has a row in the embedding and no
column in the head, so that it cannot be predicted. A new model subclasses Denoiser, puts its layers into `blocks` and
overrides `trunk`. GPT is the Transformer made causal, to compare with: the same parameters, begun alike.
Shapes: B rows, T tokens, C width, H heads, D head width, V real tokens. Nothing here names a device or a precision.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import diffusion


class Normalize(torch.autograd.Function):
    """x / rms(x) · scale (arXiv 1910.07467), over the last dimension, in fp32 at least.

    By hand, because PyTorch composes it on a CPU of some twenty passes over x: forward and backward take half as long.
    """

    @staticmethod
    def forward(ctx, x, scale):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        inverse = (mean_square + 1e-6).rsqrt()
        y = wide * inverse  # what the scale and the backward pass need
        ctx.save_for_backward(y, inverse, scale)
        return (y * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, inverse, scale = ctx.saved_tensors
        wide = grad.to(y.dtype)
        to_scale = (wide * y).flatten(0, -2)  # (rows, width)
        along = (to_scale @ scale).view(inverse.shape) / y.shape[-1]  # the part of the gradient along x changes nothing
        to_x = torch.addcmul(wide * scale, y, along, value=-1) * inverse
        return to_x.to(grad.dtype), to_scale.sum(0)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return Normalize.apply(x, self.scale)


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


def near_attention(q, k, v, reach, inside=None):
    """Attention to the positions at most `reach` away, at a cost linear in T: q, k, v (B, H, T, D) -> (B, H, T, D).

    N blocks of `reach` queries each meet 3 · reach keys: their own block and its two neighbours.
    inside (B, 1, 1, T) bool: keys that may be seen.
    """
    B, _, T, _ = q.shape
    rest = -T % reach  # the last block is filled up
    q = F.pad(q, (0, 0, 0, rest)).unflatten(2, (-1, reach))  # (B, H, N, reach, D)
    k, v = (F.pad(x, (0, 0, reach, reach + rest)).unfold(2, 3 * reach, reach).mT for x in (k, v))
    if inside is None:
        inside = torch.ones(B, 1, 1, T, dtype=torch.bool, device=q.device)
    inside = F.pad(inside[:, 0], (reach, reach + rest)).unfold(2, 3 * reach, reach)  # (B, 1, N, 3 · reach)
    at = torch.arange(-reach, 2 * reach, device=q.device)
    offset = at - at[reach : 2 * reach, None]  # (reach, 3 · reach) of a key from a query
    attend = (offset.abs() <= reach) & (inside[..., None, :] | (offset == 0))  # all see themselves: no empty softmax
    q, k, v, attend = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, attend))  # (B·N, H or 1, ...): fused kernels
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)  # (B·N, H, reach, D)
    return y.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :T]


class Attention(nn.Module):
    """Every position sees every other one: rotary positions, RMSNorm on queries and keys (arXiv 2302.05442).

    Queries and keys have a bias, and head h begins with a preference for one relative position: -1, 1, -2, 2, ...
    All MASKs look alike, so without a constant part in q and k the rotary angles could not tell neighbours apart, and
    training would stall at the unigram level for some hundred steps (docs/experiments.md).
    With a window a position sees no further than window / 2 tokens to each side (arXiv 2004.05150).
    causal: it sees itself and what stands before it; only offsets to the left make sense, and heads prefer -1, -2, ...
    Every layer but the `first` mixes its values with those of the first, half and half to begin with (value residuals,
    arXiv 2410.17897): docs/experiments.md.
    """

    def __init__(self, config, window=0, causal=False, first=True):
        super().__init__()
        C, self.n_heads, self.max_seq_len = config.d_model, config.n_heads, config.max_seq_len
        self.reach, self.causal, self.block_length = window // 2, causal, config.block_length  # reach 0: all
        self.qkv = nn.Linear(C, 3 * C)
        self.qkv.weight.pieces = 3  # Muon treats them as three matrices
        self.out = nn.Linear(C, C, bias=False)
        self.norm_q, self.norm_k = RMSNorm(C // self.n_heads), RMSNorm(C // self.n_heads)
        self.shares = None if first else nn.Parameter(torch.full((2,), 0.5))  # of its own values and the first layer's

    @torch.no_grad()
    def prefer_neighbours(self, size=1.0, sharpness=2.0):
        """Against the constant key bias, rotated by its position, a query bias rotated by o peaks at offset o."""
        self.norm_q.scale.fill_(sharpness)
        H, D = self.n_heads, self.norm_q.scale.numel()
        h = torch.arange(H)
        offset = -1 - h if self.causal else (h // 2 + 1) * (h % 2 * 2 - 1)  # -1, -2, ..., or -1, 1, -2, 2, ...
        cos, sin = rotary_table(self.max_seq_len, D)
        cos, sin = cos[offset.abs() % len(cos)], sin[offset.abs() % len(sin)] * offset.sign()[:, None]
        key = torch.cat((torch.ones(H, D // 2), torch.zeros(H, D // 2)), dim=1)  # angle 0 in every pair
        value = torch.zeros(H, D)
        self.qkv.bias.copy_(size * torch.cat((torch.cat((cos, sin), dim=1), key, value)).flatten())

    def forward(self, x, cos, sin, attend, past=None, values=None):
        """past (2, B, H, S, D): keys and values of S positions, of which the T of x are the last and are filled in.
        values (B, H, T, D): the first layer's. Returns the output (B, T, C) and the first layer's values."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        if self.shares is None:
            values = v
        else:
            v = self.shares[0] * v + self.shares[1] * values
        if past is not None:
            past[..., -T:, :] = torch.stack((k, v))
            k, v = past
        if 0 < self.reach < T - 1:
            y = near_attention(q, k, v, self.reach, attend)  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=self.causal and attend is None)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), values

    def pairs(self, T):
        """Pairs of a query and a key that are needed. near_attention computes half as many again, more at small T;
        blocks and their masks, all."""
        if self.causal:
            return T * (T + 1) // 2
        if L := self.block_length:
            return sum(min(L, T - s) * min(s + L, T) for s in range(0, T, L))
        reach = min(self.reach or T, T - 1)
        return T * (2 * reach + 1) - reach * (reach + 1)


class SwiGLU(nn.Module):
    """(silu(x W_gate) · x W_up) W_down (arXiv 2002.05202)."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.gate_up.weight.pieces = 2
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x (B, T, C) and the first layer's values, which pass through -> the same."""

    def __init__(self, config, window=0, causal=False, first=True):
        super().__init__()
        self.norm_attention, self.attention = RMSNorm(config.d_model), Attention(config, window, causal, first)
        self.norm_ff, self.ff = RMSNorm(config.d_model), SwiGLU(config.d_model, config.d_ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, values, cos, sin, attend, past=None):
        y, values = self.attention(self.norm_attention(x), cos, sin, attend, past, values)
        x = x + self.dropout(y)
        return x + self.dropout(self.ff(self.norm_ff(x))), values

    def flops(self, T):
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        scores = 2 * self.attention.pairs(T) * self.ff.down.out_features  # and their products with the values
        return 2 * (T * matrices + scores)


class LanguageModel(nn.Module):
    """What the rest of the project knows of a model: `mask_id`, `forward`, `loss`, `flops`. The id V, mask_id, is no
    token: in a canvas it marks what is to be written."""

    activation_checkpointing = False  # the trainer sets it
    block_length = 0  # blocks of so many tokens see themselves and what stands before them; 0: all see all
    can_cache = False  # whether `forward` takes keys and values of what stands before x, see `cache`

    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1 or config.max_seq_len < 1:
            raise ValueError(
                f"vocab_size {config.vocab_size} and max_seq_len {config.max_seq_len} need to be 1 or more"
            )
        self.config, self.mask_id = config, config.vocab_size
        self.embed = nn.Embedding(config.vocab_size + 1, config.d_model)  # the last row is MASK, or BOS
        self.norm = RMSNorm(config.d_model)

    def init_blocks(self, windows, causal=False):
        """Transformer blocks, one a window, their rotary positions, and the weights of the whole model."""
        self.blocks = nn.ModuleList(Block(self.config, w, causal, first=i == 0) for i, w in enumerate(windows))
        cos, sin = rotary_table(self.config.max_seq_len, self.config.d_model // self.config.n_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()
        for block in self.blocks:
            block.attention.prefer_neighbours()

    def init_weights(self):
        """Normal, 0.02; the two matrices that write into the residual stream smaller by √(2·layers), as in GPT-2."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * self.config.n_layers) ** 0.5 if into_residual else 0.02)

    def trunk(self, x_t, lengths=None):
        """x_t (B, T) -> hidden states (B, T, C), before the last norm. Subclasses implement it."""
        raise NotImplementedError

    def forward(self, x_t, where=None, lengths=None, **past):
        """Logits over the V real tokens: (B, T, V), or (N, V) at the flat positions `where` (N,).

        lengths (B,): rows are right-padded, and what lies behind a row's length changes nothing before it.
        past: cache=, start=, where `can_cache`: x_t stands behind `start` tokens that the cache holds, and joins them.
        x0=, with a block_length: the blocks of x_t see x0 (B, T), not x_t, in the blocks before them.
        Raises ValueError if a row is longer than max_seq_len.
        """
        T, limit = x_t.shape[1] + past.get("start", 0), self.config.max_seq_len
        if T > limit:
            raise ValueError(f"{T} tokens are more than the model's {limit}")
        h = self.trunk(x_t, lengths, **past)  # (B, T, C)
        if where is not None:
            h = h.flatten(0, 1)[where]  # (N, C)
        return self.head(h)

    def head(self, h):
        return F.linear(self.norm(h), self.embed.weight[: self.mask_id])  # tied, without the row of MASK

    def loss(self, x0, cfg, generator=None, **kwargs):
        """What the training loop minimises, a scalar. Subclasses implement it."""
        raise NotImplementedError

    def cache(self, B, T):
        """Room for the keys and values of T positions in each Transformer block: (layers, 2, B, H, T, D)."""
        if T > self.config.max_seq_len:
            raise ValueError(f"{T} tokens are more than the model's {self.config.max_seq_len}")
        H = self.config.n_heads
        return self.embed.weight.new_empty(len(self.blocks), 2, B, H, T, self.config.d_model // H)

    def run(self, block, *inputs):
        """block(*inputs), computed once more in the backward pass where memory is to be saved."""
        if self.activation_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def flops(self, T, hidden):
        """Multiply-adds that a forward pass of one window needs, times two; the head counts at `hidden` positions."""
        head = 2 * hidden * self.config.d_model * self.config.vocab_size
        return sum(block.flops(T) for block in self.blocks) + head

    def training_flops(self, T):
        """Of one window in training: the backward pass counts twice; half of each block is hidden, and where there are
        several, clean ones are read beside x_t."""
        L = min(self.block_length or T, T)
        return 3 * (self.flops(T, (T - (-T // L)) / 2) + (self.flops(T, 0) if L < T else 0))


class Denoiser(LanguageModel):
    def loss(self, x0, cfg, generator=None, **kwargs):
        """cfg: a config.MaskConfig. The loop also passes `part` and `starts`, see diffusion.training_loss."""
        return diffusion.training_loss(self, x0, cfg, generator, **kwargs)


class Transformer(Denoiser):
    def __init__(self, config):
        super().__init__(config)
        # local layers, and a full one every third: the baseline that efficient attention must beat (arXiv 2112.07210)
        self.init_blocks(0 if i % 3 == 2 else config.window for i in range(config.n_layers))
        self.can_cache, self.block_length = not config.window, config.block_length

    def trunk(self, x_t, lengths=None, cache=None, start=0, x0=None):
        T, end, attend, past = x_t.shape[1], start + x_t.shape[1], None, None
        cos, sin, at = self.cos[start:end], self.sin[start:end], torch.arange(end, device=x_t.device)
        if lengths is not None:
            attend = (at < lengths[:, None])[:, None, None]  # (B, 1, 1, end) bool
        if 0 < self.block_length < end:
            number = at // self.block_length
            before, own = number < number[start:, None], number == number[start:, None]  # (T, end)
            sees = before | own
            if x0 is not None:  # behind x_t its clean twin, at the same positions (BD3-LM, arXiv 2503.09573)
                x_t, cos, sin = torch.cat((x_t, x0), 1), cos.repeat(2, 1), sin.repeat(2, 1)
                clean = torch.cat((torch.zeros_like(own), sees), 1)
                sees = torch.cat((torch.cat((own, before), 1), clean))  # (2T, 2T)
            attend = sees if attend is None else sees & attend.repeat(1, 1, 1, 1 if x0 is None else 2)
        x, values = self.embed(x_t), None  # (B, T, C), or twice as long
        for i, block in enumerate(self.blocks):
            if cache is not None:
                past = cache[i, ..., :end, :]
            x, values = self.run(block, x, values, cos, sin, attend, past)
        return x[:, :T]


class GPT(LanguageModel):
    """The Transformer's autoregressive twin: the same blocks, made causal, and the same parameters.

    It reads BOS, x0[0], x0[1], ... and writes the logits of x0[0], x0[1], x0[2], ...: every token is predicted, the
    first one too. BOS is the row that is MASK's elsewhere. It says that a window begins, at any place of a document.
    """

    def __init__(self, config):
        super().__init__(config)
        self.init_blocks([0] * config.n_layers, causal=True)

    def trunk(self, x0, lengths=None):
        """What stands behind a row's length is read by nothing before it: `lengths` are not needed."""
        return self.read(F.pad(x0, (1, -1), value=self.mask_id))  # BOS in front, the last token away

    def read(self, x, cache=None, start=0):
        """x (B, N) behind `start` tokens that `cache` holds, to which it is added -> hidden states (B, N, C)."""
        N, attend, past = x.shape[1], None, None
        end = start + N
        if cache is not None:
            attend = torch.ones(N, end, dtype=torch.bool, device=x.device).tril(start)
        x, values = self.embed(x), None  # (B, N, C)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                past = cache[i, ..., :end, :]
            x, values = self.run(block, x, values, self.cos[start:end], self.sin[start:end], attend, past)
        return x

    def extend(self, x, cache, start):
        """Logits (B, V) of the token behind x (B, N), whose keys and values join `cache` behind its first `start`."""
        return self.head(self.read(x, cache, start)[:, -1])

    def token_nll(self, x0, observe=None, answer=None):
        """-log p(token | all before it) of x0 (B, T): (B, T) in nats. Compiled where the model is.

        answer (B, 2): only from answer[:, 0] to before answer[:, 1]; 0 elsewhere, where the head is not computed.
        """
        x0 = x0.to(next(self.parameters()).device)
        if answer is None:
            return diffusion.token_nll(self(x0).flatten(0, 1), x0.flatten(), observe=observe).view(x0.shape)
        place = torch.arange(x0.shape[1])
        inside = (place >= answer[:, :1]) & (place < answer[:, 1:])  # (B, T), on the CPU
        where = inside.flatten().nonzero().squeeze(1).to(x0.device)  # (N,)
        nll = diffusion.token_nll(self(x0, where), x0.flatten()[where], observe=observe)  # (N,)
        return nll.new_zeros(x0.numel()).index_copy(0, where, nll).view(x0.shape)

    def loss(self, x0, cfg, generator=None, part=(0, 1), answer=None, **kwargs):
        """Next-token cross-entropy, nats per token. Nothing is hidden: masks, times and word starts are not used.

        answer, part: of answers alone, as in diffusion.training_loss, each token of the step's answers counts the same.
        """
        if answer is None:
            return self.token_nll(x0).mean()
        i, n = part
        mine = answer[i * len(x0) : (i + 1) * len(x0)]
        return self.token_nll(x0, answer=mine).sum() / ((answer[:, 1] - answer[:, 0]).sum() / n)

    @torch.no_grad()
    def nll(self, x0, observe=None, answer=None):
        """Exact -log p of each row of x0 (B, T), or its answer: (B,) nats per token, the unit of diffusion.bound."""
        nats = self.token_nll(x0, observe, answer)  # (B, T)
        return nats.mean(1).cpu() if answer is None else nats.sum(1).cpu() / (answer[:, 1] - answer[:, 0])

    def flops(self, T, hidden=None):
        """As of a denoiser, but the head counts everywhere: all T tokens are predicted."""
        return super().flops(T, T)

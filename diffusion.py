"""Masked discrete diffusion: how tokens are hidden, the training loss, and the bound that is reported.

    x_t, masked = corrupt(x0, mask_id, generator=g)     # hide k of T tokens, k uniform on 1..T
    nats = bound(denoiser, x0, generator=g)             # (B,) unbiased estimate of the negative ELBO, nats per token

Everything is a function on tensors. A model with no time argument sees the time as the fraction that is hidden.
A denoiser with a `block_length` L writes blocks of L tokens from left to right (BD3-LM, arXiv 2503.09573): each block
has its own k, uniform on 1..L, and sees clean blocks before it; its cost is one block's bound given those, and they add
up. L 1 is the exact likelihood from left to right, L >= T the plain bound: what follows for a row holds for a block.
`given` (B,): the first tokens of each row are given and never hidden; the bound is one on what follows them.
Mathematics: docs/DIFFUSION_MODEL_DETAILED.md; LLaDA (arXiv 2502.09992) eq. 6, MDLM (2406.07524), MD4 (2406.04329).
Shapes: B rows, T tokens, n blocks a row (1 unless told), V real tokens, N hidden tokens of the batch; MASK is id V.
"""

import math

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# times and rates


def draw_times(n, sampling="stratified", generator=None):
    """n times, each uniform on (0, 1]. stratified: one in each of n equal slices.

    The slices go to the rows in golden-ratio order, so that any run of neighbouring rows (a micro-batch, a rank) holds
    small and large times alike: its number of hidden tokens hardly varies. Returns (n,) float64.
    """
    within = 1 - torch.rand(n, generator=generator, dtype=torch.float64)
    if sampling == "uniform":
        return within
    golden = (torch.arange(n, dtype=torch.float64) * (math.sqrt(5) - 1) / 2) % 1
    shift = torch.randint(n, (1,), generator=generator)  # makes every single row uniform
    return ((golden.argsort().argsort() + shift) % n + within) / n


def ramp(t, schedule):
    """Share of the way from the lowest to the highest mask rate that is done at time t."""
    return t if schedule == "linear" else (1 - torch.cos(math.pi * t)) / 2


def rate_and_weight(t, schedule="linear", low=0.0, high=1.0, levels=0):
    """Mask rate r(t), and the weight r'(t) / (high - low) of a row's mean cross-entropy, whose mean over t is 1.

    levels = 0: continuous time. Otherwise t is rounded up to one of that many levels i / levels, and the derivative
    becomes the difference of neighbouring levels, as in D3PM's discrete bound. t, r and weight: (n,).
    """
    if levels:
        t = (t * levels).ceil() / levels
        weight = levels * (ramp(t, schedule) - ramp(t - 1 / levels, schedule))
    else:
        weight = torch.ones_like(t) if schedule == "linear" else math.pi / 2 * torch.sin(math.pi * t)
    return low + (high - low) * ramp(t, schedule), weight


# ---------------------------------------------------------------------------------------------------------------------
# hiding


def block_sizes(denoiser, T):
    """Sizes (n,) of the blocks in which the denoiser writes T tokens: all alike, the last may be smaller."""
    L = min(getattr(denoiser, "block_length", 0) or T, T)
    return (T - torch.arange(0, T, L)).clamp(max=L)


def open_sizes(sizes, given=None):
    """Of blocks of these sizes (n,), how many positions of each are not given: (B, n), or (1, n) where none is."""
    given = torch.zeros(1, dtype=torch.long) if given is None else given
    return torch.minimum((sizes.cumsum(0) - given[:, None]).clamp(min=0), sizes)


def hide_tokens(noise, k, L, given=None):
    """Exactly k random positions a block of L: those that a random permutation of it sends below k.

    noise (B, T) uniform, k (B, n), at most as many as are not given."""
    place = torch.arange(noise.shape[1])
    block = place // L  # (T,)
    key = noise.double()  # in float32 the sums would make ties
    if given is not None:  # what is given comes last in its block
        key = (key + (place < given[:, None])) / 2
    order = (key + block).argsort(1)
    if given is not None:  # a random permutation sends anything anywhere; what comes last, only its inverse tells
        order = order.argsort(1)
    return order - block * L < k[:, block]


def hide_spans(noise, coin, k, starts, mean_span_length):
    """Whole words in geometric spans, until at least k tokens of the row are hidden.

    noise, coin (B, T) uniform; starts (B, T) bool, true where a word begins; mean_span_length in words.
    The word that crosses k is hidden whole, so that no akshara is cut: a row hides k to k + (its length) - 1 tokens.
    """
    position = torch.arange(noise.shape[1], device=noise.device).expand_as(noise)
    starts = starts | (position == 0)
    opens = starts & ((coin < 1 / mean_span_length) | (position == 0))  # a new span begins with this probability
    first_of = lambda flags: torch.where(flags, position, 0).cummax(1).values  # noqa: E731
    order = noise.gather(1, first_of(opens)).argsort(dim=1, stable=True)  # spans in random order, tokens in theirs
    rank = order.argsort(1)
    return rank.gather(1, first_of(starts)) < k[:, None]


def corrupt(x0, mask_id, k=None, generator=None, sizes=None, given=None):
    """Hide k of the T tokens in each row of x0 (B, T); k (B,) or, by default, stratified and uniform on 1..T.

    sizes (n,): in each block of these sizes instead, k (B, n). given (B,): of those behind the first so many instead.
    Returns x_t (B, T) and masked (B, T) bool. generator: a CPU generator, here and below.
    """
    B, T = x0.shape
    sizes = torch.tensor([T]) if sizes is None else sizes
    if k is None:
        times = draw_times(B * len(sizes), generator=generator).view(B, -1)  # (B, n)
        k = (times * open_sizes(sizes, given)).ceil().long()
    noise = torch.rand(B, T, generator=generator)
    masked = hide_tokens(noise, k.cpu().view(B, -1), int(sizes[0]), given).to(x0.device)
    return x0.masked_fill(masked, mask_id), masked


# ---------------------------------------------------------------------------------------------------------------------
# what hiding costs


def token_nll(logits, target, chunk=4096, observe=None, *about):
    """-log p of target (N,) under logits (N, V): (N,) in nats, fp32. Chunks keep the temporaries small.

    observe(logits, target, *about) sees every chunk, where more is to be known of the same forward; here and below.
    """
    nll, chunk = [], max(1, min(chunk, (1 << 28) // logits.shape[1]))
    for l, y, *a in zip(*(v.split(chunk) for v in (logits, target, *about)), strict=True):
        nll.append(F.cross_entropy(l.float(), y, reduction="none"))
        if observe:
            observe(l, y, *a)
    return torch.cat(nll)


def hidden_nll(denoiser, x_t, masked, x0, chunk=4096, observe=None):
    """-log p(x0 | x_t) of the hidden tokens alone: the head is computed nowhere else.

    Returns nll (N,) in nats, fp32, and the row (N,) that each belongs to, or the block, of B·n; observe is told it too.
    """
    device, T = next(denoiser.parameters()).device, x0.shape[1]
    sizes = block_sizes(denoiser, T)
    where = masked.flatten().nonzero().squeeze(1)  # (N,), on the CPU in training: its size is known without waiting
    row, target = where // T * len(sizes) + where % T // int(sizes[0]), x0.flatten()[where]
    x_t, where, row, target = (v.to(device) for v in (x_t, where, row, target))
    before = dict(x0=x0.to(device)) if len(sizes) > 1 else {}
    return token_nll(denoiser(x_t, where, **before), target, chunk, observe, row), row


def row_means(nll, row, B):
    """Mean over each row's hidden tokens: nll (N,), row (N,) -> (B,). A row without any gives 0."""
    total = nll.new_zeros(B).index_add(0, row, nll)
    return total / nll.new_zeros(B).index_add(0, row, torch.ones_like(nll)).clamp(min=1)


def training_loss(denoiser, x0, cfg, generator=None, part=(0, 1), starts=None, answer=None):
    """Scalar training loss of x0 (B, T), in nats per token. cfg: a config.MaskConfig.

    part = (i, n): these B rows are the i-th of n parts of one optimizer step. Times and masks are drawn for all n·B
    rows and sliced, from a generator that stands the same for every part: times are stratified over the whole step,
    and one big batch, accumulation and several processes give the same masks.
    The weights are divided by their mean over the step: a model of constant cross-entropy costs exactly its constant.
    Blocks: each has its own time, stratified over all blocks of the step; elbo weighs them by their size too, low_var
    still counts every hidden token the same. With blocks of one token both are the likelihood. Spans know no blocks.
    starts (B, T) bool: where words begin, for masking_strategy span.
    answer (n·B, 2), of all rows of the step: only what stands from answer[:, 0] on is hidden, to the row's end, and a
    row weighs as much as it has such tokens.
    """
    (B, T), (i, n) = x0.shape, part
    mine = slice(i * B, (i + 1) * B)
    L = int(block_sizes(denoiser, T)[0])
    given = None if answer is None else answer[:, 0]  # (n·B,)
    sizes = open_sizes(block_sizes(denoiser, T), given)  # (n·B or 1, blocks)
    t = draw_times(n * B * sizes.shape[1], cfg.timestep_sampling, generator).view(n * B, -1)  # (n·B, blocks)
    levels = cfg.timesteps if cfg.time_mode == "discrete" else 0
    rate, weight = rate_and_weight(t, cfg.mask_schedule, cfg.min_mask_rate, cfg.max_mask_rate, levels)
    k = torch.minimum((rate * sizes - 1e-9).ceil().clamp(min=1), sizes).long()  # 0.07 · 100 is 7.000000000000001
    weight = weight * (sizes.double() / L)
    if cfg.loss_weight == "low_var":  # every hidden token counts the same, with spans about (arXiv 2602.15014)
        weight = k.double()
    weight = (weight / weight.mean())[mine].float().flatten()  # (B·blocks,)

    noise = torch.rand(n * B, T, generator=generator)[mine]
    if cfg.masking_strategy == "span":
        coin = torch.rand(n * B, T, generator=generator)[mine]
        starts = torch.ones(B, T, dtype=torch.bool) if starts is None else starts.cpu()
        masked = hide_spans(noise, coin, k[mine].squeeze(1), starts, cfg.mean_span_length)
    else:
        masked = hide_tokens(noise, k[mine], L, None if given is None else given[mine])
    masked = masked.to(x0.device)
    nll, row = hidden_nll(denoiser, x0.masked_fill(masked, denoiser.mask_id), masked, x0)
    return (row_means(nll, row, len(weight)) * weight.to(nll.device)).mean()


@torch.no_grad()
def bound(denoiser, x0, generator=None, k=None, observe=None, given=None):
    """Unbiased estimate of the negative ELBO of each row of x0 (B, T): (B,) nats per token, one mask a row.

    Hide k of T tokens, k uniform on 1..T, and take the row's own mean over its hidden tokens (LLaDA eq. 6). A mean
    over all hidden tokens of the batch is not a bound. k (B, n): counts of each block that the caller stratified.
    given (B,): the bound on -log p of what follows a row's first so many tokens, given those, a token of what follows.
    """
    B, sizes = len(x0), block_sizes(denoiser, x0.shape[1])
    x_t, masked = corrupt(x0, denoiser.mask_id, k, generator, sizes, given)
    means = row_means(*hidden_nll(denoiser, x_t, masked, x0, observe=observe), B * len(sizes)).view(B, -1)  # (B, n)
    sizes = open_sizes(sizes, given)  # (B or 1, n)
    return (means.cpu() * (sizes / sizes.sum(1, keepdim=True))).sum(1)


@torch.no_grad()
def chain_rule(denoiser, x0, score=None, chunk=4096):
    """Exact -log p of each row of x0 (B, T) if it is written in one order: (B,) nats per token, in T forwards.

    score(probs (N, V), position (N,), generator): a strategy of sampling.STRATEGIES; at every forward the open position
    that scores highest (the first of equals) is the next, its token is scored, and then shown (DUEL, arXiv 2603.01367).
    The order is a function of what is visible, never of what is still hidden: over all x0, p sums to 1. None: from left
    to right. Where the denoiser writes in blocks, one is finished before the next.
    """
    (B, T), device = x0.shape, next(denoiser.parameters()).device
    x0 = x0.to(device)
    x_t, row, total = torch.full_like(x0, denoiser.mask_id), torch.arange(B, device=device), torch.zeros(B)
    L, place = int(block_sizes(denoiser, T)[0]), torch.arange(T, device=device)
    for t in range(T):
        where = row * T + t  # (B,)
        if score:
            is_open = (x_t == denoiser.mask_id) & (place < (t // L + 1) * L)  # (B, T) as many in every row
            where = is_open.flatten().nonzero().squeeze(1)  # (B·n,)
        logits = denoiser(x_t, where)  # (B or B·n, V)
        if score:
            parts = zip(logits.split(chunk), (where % T).split(chunk), strict=True)
            scores = torch.cat([score(l.float().softmax(1), p, None) for l, p in parts]).view(B, -1)  # (B, n)
            best = row * scores.shape[1] + scores.argmax(1)  # (B,)
            where, logits = where[best], logits[best]
        token = x0.flatten()[where]  # (B,)
        total = total + token_nll(logits, token).double().cpu()
        x_t.view(-1)[where] = token
    return total / T


def runs(windows, batch_size):
    """Slices that cut a list of windows into batches of neighbours of equal length."""
    start = 0
    while start < len(windows):
        stop = start + 1
        while stop < min(len(windows), start + batch_size) and len(windows[stop]) == len(windows[start]):
            stop += 1
        yield slice(start, stop)
        start = stop


def bound_windows(denoiser, windows, masks, seed=0, batch_size=32, observe=None, given=None):
    """The bound of every window under `masks` stratified masks each, from fixed seeds.

    windows: list of (T_w,) long tensors, each run of equal lengths is batched. Returns nats per token and the hidden
    fraction, both (windows, masks). The blocks of a window share one time, so that this fraction is that of each.
    observe(logits, target, fraction (n,)) is told the hidden fraction of each token's window. given (windows,): the
    first tokens of each are given, and tokens and fractions are those of what follows.
    """
    generator = torch.Generator().manual_seed(seed)
    slices = (torch.arange(masks) + 1 - torch.rand(len(windows), masks, generator=generator)) / masks
    nats, hidden = torch.zeros(slices.shape), torch.zeros(slices.shape)
    for run in runs(windows, batch_size):
        x0 = torch.stack(windows[run])
        first = None if given is None else given[run]
        sizes = open_sizes(block_sizes(denoiser, x0.shape[1]), first)  # (B or 1, n)
        for j in range(masks):
            k = (slices[run, j, None] * sizes).ceil().long()  # (B, n), each uniform on 1..size over its slice
            hidden[run, j] = share = k.sum(1) / sizes.sum(1)
            tell = observe and (lambda l, y, b, share=share, n=sizes.shape[1]: observe(l, y, share[b.cpu() // n]))
            nats[run, j] = bound(denoiser, x0, generator, k, tell, first)
    return nats, hidden

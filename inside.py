"""What a model does with a sentence of the reader's: holes and beliefs, the bound as it settles, who looks at whom.

    rate, x_t, masked = hidden(x0, tokenizer, mask_id, t=0.5, schedule="cosine")
    steps, holes = believed(loaded, x0, x_t)
    for masks, bits, error in settling(loaded, x0): ...
    for layer, part, weights in looks(denoiser, x_t): ...          # weights (H, queries, keys)

Shapes: B rows (one here), T tokens, V real tokens, N holes, H heads, D head width.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import diffusion
import sampling
from eco_hybrid import EcoBlock
from traces import Trace, Watch

MEAN_SPAN = 3.0  # words of a span, as masking_strategy span has it in training


def hidden(x0, tokenizer, mask_id, t, schedule="linear", spans=False, seed=0):
    """x0 (1, T) at time t of the forward process: its mask rate, x_t (1, T), masked (1, T) bool.

    The same seed hides more and more of the same order as t grows: a slider only ever adds holes.
    """
    T, generator = x0.shape[1], torch.Generator().manual_seed(seed)
    rate = float(diffusion.rate_and_weight(torch.tensor([t], dtype=torch.float64), schedule)[0])
    k = torch.tensor([[math.ceil(rate * T - 1e-9)]])
    noise, coin = torch.rand(1, T, generator=generator), torch.rand(1, T, generator=generator)
    if spans:
        starts = torch.from_numpy(tokenizer.word_starts())[x0.cpu()]  # (1, T) bool
        masked = diffusion.hide_spans(noise, coin, k[0], starts, MEAN_SPAN) & (k > 0)
    else:
        masked = diffusion.hide_tokens(noise, k, T)
    masked = masked.to(x0.device)
    return rate, x0.masked_fill(masked, mask_id), masked


def believed(loaded, x0, x_t, prompt="", meta=None):
    """What a denoiser thinks stands at each hole of x_t (1, T), all judged at once: (Trace, list of dicts).

    The trace has the holes, and then the likeliest token in each. The list, one a hole: position, truth and guess
    (texts), the truth's probability and rank (1 is the best), the entropy in nats.
    """
    denoiser, tokenizer = loaded.denoiser, loaded.tokenizer
    watch, trace = Watch(), Trace(tokenizer, denoiser.mask_id, prompt, meta, canvas=x_t[0])
    if not bool((x_t == denoiser.mask_id).any()):
        return trace, []
    found = {}

    def observe(probs, row, position):  # (N, V), (N,), (N,)
        watch(probs, row, position)
        truth = probs.gather(1, x0[0, position][:, None])  # (N, 1)
        found.update(p=truth.squeeze(1).tolist(), rank=((probs > truth).sum(1) + 1).tolist())

    for step in sampling.denoise(denoiser, x_t, steps=1, temperature=0.0, observe=observe):
        trace.add(step, top=watch.of(0))
    text = lambda i: tokenizer.token_bytes(i).decode(errors="replace")  # noqa: E731
    holes = []
    for (at, (entropy, top)), p, rank in zip(watch.of(0).items(), found["p"], found["rank"], strict=True):
        truth = dict(position=at, truth=text(int(x0[0, at])), guess=text(top[0][0]))
        holes.append(truth | dict(probability=p, rank=rank, entropy=entropy))
    return trace, holes


def settling(loaded, x0, batches=32, rows=8, seed=0):
    """The bound of x0 (1, T) from more and more masks: yields (masks so far, bits a character, standard error).

    Each batch of `rows` masks is stratified, the batches are independent: the error is that of their mean, None for the
    first. An autoregressive model's likelihood is exact: one figure, error 0.
    """
    model, (_, T) = loaded.denoiser, x0.shape
    scale = T / math.log(2) / max(1, len(loaded.tokenizer.decode(x0[0].tolist())))
    if hasattr(model, "nll"):
        yield 0, float(model.nll(x0)[0]) * scale, 0.0
        return
    generator, means = torch.Generator().manual_seed(seed), []
    for n in range(1, batches + 1):
        means.append(float(diffusion.bound(model, x0.expand(rows, -1), generator).double().mean()) * scale)
        spread = torch.tensor(means, dtype=torch.float64)
        yield n * rows, float(spread.mean()), float(spread.std() / math.sqrt(n)) if n > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# attention


def attention_weights(q, k, v=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """The softmax inside F.scaled_dot_product_attention: q (.., Q, D), k (.., K, D) -> (.., Q, K)."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
    return scores.float().softmax(-1).nan_to_num()  # a query that may see nothing looks at nothing


class Recorder(TorchFunctionMode):
    """Sees each attention of this thread's forward, whatever model it is in, and changes nothing."""

    def __init__(self):
        super().__init__()
        self.layer, self.kind, self.found = None, None, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            layer = len(self.found) if self.layer is None else self.layer
            self.found.append((layer, self.kind, attention_weights(*args, **kwargs)))
        return func(*args, **kwargs)


@torch.no_grad()
def looks(denoiser, x_t):
    """[(layer, part, weights (H, queries, keys))] of one forward of x_t (1, T), layers from 0.

    part: "attention"; in EcoHybrid's own layers "write" (slots look at nothing, then at the tokens), "think" (slots at
    slots) and "read" (tokens at slots). A local layer's weights are the mean over its pieces.
    """
    recorder, hooks = Recorder(), contextlib.ExitStack()

    def enter(layer, kind):
        def before(module, args):
            recorder.layer, recorder.kind = layer, kind

        return before

    with hooks:
        for i, block in enumerate(getattr(denoiser, "blocks", [])):  # a hub model has none: each attention is a layer
            hooks.callback(block.register_forward_pre_hook(enter(i, type(block))).remove)
        with recorder:
            denoiser(x_t)
    out, seen = [], {}
    for layer, kind, weights in recorder.found:
        n = seen[layer] = seen.get(layer, -1) + 1
        out.append((layer, ("write", "think", "read")[n] if kind is EcoBlock else "attention", weights.mean(0)))
    return out

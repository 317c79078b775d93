"""Sampling: one loop that fills every MASK of a canvas by iterative unmasking.

    for step in denoise(denoiser, x, strategy="confidence", steps=16, generator=g):     # x (B, T) holds MASK
        print(step.forwards, step.x)                                                    # the last step has no MASK

    for step in write(gpt, x, generator=g): ...       # the autoregressive twin: from left to right, one token a forward

Each step makes one forward, first chooses positions (a strategy: a small function in STRATEGIES), then draws their
tokens. Given tokens may stand anywhere, so that continuing, infilling and writing freely are the same thing.
Shapes: B rows, T tokens, V real tokens, N open positions of the whole batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Step:
    x: torch.Tensor  # (B, T) long: the canvas after this step
    revealed: torch.Tensor  # (B, T) bool: decided in this step
    confidence: torch.Tensor  # (B, T): probability of the token where decided; of the likeliest one where open
    forwards: int  # forwards so far


# ---------------------------------------------------------------------------------------------------------------------
# strategies: scores (N,) of the open positions; those that score highest are decided first


def random_order(probs, position, generator):
    """Any order, the same for every token: one token a forward draws from the model's joint distribution."""
    return torch.rand(len(probs), generator=generator).to(probs.device)


def left_to_right(probs, position, generator):
    return -position.float()


def confidence(probs, position, generator):
    """Probability of the likeliest token (MaskGIT, arXiv 2202.04200)."""
    return probs.amax(1)


def margin(probs, position, generator):
    """Likeliest token against the second likeliest (arXiv 2502.06768)."""
    first, second = probs.topk(2, dim=1).values.unbind(1)
    return first - second


def entropy(probs, position, generator):
    return (probs * probs.clamp(min=1e-30).log()).sum(1)


STRATEGIES = {
    "random": random_order,
    "left_to_right": left_to_right,
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "threshold": confidence,  # and every position surer than the threshold (Fast-dLLM, arXiv 2505.22618)
}

# ---------------------------------------------------------------------------------------------------------------------
# drawing tokens


def filter_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (N, V) -> probabilities (N, V): temperature, then the k likeliest, then the fewest that hold top_p.

    The token that crosses top_p is kept, so that the kept mass is at least top_p.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    # the largest logit at 0, and a temperature within fp32's range: no inf - inf, no inf / inf
    logits = (logits - logits.amax(1, keepdim=True)) / min(max(temperature, 1e-30), 1e30)
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -math.inf)
    probs = logits.softmax(1)
    if top_p < 1:
        ordered, index = probs.sort(1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(1) - ordered >= top_p, 0)  # mass before the token
        probs = torch.zeros_like(probs).scatter(1, index, ordered)
    return probs / probs.sum(1, keepdim=True)


def draw(probs, generator=None):
    """One token a row of probs (N, V), by inverting the distribution function in float64: exact (N,) long."""
    device = probs.device
    probs = probs.cpu() if device.type == "mps" else probs  # which has no float64
    cumulative = probs.double().cumsum(1)
    u = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64).to(probs.device)
    token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(1)
    return torch.minimum(token, (probs > 0).long().cumsum(1).argmax(1)).to(
        device
    )  # u rounded up to 1: the last possible token


def check_drawing(temperature, top_k, top_p):
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, needs to be 0 or more")
    if not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"top_p is {top_p} and top_k {top_k}; they need 0 < top_p <= 1 and top_k >= 0")


def allowed(logits, forbid, step):
    """logits (N, V) of a step's forward in fp32, without the ids `forbid`. Raises FloatingPointError: not finite."""
    logits = logits.float()
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"the model's logits are not finite at step {step}; the checkpoint is broken")
    if len(forbid):
        never = torch.tensor(forbid, device=logits.device)
        logits = logits.index_fill(1, never, -math.inf)  # a copy: the tensor may be the model's own
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# the loop


@torch.no_grad()
def denoise(
    denoiser,
    x,
    strategy="confidence",
    steps=16,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    threshold=0.9,
    confidence_stop=0.0,
    forbid=(),
    lengths=None,
    generator=None,
):
    """Fill every MASK of x (B, T) in at most `steps` forwards; yields a Step after each.

    A row with n open positions gets its share of n / steps positions a step, or, with fewer than `steps` open
    positions, one a step. Positions are chosen by the undisturbed probabilities, tokens are drawn with temperature
    (0 takes the likeliest), top_k and top_p. A row whose open positions all have a likeliest token above
    confidence_stop (0 is off) is finished in that step, under every strategy. forbid: ids that are never drawn.
    lengths (B,): rows are right-padded. generator: a CPU generator. As this is a generator function, errors come with
    the first step that is asked for: ValueError for a wrong setting, FloatingPointError for logits that are not finite.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
    if steps < 1:
        raise ValueError(f"{steps} steps cannot fill anything; use 1 or more")
    check_drawing(temperature, top_k, top_p)
    if not 0 <= confidence_stop <= 1:
        raise ValueError(f"confidence_stop is {confidence_stop}, needs 0 <= confidence_stop <= 1; 0 is off")
    x = x.clone()
    (B, T), device = x.shape, x.device
    is_open = x == denoiser.mask_id  # (B, T)
    wanted = is_open.sum(1)  # (B,)
    steps = min(steps, int(wanted.max()))
    if steps == 0:  # nothing to fill
        yield Step(x, is_open, torch.ones(B, T, device=device), 0)
    for i in range(steps):
        due = wanted * (i + 1) // steps  # (B,) positions decided after this step: an even share a step
        quota = (due - wanted + is_open.sum(1)).clamp(min=1)  # a short row is done early, threshold may be ahead
        where = is_open.flatten().nonzero().squeeze(1)  # (N,)
        if len(where) == 0:
            return
        logits = allowed(denoiser(x, where, lengths), forbid, i + 1)  # (N, V)
        probs = logits.softmax(1)
        sure = torch.ones(B * T, device=device)  # 1 where nothing is open
        sure[where] = probs.amax(1)

        score = torch.full((B * T,), -math.inf, device=device)
        score[where] = STRATEGIES[strategy](probs, where % T, generator)
        order = score.view(B, T).argsort(dim=1, descending=True, stable=True)  # (B, T)
        reveal = (order.argsort(1) < quota[:, None]) & is_open  # (B, T)
        if strategy == "threshold":
            reveal |= (score.view(B, T) > threshold) & is_open
        if confidence_stop > 0:
            reveal |= (sure.view(B, T).amin(1, keepdim=True) > confidence_stop) & is_open

        chosen = reveal.flatten()[where]  # (N,)
        token = draw(filter_probs(logits[chosen], temperature, top_k, top_p), generator)  # (n,)
        x.view(-1)[where[chosen]] = token
        sure[where[chosen]] = probs[chosen].gather(1, token[:, None]).squeeze(1)
        is_open = is_open & ~reveal
        yield Step(x.clone(), reveal, sure.view(B, T), i + 1)


@torch.no_grad()
def write(gpt, x, temperature=1.0, top_k=0, top_p=1.0, forbid=(), generator=None):
    """Fill every MASK of x (B, T) from left to right by the autoregressive twin; yields a Step after each forward.

    Rows may be open at different places: each place is drawn in all rows that want it, and what was given or drawn
    before is read once, by way of the cache. Nothing to the right is seen, so that a blank would be filled blindly.
    A Step's confidence is 0 where a place is still open. Settings and errors are those of `denoise`.
    """
    check_drawing(temperature, top_k, top_p)
    (B, T), device = x.shape, x.device
    inputs = F.pad(x, (1, 0), value=gpt.mask_id)  # (B, 1 + T) a copy, BOS in front
    x = inputs[:, 1:]  # what is written here is read there
    is_open = x == gpt.mask_id  # (B, T)
    places = is_open.any(0).nonzero().flatten().tolist()
    if not places:
        yield Step(x.clone(), is_open, torch.ones(B, T, device=device), 0)
    cache, read = gpt.cache(B, T), 0
    for i, t in enumerate(places):
        reveal = is_open & (torch.arange(T, device=device) == t)  # (B, T)
        rows = reveal[:, t]
        logits = gpt.extend(inputs[:, read : t + 1], cache, read)  # (B, V)
        logits, read = allowed(logits[rows], forbid, i + 1), t + 1  # (n, V)
        x[rows, t] = draw(filter_probs(logits, temperature, top_k, top_p), generator)  # (n,)
        is_open = is_open & ~reveal
        sure = (~is_open).float()
        sure[rows, t] = logits.softmax(1).gather(1, x[rows, t][:, None]).squeeze(1)
        yield Step(x.clone(), reveal, sure, i + 1)

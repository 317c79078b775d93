"""Sampling: one loop that fills every MASK of a canvas by iterative unmasking.

    for step in denoise(denoiser, x, strategy="confidence", steps=16, generator=g):     # x (B, T) holds MASK
        print(step.forwards, step.x)                                                    # the last step has no MASK

    for step in write(gpt, x, generator=g): ...       # the autoregressive twin: from left to right, one token a forward

Each step makes one forward, first chooses positions (a strategy: a small function in STRATEGIES), then draws their
tokens. Given tokens may stand anywhere, so that continuing, infilling and writing freely are the same thing.
On top of any strategy: blocks from left to right, of which each step reads only the open one (block_length); decided
tokens that are hidden again (remask, loop); an end that is an end (eos_id, min_new); no n-gram twice (no_repeat).
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


def dilated(probs, position, generator):
    """Far apart first: bits of the position in reverse order, so that what is decided together hardly depends on each
    other (van der Corput's sequence; dilated unmasking, arXiv 2506.19037)."""
    place = torch.zeros_like(position)
    for bit in range(16):
        place = 2 * place + (position >> bit & 1)
    return -place.float()


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
    "dilated": dilated,
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "threshold": confidence,
    "entropy_bounded": entropy,
}


def above_threshold(score, threshold, entropy_bound):
    """Every position surer than the threshold (Fast-dLLM, arXiv 2505.22618)."""
    return score > threshold


def within_entropy_bound(score, threshold, entropy_bound):
    """The surest positions, as long as the entropies of those before add up to less than entropy_bound nats: what is
    lost by drawing them at once is then bounded (EB-Sampler, arXiv 2505.24857)."""
    entropies, order = (-score).sort(dim=1, stable=True)  # (B, T), inf where nothing is open
    before = F.pad(entropies.cumsum(1)[:, :-1], (1, 0))
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, before < entropy_bound)


# strategies that decide more than a step's share where the model is sure: score (B, T) -> (B, T) bool
AHEAD = {"threshold": above_threshold, "entropy_bounded": within_entropy_bound}

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
    if not torch.isfinite(logits.sum()):  # one that is not makes the sum so; forty times faster than asking each
        raise FloatingPointError(f"the model's logits are not finite at step {step}; the checkpoint is broken")
    if len(forbid):
        never = torch.tensor(forbid, device=logits.device)
        logits = logits.index_fill(1, never, -math.inf)  # a copy: the tensor may be the model's own
    return logits


def without(logits, rows, token):
    """logits (N, V) with no chance for `token` where rows (N,) bool."""
    return logits.masked_fill(rows[:, None] & (torch.arange(logits.shape[1], device=logits.device) == token), -math.inf)


def forbid_repeats(logits, x, mask_id, row, place, n):
    """logits (N, V) at `place` (N,) of `row` (N,) in x (B, T), without tokens that would make an n-gram stand twice in
    its row, whichever of its places is decided last. A place where that leaves nothing stays as it is, and the two that
    one token makes at once are not compared (the middle of aaa)."""
    if n > x.shape[1]:
        return logits
    grams = x.unfold(1, n, 1)  # (B, W, n)
    never = torch.zeros_like(logits, dtype=torch.bool)
    for at in range(n):  # the place is the at-th of its n-gram
        others = [i for i in range(n) if i != at]
        begin = place - at  # (N,)
        mine = grams[row, begin.clamp(0, grams.shape[1] - 1)][:, None, others]  # (N, 1, n - 1)
        there = grams[row]  # (N, W, n)
        same = (mine == there[..., others]).all(2) & (mine != mask_id).all(2) & (there != mask_id).all(2)  # (N, W)
        same &= ((begin >= 0) & (begin < grams.shape[1]))[:, None]
        i, w = same.nonzero().unbind(1)
        never[i, there[i, w, at]] = True
    never &= ~(never | logits.isneginf()).all(1, keepdim=True)
    return logits.masked_fill(never, -math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def blocks(is_open, steps, block_length, again=False):
    """[(start, end, steps)] of the blocks of is_open (B, T) that hold open positions; block_length 0: one is all.

    Steps are shared out by open positions, at least one a block and, unless `again`, at most one a position.
    Raises ValueError if there are fewer steps than blocks.
    """
    T = is_open.shape[1]
    starts = [s for s in range(0, T, block_length or T) if is_open[:, s : s + (block_length or T)].any()]
    if steps < len(starts):
        raise ValueError(f"{steps} steps cannot fill {len(starts)} blocks; use as many, or a larger block_length")
    counts = [int(is_open[:, s : s + (block_length or T)].sum(1).max()) for s in starts]
    plan, done = [], 0
    for b, s in enumerate(starts):
        due = max(done + 1, steps * sum(counts[: b + 1]) // sum(counts))
        due = min(due, steps - (len(starts) - 1 - b))  # the blocks that follow need one each
        plan.append((s, min(T, s + (block_length or T)), due - done if again else min(due - done, counts[b])))
        done = due
    return plan


def risen(steps, loop):
    """How many of the rising steps are done after each step, of how many: the share of positions that is decided.

    loop (ReMDM-loop, arXiv 2503.00307): for this part of the steps it stands still at nine tenths.
    """
    still = int(loop * steps)
    rising = steps - still
    turn = rising * 9 // 10
    return [i + 1 if i < turn else max(turn, i + 1 - still) for i in range(steps)], rising


def last_of(given, lengths=None):
    """The last place of each row of given (B, T) bool that is true, within the row's length: (B, 1), -1 if none is."""
    place = torch.arange(given.shape[1], device=given.device)
    inside = given if lengths is None else given & (place < lengths[:, None])
    return torch.where(inside, place, -1).amax(1, keepdim=True)


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
    entropy_bound=0.1,
    confidence_stop=0.0,
    remask=0.0,
    loop=0.0,
    block_length=0,
    cache=True,
    eos_id=None,
    min_new=0,
    no_repeat=0,
    forbid=(),
    lengths=None,
    generator=None,
    observe=None,
):
    """Fill every MASK of x (B, T) in at most `steps` forwards; yields a Step after each.

    A row with n open positions gets its share of n / steps positions a step, or, with fewer than `steps` open
    positions, one a step. Positions are chosen by the undisturbed probabilities, tokens are drawn with temperature
    (0 takes the likeliest), top_k and top_p. A row whose open positions all have a likeliest token above
    confidence_stop (0 is off) is finished in that step, under every strategy. forbid: ids that are never drawn.

    remask: decided tokens are hidden again with this probability a step, or less where not all could be decided in time
    (ReMDM-cap, arXiv 2503.00307); with `loop` only in that part of the steps, in which nothing else is decided.
    block_length: blocks of so many positions are filled from left to right; nothing behind a block is seen. Where the
    model can, keys and values of what stands before a block are computed once a block (`cache`): an approximation, as
    they do not see the block's new tokens. A model trained with blocks takes its own (0, or the same number): its keys
    and values are exact, and those of each block are computed once in all.
    eos_id: open positions behind an EOS that was drawn are filled with it at once; min_new: it is not drawn in a row's
    first so many open positions. no_repeat: n-grams of this length that would stand twice in a row are not drawn; two
    tokens of one step do not know of each other. lengths (B,): rows are right-padded. generator: a CPU generator.
    observe(probs (N, V), row (N,), position (N,)) sees the undisturbed probabilities of the open positions before each
    step; it changes nothing.

    As this is a generator function, errors come with the first step that is asked for: ValueError for a wrong setting,
    FloatingPointError for logits that are not finite.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
    if steps < 1:
        raise ValueError(f"{steps} steps cannot fill anything; use 1 or more")
    check_drawing(temperature, top_k, top_p)
    for name, value in dict(confidence_stop=confidence_stop, remask=remask, loop=loop).items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, needs 0 <= {name} <= 1; 0 is off")
    if loop == 1 or loop and not remask:
        raise ValueError(f"loop is {loop} and remask {remask}: loop needs to be below 1, and a remask above 0")
    if block_length < 0 or min_new < 0 or no_repeat < 0 or no_repeat == 1 or not entropy_bound >= 0:
        raise ValueError(
            f"block_length is {block_length}, min_new {min_new}, entropy_bound {entropy_bound}, no_repeat {no_repeat}; "
            "they need to be 0 or more, no_repeat 0 or from 2 on"
        )
    own = getattr(denoiser, "block_length", 0)
    if own and block_length not in (0, own):
        raise ValueError(f"block_length is {block_length}, and the model was trained with {own}; use that, or 0")
    block_length = block_length or own
    x = x.clone()
    (B, T), device, mask_id = x.shape, x.device, denoiser.mask_id
    place = torch.arange(T, device=device)
    is_open = x == mask_id  # (B, T)
    ours, last_given = is_open.clone(), last_of(~is_open, lengths)  # what was open at first; (B, 1)
    if block_length and (ours & (place < last_given)).any():
        raise ValueError(
            "with block_length nothing behind a blank is seen; fill blanks without it, or by another model"
        )
    early = ours & (ours.cumsum(1) <= min_new)  # (B, T) too early for EOS
    cached = bool(block_length and cache and getattr(denoiser, "can_cache", False))
    memory = denoiser.cache(B, T) if cached else None
    forwards, held = 0, 0  # positions whose keys and values the cache holds
    if not ours.any():  # nothing to fill
        yield Step(x, is_open, torch.ones(B, T, device=device), 0)
        return

    for start, end, n_steps in blocks(is_open, steps, block_length, again=remask > 0):
        here = (place >= start) & (place < end)  # (T,)
        wanted = (is_open & here).sum(1)  # (B,)
        rises, rising = risen(n_steps, loop)
        for i in range(n_steps):
            where = (is_open & here)[:, :end].flatten().nonzero().squeeze(1)  # (N,) in B·end
            if len(where) == 0:
                break
            row, at = where // end, where % end
            # --- one forward, of the open block alone where the cache holds what is before it
            begin, past = (held if cached and (i or own) else 0), {}
            held = start  # for the next forward: what this one reads before the block is decided
            if cached:
                past = dict(cache=memory, start=begin)
            seen = None if lengths is None else lengths.clamp(max=end)
            logits = denoiser(x[:, begin:end], row * (end - begin) + at - begin, seen, **past)
            forwards += 1
            logits = allowed(logits, forbid, forwards)  # (N, V)
            if min_new and eos_id is not None:
                logits = without(logits, early[row, at], eos_id)
            probs = logits.softmax(1)
            if observe:
                observe(probs, row, at)
            sure = (~is_open).float()  # (B, T) 1 where nothing is open
            sure[row, at] = probs.amax(1)

            # --- which positions
            open_now = (is_open & here).sum(1)
            hide = torch.zeros_like(is_open)
            if remask and i < n_steps - 1 and (not loop or rises[i] == (rises[i - 1] if i else 0)):
                decided = ours & here & ~is_open & (x != eos_id if eos_id is not None else True)  # (B, T)
                spare = (wanted - wanted * rises[i] // rising) / (wanted - open_now).clamp(min=1)
                hide = decided & (torch.rand(B, T, generator=generator).to(device) < spare.clamp(max=remask)[:, None])
            due = wanted * rises[i] // rising  # (B,) positions decided after this step: an even share a step
            quota = due - wanted + open_now + hide.sum(1)  # a short row is done early, AHEAD may be ahead
            quota = quota.clamp(min=0 if remask else 1)
            score = torch.full((B, T), -math.inf, device=device)
            score[row, at] = STRATEGIES[strategy](probs, at, generator)
            order = score.argsort(dim=1, descending=True, stable=True)  # (B, T)
            reveal = order.argsort(1) < quota[:, None]  # (B, T)
            if strategy in AHEAD:
                reveal |= AHEAD[strategy](score, threshold, entropy_bound)
            if confidence_stop > 0:
                reveal |= sure.masked_fill(~(is_open & here), 1).amin(1, keepdim=True) > confidence_stop
            reveal &= is_open & here

            # --- their tokens
            chosen = reveal[row, at]  # (N,)
            new, row, at = logits[chosen], row[chosen], at[chosen]  # (n, V), (n,), (n,)
            if no_repeat:
                new = forbid_repeats(new, x, mask_id, row, at, no_repeat)
            token = draw(filter_probs(new, temperature, top_k, top_p), generator)  # (n,)
            x[row, at] = token
            sure[row, at] = probs[chosen].gather(1, token[:, None]).squeeze(1)
            x[hide] = mask_id
            is_open = is_open & ~reveal | hide
            sure[hide] = 0
            if eos_id is not None:  # what stands behind an end is not wanted
                ended = ((x == eos_id) & ours & (place > last_given)).cumsum(1) > 0  # (B, T)
                over = ended & is_open
                x[over], sure[over] = eos_id, 1.0
                reveal, is_open = reveal | over, is_open & ~over
            yield Step(x.clone(), reveal, sure, forwards)


@torch.no_grad()
def write(
    gpt,
    x,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    eos_id=None,
    min_new=0,
    no_repeat=0,
    forbid=(),
    lengths=None,
    generator=None,
    observe=None,
):
    """Fill every MASK of x (B, T) from left to right by the autoregressive twin; yields a Step after each forward.

    Rows may be open at different places: each place is drawn in all rows that want it, and what was given or drawn
    before is read once, by way of the cache. Nothing to the right is seen, so that a blank would be filled blindly.
    A Step's confidence is 0 where a place is still open. Settings and errors are those of `denoise`.
    """
    check_drawing(temperature, top_k, top_p)
    (B, T), device = x.shape, x.device
    inputs = F.pad(x, (1, 0), value=gpt.mask_id)  # (B, 1 + T) a copy, BOS in front
    x = inputs[:, 1:]  # what is written here is read there
    place = torch.arange(T, device=device)
    is_open = x == gpt.mask_id  # (B, T)
    early, last_given = is_open & (is_open.cumsum(1) <= min_new), last_of(~is_open, lengths)
    places = is_open.any(0).nonzero().flatten().tolist()
    if not places:
        yield Step(x.clone(), is_open, torch.ones(B, T, device=device), 0)
    cache, read, forwards = gpt.cache(B, T), 0, 0
    for t in places:
        reveal = is_open & (place == t)  # (B, T)
        rows = reveal[:, t].nonzero().squeeze(1)  # (n,)
        if len(rows) == 0:  # an end came before it
            continue
        logits = gpt.extend(inputs[:, read : t + 1], cache, read)  # (B, V)
        forwards, read = forwards + 1, t + 1
        logits = allowed(logits[rows], forbid, forwards)  # (n, V)
        if min_new and eos_id is not None:
            logits = without(logits, early[rows, t], eos_id)
        probs, at = logits.softmax(1), torch.full_like(rows, t)  # (n, V), (n,)
        if observe:
            observe(probs, rows, at)
        new = forbid_repeats(logits, x, gpt.mask_id, rows, at, no_repeat) if no_repeat else logits
        x[rows, t] = draw(filter_probs(new, temperature, top_k, top_p), generator)  # (n,)
        if eos_id is not None:  # what stands behind an end is not wanted
            over = is_open & reveal[:, t : t + 1] & (x[:, t : t + 1] == eos_id) & (place > t) & (t > last_given)
            x[over] = eos_id
            reveal = reveal | over
        is_open = is_open & ~reveal
        sure = (~is_open).float()  # (B, T)
        sure[rows, t] = probs.gather(1, x[rows, t][:, None]).squeeze(1)
        yield Step(x.clone(), reveal, sure, forwards)

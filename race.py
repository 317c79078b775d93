"""Two models write behind the same prompt, on one clock; what it took each, and what a judge says.

    for who, step, seconds in race([denoise(...), write(...)]): ...

A racer's clock runs only while it computes, and the one whose clock is behind goes on: both appear together, and
neither waits for the other or disturbs its time.
"""

import math
import statistics
import time
from os.path import commonprefix

import torch

import quality

FIGURES = ("seconds", "first", "tokens", "tokens_per_second", "forwards", "tokens_per_forward", "memory", "judge")


def race(racers):
    """racers: iterators of Steps. Yields (which, Step, its own seconds) until all are done."""
    racers, clocks = [iter(r) for r in racers], [0.0] * len(racers)
    running = list(range(len(racers)))
    while running:
        i = min(running, key=clocks.__getitem__)
        start = time.perf_counter()
        step = next(racers[i], None)
        clocks[i] += time.perf_counter() - start
        if step is None:
            running.remove(i)
        else:
            yield i, step, clocks[i]


def peak_memory(denoiser, decode):
    """Bytes: the weights and the most that tensors hold besides at any moment of decode(), on the model's device."""
    weights = sum(t.numel() * t.element_size() for t in (*denoiser.parameters(), *denoiser.buffers()))
    device = next(denoiser.parameters()).device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        decode()
        return weights + torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        decode()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # every allocation and release, in their order
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return weights + peak


def judged(judge, prompt, text):
    """Bits that the judge (checkpoint.Loaded, autoregressive) needs for a byte of text behind its beginning, prompt.

    In the judge's own tokens, so that writers with other tokenizers compare. None where it cannot: nothing was written,
    or it is longer than the judge's window.
    """
    ids, given = (judge.tokenizer.encode(t) for t in (text, prompt))
    g = len(commonprefix([ids, given]))
    n_bytes = sum(len(judge.tokenizer.token_bytes(i)) for i in ids[g:])
    if not n_bytes or len(ids) > judge.denoiser.config.max_seq_len:
        return None
    return float(quality.judged(judge, [ids], [g])[0]) / math.log(2) / n_bytes


def written(ids, given, eos_id, mask_id):
    """(ids up to the first EOS that was written, how many of them were written): given is a set of places."""
    end = next((i for i, t in enumerate(ids) if t == eos_id and i not in given), len(ids))
    return ids[:end], sum(i not in given and t != mask_id for i, t in enumerate(ids[:end]))


def figures(seconds, forwards, tokens):
    """Of one run: seconds at each of its steps, forwards in all, tokens that were written and are shown."""
    total = seconds[-1] if seconds else 0.0
    return {
        "seconds": total,
        "first": seconds[0] if seconds else None,
        "tokens": tokens,
        "tokens_per_second": tokens / total if total else None,
        "forwards": forwards,
        "tokens_per_forward": tokens / forwards if forwards else None,
    }


def medians(rows):
    """Dictionaries of figures → one of their medians; None counts nowhere."""
    found = {k: [row[k] for row in rows if row.get(k) is not None] for k in FIGURES}
    return {k: statistics.median(v) if v else None for k, v in found.items()}

"""What counting achieves: unigram and interpolated bigram models of the same tokens, the yardstick of `--check`.

    nats = bigram(train, val, V)          # total -log p of val, in nats

Both are fitted on the training split alone and score every token of the validation split, the first one too.
"""

import numpy as np

MOST_TOKENS = 1 << 24  # a longer training split is counted up to here


def unigram_probs(train, V):
    counts = np.bincount(train, minlength=V)
    return (counts + 0.5) / (len(train) + 0.5 * V)


def unigram(train, val, V):
    """Total nats of val (tokens,) under token frequencies of train (tokens,), half a count added to each id."""
    return float(-np.log(unigram_probs(train, V))[val].sum())


def bigram(train, val, V):
    """Total nats of val under bigrams with absolute discounting, interpolated with the unigram.

    p(b | a) = max(c(ab) - d, 0) / c(a) + d · kinds(a) / c(a) · p(b), with d = n1 / (n1 + 2 n2) (Ney et al. 1994).
    The first token is scored by the unigram.
    """
    train, val, p = np.asarray(train, np.int64), np.asarray(val, np.int64), unigram_probs(train, V)
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    d = once / (once + 2 * twice) if once else 0.5
    context = np.bincount(pairs // V, weights=counts, minlength=V)  # c(a)
    kinds = np.bincount(pairs // V, minlength=V)  # different b after a
    a, b = val[:-1], val[1:]
    at = np.searchsorted(pairs, a * V + b).clip(max=len(pairs) - 1)
    seen = np.where(pairs[at] == a * V + b, counts[at], 0)
    c = np.maximum(context[a], 1)
    rest = np.where(context[a] > 0, d * kinds[a] / c, 1.0)  # an unknown context leaves all to the unigram
    return float(-np.log(p[val[0]]) - np.log(np.maximum(seen - d, 0) / c + rest * p[b]).sum())

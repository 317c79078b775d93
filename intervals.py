"""Means, their errors and 95 % intervals: what evaluate.py and compare.py share. No torch: a report takes a moment."""

import math
import statistics

import numpy as np

from config import check


def ratio(numerator, denominator):
    """Sum over sum, and its standard error over windows; both (windows,). Linearised, as for any ratio of means."""
    n, r = len(numerator), float(numerator.sum() / denominator.sum())
    residual = numerator - r * denominator
    return r, float((residual**2).sum() * n / max(1, n - 1)) ** 0.5 / float(denominator.sum())


def mean_error(values):
    """Mean of independent numbers and its standard error, None for a single one."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def t95(freedom):
    """How many standard errors a 95 % interval reaches to each side: Student's t, as few values say little of their
    spread. From 3 degrees of freedom on the series in 1/freedom around the normal's 1.96 is right to 0.001."""
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    terms = (1.95996, 2.37228, 2.82250, 2.55585, 1.58954, 0.73290)
    return sum(term / freedom**power for power, term in enumerate(terms))


def wilson(right, n):
    """95 % interval (low, high) of a share of which `right` of n were seen; all of 0 to 1 where n is 0.

    E. B. Wilson, JASA 22 (1927) 209: the shares p whose distance from right / n is at most 1.96 · sqrt(p (1 - p) / n).
    It holds for few and for extreme counts too, and never leaves 0 to 1.
    """
    check(0 <= right <= n, f"{right} of {n} is no share")
    if n == 0:
        return 0.0, 1.0
    z2, p = 1.959964**2, right / n
    reach = math.sqrt(z2 * (p * (1 - p) + z2 / (4 * n)) / n)
    low, high = ((p + z2 / (2 * n) + side) / (1 + z2 / n) for side in (-reach, reach))
    return (low if right else 0.0), (high if right < n else 1.0)  # exactly, without rounding


SAME = ("data_sha256", "split", "windows")  # what two eval.json share that can be paired
SAME_MASKS = ("masks", "seed", "batch_size")  # and two bounds; an exact likelihood has no masks


def paired(ours, theirs):
    """Bits/byte by which `ours` costs more than `theirs` (two eval.json) on the same windows and masks: (mean, SE)."""
    exact = "exact" in (ours.get("likelihood"), theirs.get("likelihood"))
    unlike = f"{ours.get('checkpoint')} and {theirs.get('checkpoint')} were not scored alike: "
    for key in (*SAME, *(() if exact else SAME_MASKS)):
        check(ours.get(key) == theirs.get(key), f"{unlike}{key} {ours.get(key)} and {theirs.get(key)}")
    a, b = (r.get("per_window", {}).get("bytes") for r in (ours, theirs))
    check(a and a == b, f"{unlike}per_window, the bytes of the windows")
    a, b, n_bytes = (
        np.array(v, dtype=float)
        for v in (ours["per_window"]["nats"], theirs["per_window"]["nats"], ours["per_window"]["bytes"])
    )
    return ratio((a - b) / math.log(2), n_bytes)


def average(scores):
    """Several eval.json of the same windows as one, with the mean cost of each window."""
    windows = [s["per_window"] for s in scores]
    check(all(w["bytes"] == windows[0]["bytes"] for w in windows), "the seeds were scored on different windows")
    return scores[0] | {"per_window": windows[0] | {"nats": np.mean([w["nats"] for w in windows], axis=0)}}


def difference(ours, theirs):
    """Two equally long lists of eval.json, one pair a seed → by how many bits/byte `ours` costs more: a dict.

    relative: as a share of what `theirs` costs. windows: SE over windows of the mean over seeds, for another text;
    seeds: SE over seeds, for another training. reach: half the 95 % interval, by the seeds where there are several,
    else by the windows; of: how many. Raises ValueError where the two were not scored alike.
    """
    each = [paired(a, b)[0] for a, b in zip(ours, theirs, strict=True)]
    a, b = average(ours), average(theirs)
    mean, windows = paired(a, b)
    level = float(sum(b["per_window"]["nats"])) / math.log(2) / sum(b["per_window"]["bytes"])
    seeds, n = mean_error(each)[1], len(b["per_window"]["bytes"])
    error, n, of = (windows, n, "windows") if seeds is None else (seeds, len(each), "seeds")
    reach = t95(n - 1) * error if n > 1 else math.inf
    return dict(mean=mean, relative=mean / level, windows=windows, seeds=seeds, reach=reach, of=f"{n} {of}")

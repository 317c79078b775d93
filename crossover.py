"""When does diffusion overtake its autoregressive twin? Best validation against training operations, and a verdict.

    python run_experiments.py --suite crossover --output_root checkpoints/crossover --seeds 3 --jobs 2 --execute
    python crossover.py checkpoints/crossover        # what that ends with: reads the plan and the finished runs

Every run has a budget of so many epochs and a learning-rate schedule of its own; its best validation counts. A kind's
best so far at a budget is that of the best of its budgets up to there, by the mean over seeds. Writes crossover.json
and crossover.png.
"""

import json
import math
import statistics
from pathlib import Path

from checkpoint import replace
from config import Parser, run_main
from intervals import difference, mean_error, paired
from plot import read_metrics


def plus_minus(values):
    mean, error = mean_error(values)
    return f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


def budgets(runs, scores):
    """{kind: [a dict for each budget]}. runs: (kind, epochs, seed) -> the plan's row; scores: the same -> eval.json."""
    points = {}
    for kind, epochs in sorted({k[:2] for k in runs}):
        keys = sorted(k for k in runs if k[:2] == (kind, epochs))
        row, bits = runs[keys[0]], [scores[k]["bits_per_byte"]["mean"] for k in keys]
        mean, error = mean_error(bits)
        best = statistics.fmean(scores[k]["step"] for k in keys)
        points.setdefault(kind, []).append(
            dict(epochs=epochs, steps=row["max_steps"], seeds=[k[2] for k in keys], bits_per_byte=mean,
                 standard_error=error, each=bits, best_step=best, operations=row["operations"],
                 operations_to_best=best * row["operations_a_step"])
        )  # fmt: skip
    return points


def best_so_far(points, scores, ours="transformer", theirs="autoregressive"):
    """What `ours` costs more than `theirs`, bits/byte, each at its best budget so far: a dict for each budget.

    Paired over the seeds that both have; its error over seeds, and over windows (of the mean over seeds).
    """
    lines = []
    for epochs in sorted({p["epochs"] for kind in (ours, theirs) for p in points.get(kind, [])}):
        so_far = [[p for p in points.get(kind, []) if p["epochs"] <= epochs] for kind in (ours, theirs)]
        if not all(so_far):
            continue
        a, b = (min(some, key=lambda p: p["bits_per_byte"]) for some in so_far)
        seeds = [s for s in a["seeds"] if s in b["seeds"]]
        if not seeds:
            continue
        pairs = [(scores[ours, a["epochs"], s], scores[theirs, b["epochs"], s]) for s in seeds]
        each = [paired(*pair)[0] for pair in pairs]
        mean, error = mean_error(each)
        over_windows = difference(*map(list, zip(*pairs, strict=True)))["windows"]  # of the mean over seeds
        lines.append(dict(epochs=epochs, best_epochs=[a["epochs"], b["epochs"]], difference=mean, over_seeds=error,
                          over_windows=over_windows, seeds=seeds, each=each,
                          operations=[p["operations_to_best"] for p in (a, b)]))  # fmt: skip
    return lines


def verdict(lines):
    """One sentence on the lines of best_so_far."""
    if not lines:
        return "no budget has runs of both kinds with a common seed yet"
    d = next((line for line in lines if line["difference"] < 0), lines[-1])
    seeds = "one seed" if d["over_seeds"] is None else f"± {d['over_seeds']:.4f} over {len(d['seeds'])} seeds"
    size = f"{d['difference']:+.4f} bits/byte ({seeds}, ± {d['over_windows']:.4f} over windows)"
    sure = abs(d["difference"]) > 2 * math.hypot(d["over_seeds"] or 0, d["over_windows"])
    size += f", {'more' if sure else 'less'} than two standard errors"
    if d["difference"] >= 0:
        return f"diffusion does not overtake its twin in {d['epochs']:g} epochs; its best so far costs {size}"
    again = [f"{x['epochs']:g}" for x in lines if x["epochs"] > d["epochs"] and x["difference"] >= 0]
    ours, theirs = d["operations"]
    text = f"diffusion overtakes its twin at {d['epochs']:g} epochs ({ours:.3g} operations to its best, {theirs:.3g} "
    return text + f"to the twin's): {size}" + (f"; behind again at {', '.join(again)}" if again else "")


def draw(runs, points, path):
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for i, kind in enumerate(points):
        for row in (row for key, row in runs.items() if key[0] == kind):
            curve = [(r["step"] * row["operations_a_step"], r["bits_per_byte"])
                     for r in read_metrics(row["output_dir"]) if r.get("bits_per_byte")]  # fmt: skip
            axes.plot(*zip(*curve, strict=True), color=f"C{i}", alpha=0.2, linewidth=0.7)
        x, y, e = ([p[k] or 0 for p in points[kind]] for k in ("operations_to_best", "bits_per_byte", "standard_error"))
        axes.errorbar(x, y, e, color=f"C{i}", marker="o", markersize=4, capsize=3, label=kind)
        for p in points[kind]:
            at = p["operations_to_best"], p["bits_per_byte"]
            axes.annotate(f"{p['epochs']:g}", at, textcoords="offset points", xytext=(4, 5), fontsize=8, color=f"C{i}")
    axes.set(xscale="log", xlabel="training operations up to the best validation (numbers: epochs of the schedule)")
    axes.set(ylabel="held-out text, bits per byte", title="best of each budget, mean ± standard error over seeds")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = Parser(__doc__)
    parser.add_argument("output_root", help="folder that run_experiments.py --suite crossover wrote")
    root = Path(parser.parse_args().output_root)
    rows = json.loads((root / "experiment_plan.json").read_text(encoding="utf-8"))["runs"]
    runs = {(r["kind"], r["varied"]["epochs"], r["seed"]): r for r in rows if r["status"] == "done"}
    scores = {k: json.loads((Path(r["output_dir"]) / "eval.json").read_text(encoding="utf-8")) for k, r in runs.items()}
    points = budgets(runs, scores)
    lines = best_so_far(points, scores)
    found = dict(verdict=verdict(lines), budgets=points, best_so_far=lines)
    replace(root / "crossover.json", lambda t: t.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))
    print(f"\n{'kind':<16}{'epochs':>7}{'bits/byte':>18}{'operations':>12}{'to the best':>13}")
    for kind in points:
        for p in points[kind]:
            bits, operations = plus_minus(p["each"]), f"{p['operations']:>12.3g}{p['operations_to_best']:>13.3g}"
            print(f"{kind:<16}{p['epochs']:>7g}{bits:>18}{operations}")
    draw(runs, points, root / "crossover.png")
    print(f"{found['verdict']}\nwrote {root / 'crossover.json'} and {root / 'crossover.png'}")


if __name__ == "__main__":
    run_main(main)

"""Run folders → one PNG: training loss and validation against optimizer steps.

python plot.py checkpoints/quickstart            # writes checkpoints/quickstart/loss.png
"""

import json
from pathlib import Path

from config import Parser, run_main


def read_metrics(run):
    """The records of a run's metrics.jsonl; a line torn by a kill is passed over."""
    records = []
    text = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):  # not splitlines: a sample may hold a U+2028
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def smooth(values, window):
    """Mean of each value and up to `window` - 1 before it."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--output", default="", help="the PNG; empty is loss.png in the first run folder")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run in args.runs:
        records = read_metrics(run)
        losses = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
        bounds = [(r["step"], r["bits_per_byte"]) for r in records if r.get("bits_per_byte") is not None]
        if not losses:
            raise ValueError(f"{run}/metrics.jsonl holds no training step yet")
        steps, values = zip(*losses, strict=True)
        (line,) = left.plot(steps, smooth(values, max(1, len(values) // 20)), label=Path(run).name)
        left.plot(steps, values, alpha=0.2, color=line.get_color(), linewidth=0.8)
        if bounds:
            right.plot(*zip(*bounds, strict=True), marker="o", markersize=3, label=Path(run).name)
            right.annotate(f"{bounds[-1][1]:.3f}", bounds[-1], textcoords="offset points", xytext=(0, 8), ha="center")
        evaluated = Path(run) / "eval.json"
        if evaluated.is_file() and len(args.runs) == 1:
            for name, bits in json.loads(evaluated.read_text())["baselines_bits_per_byte"].items():
                right.axhline(bits, color="grey", linestyle=":", linewidth=1)
                right.annotate(
                    name, (steps[-1], bits), textcoords="offset points", xytext=(0, 3), ha="right", color="grey"
                )
    left.set(title="training loss", xlabel="optimizer step", ylabel="nats per token")
    right.set(title="validation", xlabel="optimizer step", ylabel="bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(args.runs) > 1:
        right.legend(frameon=False)
    output = args.output or Path(args.runs[0]) / "loss.png"
    figure.savefig(output, dpi=120)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_main(main)

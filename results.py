"""What is known of diffusion against its autoregressive twin → docs/results.md, from the files that commands wrote.

    python run_experiments.py --suite crossover --output_root checkpoints/crossover --seeds 3 --jobs 2 --execute
    python benchmark.py sample --ckpt checkpoints/diffusion_hi --twin checkpoints/autoregressive_hi
    python results.py --crossover checkpoints/crossover --frontier checkpoints/benchmark_sample.json

Nothing is measured here and no figure stands here: what a file does not say is a dash.
"""

import shutil
from pathlib import Path

from compare import DASH, get, over_seeds, read_json, read_runs, show
from config import Parser, check, run_main
from intervals import mean_error, t95

KINDS = {"transformer": "diffusion", "autoregressive": "autoregressive"}
# what a row of the twins' table says: (where it stands in a run, how a number is written)
TWINS = {
    "bits/byte of the validation text": ("scores bits_per_byte", ".4f"),
    "how that is known": ("facts likelihood", ""),
    "exact, chain rule from left to right": ("scores chain_rule left_to_right bits_per_byte", ".4f"),
    "exact, chain rule in the sampler's own order": ("scores chain_rule own_order bits_per_byte", ".4f"),
    "tokens guessed right": ("facts accuracy", ".3f"),
    "calibration error": ("scores calibration_error", ".3f"),
    "best step": ("scores step", ",.0f"),
    "training FLOPs up to there": ("facts operations", ".3g"),
    "training of the whole budget, s": ("facts seconds", ",.0f"),
    "tokens/s in training": ("facts rate", ",.0f"),
    "peak memory in training, GiB": ("facts gib", ".2f"),
    "samples: judge's nats/token": ("scores samples judge_nats_per_token", ".3f"),
    "samples: unigram entropy": ("scores samples unigram_entropy", ".3f"),
    "samples: distinct-2": ("scores samples distinct_2", ".3f"),
    "samples: repeated 4-grams": ("scores samples repeated_4grams", ".4f"),
    "samples: impossible aksharas": ("scores samples invalid_aksharas", ".4f"),
}


def table(header, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def interval(each):
    """Mean of what the seeds say, and its 95 % interval by Student's t."""
    mean, error = mean_error(each)
    if error is None:
        return f"{mean:+.4f} (one seed)"
    reach = t95(len(each) - 1) * error
    return f"{mean:+.4f} ({mean - reach:+.4f} to {mean + reach:+.4f})"


def accuracy(run):
    """Share of the scored tokens that the likeliest token was, over all masks."""
    bins = [b for b in run["scores"].get("reliability") or [] if b["n"]]
    return sum(b["n"] * b["accuracy"] for b in bins) / sum(b["n"] for b in bins) if bins else None


# ---------------------------------------------------------------------------------------------------------------------
# the sections


def crossover(found, plan):
    """Lines of section 1. found: crossover.json; plan: experiment_plan.json."""
    points = {(kind, p["epochs"]): p for kind, ps in found["budgets"].items() for p in ps}
    so_far = {line["epochs"]: line for line in found["best_so_far"]}
    lines = []
    for epochs in sorted({e for _, e in points}):
        ours, theirs = (points.get((kind, epochs)) for kind in KINDS)
        line = [f"{epochs:g}", f"{(ours or theirs)['operations']:.3g}"]
        line += [show((p["bits_per_byte"], p["standard_error"]), ".4f") if p else DASH for p in (ours, theirs)]
        line += [f"{p['best_step'] / p['steps']:.0%}" if p else DASH for p in (ours, theirs)]
        best = so_far.get(epochs)
        lines.append([*line, interval(best["each"]) if best else DASH])
    header = ["epochs", "FLOPs", "diffusion: bound", "twin: exact", "best at, diffusion", "best at, twin"]
    tuned = {KINDS[r["kind"]]: [f"{k} {r['varied'][k]:g}" for k in ("dropout", "weight_decay")] for r in plan["runs"]}
    return [
        table([*header, "diffusion less twin, best so far (95 %)"], lines),
        "Bits/byte of held-out text, mean ± standard error over the seeds. Each budget is a training of its own with "
        "a schedule of its own, validated twelve times; its best validation counts (best at: after which share of the "
        "budget), and a kind's best budget so far is compared. "
        + "; ".join(f"{kind} has {', '.join(values)}" for kind, values in tuned.items())
        + ". A bound is an upper limit, so that a difference above zero may be smaller in truth.",
        f"**{found['verdict'][0].upper()}{found['verdict'][1:]}.**",
    ]  # fmt: skip


def best_runs(found, plan):
    """{kind: {seed: run}} of the budget at which each kind is best, as compare.py reads them."""
    best = {}
    for kind in KINDS:
        budget = min(found["budgets"].get(kind, []), key=lambda p: p["bits_per_byte"], default=None)
        check(budget, f"the crossover has no finished run of kind {kind}")
        of = [r for r in plan["runs"] if (r["kind"], r["varied"]["epochs"]) == (kind, budget["epochs"])]
        runs = read_runs([r["output_dir"] for r in of if r["status"] == "done"])
        for run in runs:
            run["facts"] |= dict(accuracy=accuracy(run), epochs=budget["epochs"])
        best[kind] = {str(run["config"]["seed"]): run for run in runs}
    return best


def twins(best):
    lines = []
    for name, (path, form) in TWINS.items():
        cells = [over_seeds(best[kind], path, form) for kind in KINDS]
        if set(cells) != {DASH}:
            lines.append([name, *cells])
    epochs = [f"{next(iter(best[kind].values()))['facts']['epochs']:g}" for kind in KINDS]
    return [
        table(["", f"diffusion, {epochs[0]} epochs", f"twin, {epochs[1]} epochs"], lines),
        f"Mean ± standard error over {len(best['transformer'])} seeds. Tokens guessed right: of a denoiser those that "
        "the masks of the bound hide, at all hidden shares together, with what stands on both sides to be seen; of "
        "the twin each next token. These are not the same task.",
    ]  # fmt: skip


def frontier(found):
    """Lines of section 3. found: the JSON of benchmark.py sample."""
    real, best, rows = found["real_text"], found["verdict"], found["rows"]
    keys = ("unigram_entropy", "distinct_2", "repeated_4grams", "invalid_aksharas")

    def line(row):
        speed = [f"{row['forwards']:.0f}", f"{row['seconds']:.3f}"] if "seconds" in row else [DASH, DASH]
        nats = show(get(row, "quality judge_nats_per_token"), ".3f")
        return [row["strategy"], row["label"], *speed, nats, *(f"{row['quality'][k]:.3f}" for k in keys)]

    config, drift = found["config"], found["drift"]
    header = [
        "way",
        "",
        "forwards",
        "s",
        "judge's nats/token",
        "entropy",
        "distinct-2",
        "4-grams twice",
        "bad aksharas",
    ]
    text = [
        table(header, [line(dict(strategy="real text", label="", quality=real)), *map(line, rows)]),
        f"{config['samples']} prompts of {config['prompt_tokens']} tokens, continued by {config['new_tokens']}, one at "
        f"a time, at temperature {config['temperature']}; medians; {found['machine']['device']}, threads: "
        f"{found['machine']['threads']}. ± over texts. The judge is the twin, which favours its own texts.",
        "**The fastest way as good as one token a forward in random order (judge at most 5 % worse, entropy within "
        f"3 %) is {best['strategy']}, {best['label']}: {best['times_the_reference']:.1f} times its speed (asked: "
        f"{best['goal']:g}), {best['times_the_twin']:.2f} times that of the twin with its cache.**",
    ]
    if drift:
        text.append(f"The cache of blocks of {config['block']} moves predictions by {drift['mean']:.4f} nats on "
                    f"average (KL from what is predicted without it; at most {drift['most']:.3f}).")  # fmt: skip
    return text


def claims(best, found):
    """What earlier projects of this kind stated, beside what was measured."""

    def values(kind, path):
        return [v for v in (get(run, path) for run in best[kind].values()) if v is not None]

    def judge(path, better, form):
        ours, theirs = (values(kind, path) for kind in KINDS)
        if not (ours and theirs):
            return [DASH, DASH, "not measured"]
        (a, e), (b, f) = mean_error(ours), mean_error(theirs)
        apart = 2 * ((e or 0) ** 2 + (f or 0) ** 2) ** 0.5
        verdict = "level" if abs(a - b) <= apart else "confirmed" if (a > b) == (better == "more") else "refuted"
        return [show((a, e), form), show((b, f), form), verdict]

    lines = [
        ["accuracy: 75 % against 25 %", "tokens guessed right", *judge("facts accuracy", "more", ".3f")],
        ["faster in total time", "training tokens/s", *judge("facts rate", "more", ",.0f")],
        ["less memory", "peak in training, GiB", *judge("facts gib", "less", ".2f")],
    ]
    if found:
        plain, twin = (next(r for r in found["rows"] if r["reference"] and r["strategy"].startswith("twin") == of)
                       for of in (False, True))  # fmt: skip
        quick = found["verdict"]
        faster = "refuted" if quick["times_the_twin"] < 1 else f"confirmed for {quick['strategy']}, {quick['label']}"
        seconds = twin["seconds"] / quick["times_the_twin"]
        lines.insert(2, ["", "a text of the section above, s", f"{seconds:.2f} (one token a forward: "
                         f"{plain['seconds']:.2f})", f"{twin['seconds']:.2f}", faster])  # fmt: skip
    return [
        table(["claim", "measured as", "diffusion", "twin", "verdict"], lines),
        "Level: less than two standard errors apart. Equal parameters, batches and tokens on both sides.",
    ]


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = Parser(__doc__)
    parser.add_argument("--crossover", default="checkpoints/crossover", help="output root of --suite crossover")
    parser.add_argument("--frontier", default="", help="JSON of benchmark.py sample; empty leaves that section out")
    parser.add_argument(
        "--commands", default="", help="a text file with the commands that made these, shown on the page"
    )
    parser.add_argument("--output", default="docs/results.md", help="the page; pictures go beside it")
    args = parser.parse_args()
    root, output = Path(args.crossover), Path(args.output)
    for name in ("crossover.json", "experiment_plan.json"):
        check((root / name).is_file(), f"--crossover {root}: no {name}; run_experiments.py --suite crossover writes it")
    found, plan = read_json(root / "crossover.json"), read_json(root / "experiment_plan.json")
    written = read_json(Path(args.frontier)) if args.frontier else {}
    best = best_runs(found, plan)
    facts = next(iter(best["transformer"].values()))["config"]
    seeds, steps = len(best["transformer"]), max(r["max_steps"] for r in plan["runs"])
    known = [get(run, "config train_tokens") for runs in best.values() for run in runs.values()]
    tokens = next((f"{n:,}" for n in known if n), "")  # runs of older code do not state it
    data = Path(*Path(plan["runs"][0]["flags"]["data_dir"]).parts[-2:])
    parts = [
        "# Results: diffusion and its autoregressive twin",
        f"Made by `python results.py` from what the commands below wrote. {facts['parameters']:,} parameters on both "
        f"sides, {tokens or DASH} training tokens ({data}), windows of "
        f"{facts['seq_len']}, {seeds} seeds, up to {steps:,} steps of {facts['rows_a_step'] * facts['seq_len']:,} "
        f"tokens; torch {facts['torch']} on {facts['device']} in {facts['precision'].removeprefix('torch.')}.",
    ]  # fmt: skip
    if args.commands:
        commands = Path(args.commands).read_text(encoding="utf-8").strip().splitlines()
        parts.append("\n".join(f"    {line}" for line in commands))
    parts += ["## 1. When does diffusion overtake on a small corpus?", *crossover(found, plan)]
    picture = root / "crossover.png"
    if picture.is_file():
        shutil.copy(picture, output.parent / "crossover.png")
        parts.append("![best validation against training operations](crossover.png)")
    parts += ["## 2. The twins, each at its best budget", *twins(best)]
    if written:
        parts += ["## 3. Ways of writing: quality against time", *frontier(written)]
        picture = Path(args.frontier).with_suffix(".png")
        if picture.is_file():
            shutil.copy(picture, output.parent / "frontier.png")
            parts.append("![judge's nats per token against forwards and seconds](frontier.png)")
    parts += [f"## {4 if written else 3}. What earlier projects claimed", *claims(best, written)]
    output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    run_main(main)

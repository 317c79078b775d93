"""Run folders → one report: report.html (tables and curves, opens without a network) and report.md (the tables).

    python compare.py checkpoints/diffusion_hi checkpoints/eco_hybrid_hi
    python compare.py checkpoints/*_s? --output_dir report --check_fair      # exit 1 if they are no matched twins

Reads config.json, metrics.jsonl, eval.json, benchmark_sample.json and replay.json (a trace, of sample_diffusion.py
--json) of each run, never a checkpoint. Runs that differ in their seed alone form a group; a difference between groups
is taken seed by seed and window by window.
"""

import itertools
import json
import math
import os
import re
import statistics
from pathlib import Path

import numpy as np

import traces
from config import PROMPTS, Parser, check, one_line, run_main
from intervals import difference, mean_error
from plot import read_metrics, smooth
from report import GREY, Mark, Table, chart, style, to_markdown, to_page

DASH = "–"
FILES = "config.json metrics.jsonl eval.json benchmark_sample.json replay.json".split()
EACH = 6  # up to so many groups each is held against each, more only against the first
# what makes no other experiment: seed, places, machine, what is only looked at, and what follows from the rest
ASIDE = (
    "seed output_dir data_dir preset resume plan check wandb keep log_interval save_interval sample_interval "
    "sample_steps eval_interval eval_masks eval_windows device threads world batch_size grad_accum compile amp "
    "activation_checkpointing torch git_commit operations_a_step train_tokens"
).split()
TWINS = (  # what matched twins share, and why; sizes, masks and losses may differ, they are what is compared
    ("config", "data_sha256 tokenizer_sha256 seq_len", "the same text in the same tokens, with as much context"),
    ("facts", "tokens_a_step steps_done", "as many tokens in as many updates, and none stopped halfway"),
    ("config", "max_steps lr lr_schedule warmup decay", "the schedule: rise and fall are shares of max_steps"),
    ("config", "optimizer beta2 grad_clip ema precision", "the same optimizer, average and rounding"),
    ("scores", "data_sha256 split windows ema", "eval.json is of the same text, by the same kind of weights"),
)  # besides: the set of seeds, parameters up to 1 %, and within a kind, as each kind may have its own best:
TUNED = ("dropout", "weight_decay")
COLUMNS = {  # header: (where it stands in a run, how a number is written)
    "kind": ("config kind", ""),
    "parameters": ("config parameters", ",.0f"),
    "training tokens": ("facts tokens", ",.0f"),
    "epochs": ("facts epochs", ".2f"),
    "training FLOPs": ("facts operations", ".3g"),
    "best validation, bits/byte": ("facts best", ".4f"),
    "bits/byte": ("scores bits_per_byte", ".4f"),
    "likelihood": ("facts likelihood", ""),
    "scored step": ("scores step", ",.0f"),
    "bits/character": ("scores bits_per_character", ".4f"),
    "chain rule left to right, bits/byte": ("scores chain_rule left_to_right bits_per_byte", ".4f"),
    "chain rule in its own order, bits/byte": ("scores chain_rule own_order bits_per_byte", ".4f"),
    "windows of the chain rule": ("scores chain_rule left_to_right windows", ",.0f"),
    "judge": ("scores samples judge", ""),
    "judged, nats/token": ("scores samples judge_nats_per_token", ".3f"),
    "unigram entropy": ("scores samples unigram_entropy", ".3f"),
    "distinct 1": ("scores samples distinct_1", ".3f"),
    "distinct 2": ("scores samples distinct_2", ".3f"),
    "distinct 3": ("scores samples distinct_3", ".3f"),
    "repeated 4-grams": ("scores samples repeated_4grams", ".3f"),
    "invalid aksharas": ("scores samples invalid_aksharas", ".4f"),
    "invalid UTF-8": ("scores samples invalid_utf8", ".4f"),
    "questions": ("scores qa accuracy n", ",.0f"),
    "questions right": ("scores qa accuracy", ".3f"),
    "questions right, 95 % interval": ("facts right", ""),
    "one constant answer right": ("scores qa majority", ".3f"),
    "tokens/s": ("facts rate", ",.0f"),
    "training, s": ("facts seconds", ",.0f"),
    "peak memory, GiB": ("facts gib", ".2f"),
}
NOTES = {
    "Runs": "± is the standard error over windows; FLOPs are those up to the scored step; tokens/s is the median.",
    "Groups over seeds": "Mean ± standard error over seeds.",
    "Paired differences": "Of eval.json, window by window: below zero the one named first is better. ± windows: how "
    "far it would move on another text; ± seeds: in other trainings. The 95 % interval goes by the seeds where there "
    "are several (Student's t), else by the windows, and is marked where it leaves out zero.",
    "Settings that differ": "Marked: not as in the first run.",
    "Samples": "The last ones of each training, from the fixed prompts.",
}

# ---------------------------------------------------------------------------------------------------------------------
# reading: a run is a dict of name, config, records (metrics.jsonl), scores (eval.json, {} before it), benchmark, facts


def get(data, path):
    """What stands under a path of keys: text, a finite number or (mean, standard error); else None."""
    for key in path.split():
        data = data.get(key) if isinstance(data, dict) else None
    if isinstance(data, dict):
        return None if get(data, "mean") is None else (get(data, "mean"), get(data, "standard_error"))
    return data if isinstance(data, str) or isinstance(data, int | float) and math.isfinite(data) else None


def rows(data, key):
    return [row for row in data.get(key) or [] if isinstance(row, dict)]


def scored(run):
    """Whether its eval.json holds a likelihood, not answers to questions alone."""
    return "bits_per_byte" in run["scores"]


def series(run, path):
    """[(step, value)] of the records that have both."""
    found = [(get(r, "step"), get(r, path)) for r in run["records"]]
    return [(step, value) for step, value in found if None not in (step, value)]


def times(a, b):
    return None if None in (a, b) else a * b


def derive(run):
    """What a run's files say together."""
    most = lambda path: max((v for _, v in series(run, path)), default=None)  # noqa: E731
    steps, masks, there = most("step"), get(run, "scores masks"), get(run, "config train_tokens")
    a_step = times(get(run, "config rows_a_step"), get(run, "config seq_len"))
    tokens, rates = times(steps, a_step), [v for _, v in series(run, "seconds tokens_a_second")]
    right = [get(run, f"scores qa accuracy {end}") for end in ("low", "high")]  # shares of the questions
    return dict(
        tokens_a_step=a_step,
        steps_done=steps,
        tokens=tokens,
        epochs=tokens / there if tokens and there else None,
        operations=times(get(run, "scores step") or steps, get(run, "config operations_a_step")),
        best=min((v for _, v in series(run, "bits_per_byte")), default=None),
        likelihood=f"bound ({masks} masks)" if masks else get(run, "scores likelihood"),
        right=" to ".join(show(v, ".3f") for v in right) if None not in right else None,
        rate=statistics.median(rates) if rates else None,
        seconds=most("seconds training"),
        gib=times(most("seconds peak_bytes"), 2**-30),
    )


def read_json(path):
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        check(isinstance(data, dict), "no JSON object")
        return data
    except ValueError as e:  # not JSON, not UTF-8, not ours
        raise RuntimeError(f"{path} is damaged ({one_line(e)}); mend it or leave it out") from e


def read_run(folder, name):
    config, metrics, *others = (folder / f for f in FILES)
    check(config.is_file(), f"{folder} is no run folder: there is no {config.name} in it")
    records = [r for r in read_metrics(folder) if isinstance(r, dict)] if metrics.is_file() else []
    lines = metrics.read_bytes().split(b"\n") if metrics.is_file() else []
    if len(records) < sum(bool(line.strip()) for line in lines) - 1:  # a kill tears the last line, no other
        raise RuntimeError(f"{metrics} is damaged (only {len(records)} lines are readable); leave the run out")
    scores, benchmark, replay = (read_json(path) if path.is_file() else {} for path in others)
    run = dict(name=name, config=read_json(config), records=records, scores=scores, benchmark=rows(benchmark, "rows"))
    run |= dict(replay=replay)
    return run | {"facts": derive(run)}


def read_runs(folders):
    """Each run, named by the shortest end of its path that no other shares."""
    paths = [Path(folder).resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        check(path.is_dir(), f"there is no run folder {folder}")
        check(paths.count(path) == 1, f"{folder} is given twice")
    ends = [[path.parts[-k:] for k in range(1, len(path.parts) + 1)] for path in paths]
    alone = lambda end: sum(end in others for others in ends) == 1  # noqa: E731
    return [read_run(path, str(Path(*next(filter(alone, end))))) for path, end in zip(paths, ends, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# groups over seeds, settings, fairness


def show(value, form):
    if isinstance(value, tuple):
        return " ± ".join(f"{v:{form}}" for v in value if v is not None)
    return DASH if value is None else value if isinstance(value, str) else f"{value:{form}}"


def text(value):
    """A setting as people read it; of a hash its beginning."""
    if isinstance(value, str):
        return value[:12] if re.fullmatch(r"[0-9a-f]{40,}", value) else value or DASH
    return DASH if value is None else f"{value:.15g}" if isinstance(value, float) else json.dumps(value)


def group(runs):
    """[{seed: run}]: what differs only in its seed stands together; a seed that comes again begins another group."""
    groups = {}
    for run in runs:
        same = json.dumps({k: v for k, v in run["config"].items() if k not in ASIDE}, sort_keys=True)
        seed = text(run["config"].get("seed"))
        copy = next(n for n in itertools.count() if seed not in groups.get((same, n), {}))
        groups.setdefault((same, copy), {})[seed] = run
    return list(groups.values())


def label(group):
    """Runs t_s1, t_s2 → t_s{1,2}"""
    names = [run["name"] for run in group.values()]
    start = os.path.commonprefix(names)
    end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]
    return f"{start}{{{','.join(n[len(start) : len(n) - len(end)] for n in names)}}}{end}" if names[1:] else start


def over_seeds(group, path, form):
    """Mean ± standard error of what the runs of a group show; what they share as it is."""
    values = [get(run, path) for run in group.values()]
    found = [v[0] if isinstance(v, tuple) else v for v in values if v is not None]
    if len(set(found)) < 2 or isinstance(found[0], str):
        return ", ".join(dict.fromkeys(show(v, form) for v in found)) or DASH
    return show(mean_error(found), form) + ("" if len(found) == len(values) else f" ({len(found)} of {len(values)})")


def against(ours, theirs):
    """One line of the table of differences: group `ours` minus group `theirs`."""
    seeds = [(s, s) for s in ours if s in theirs] or list(zip(ours, theirs, strict=False))
    seeds = [(a, b) for a, b in seeds if scored(ours[a]) and scored(theirs[b])]
    line = [f"{label(ours)} − {label(theirs)}", ", ".join(a if a == b else f"{a} with {b}" for a, b in seeds) or DASH]
    try:
        check(seeds, "not evaluated yet")
        d = difference([ours[a]["scores"] for a, _ in seeds], [theirs[b]["scores"] for _, b in seeds])
    except ValueError as e:
        return [*line, *[DASH] * 5, str(e)]
    low, high = d["mean"] - d["reach"], d["mean"] + d["reach"]
    interval = f"{low:+.4f} to {high:+.4f}" if math.isfinite(low) else DASH
    line += [f"{d['mean']:+.4f}", f"{d['relative']:+.2%}", show(d["windows"], ".4f"), show(d["seeds"], ".4f")]
    return [*line, Mark(interval) if low > 0 or high < 0 else interval, d["of"]]


def differing(runs):
    """{field: [its text in each run]} of the settings in which the runs differ."""
    fields = {field: [text(run["config"].get(field)) for run in runs] for run in runs for field in run["config"]}
    return {k: v for k, v in fields.items() if len(set(v)) > 1 and k not in ("output_dir", "resume")}


def who(names, values):
    """Who has which value, on one line."""
    having = {v: ", ".join(n for n, w in zip(names, values, strict=True) if v == w) for v in values}
    return "; ".join(f"{v} in {those}" for v, those in having.items())


def unfair(runs, groups):
    """{field: who has what} of all that keeps the runs from being matched twins."""
    found = {}

    def match(field, names, values):
        if len(set(values)) > 1:
            found[field] = who(names, values)

    def match_all(runs, part, fields, of=""):
        for field in fields:
            match(field + of, [run["name"] for run in runs], [text(run[part].get(field)) for run in runs])

    for part, fields, _ in TWINS:
        of = " in eval.json" if part == "scores" else ""
        match_all([r for r in runs if part != "scores" or scored(r)], part, fields.split(), of)
    for kind in {text(run["config"].get("kind")): 0 for run in runs}:
        match_all([r for r in runs if text(r["config"].get("kind")) == kind], "config", TUNED, f" of {kind}")
    sizes = [get(run, "config parameters") for run in runs]
    if None in sizes or max(sizes) > 1.01 * min(sizes):
        match("parameters", [run["name"] for run in runs], [show(size, ",.0f") for size in sizes])
    match("seed", [label(g) for g in groups], [", ".join(sorted(g)) for g in groups])
    return found


def tables(runs, groups):
    names = [run["name"] for run in runs]
    columns = {h: c for h, c in COLUMNS.items() if any(get(run, c[0]) is not None for run in runs)}
    table = lambda title, *more: Table(title, NOTES[title], *more)  # noqa: E731
    lines = [[run["name"], *(show(get(run, path), form) for path, form in columns.values())] for run in runs]
    yield table("Runs", ["run", *columns], lines)
    if len(groups) < len(runs):
        lines = [[label(g), ", ".join(g), *(over_seeds(g, *column) for column in columns.values())] for g in groups]
        yield table("Groups over seeds", ["group", "seeds", *columns], lines)
    if groups[1:]:
        pairs = itertools.combinations(groups, 2) if len(groups) <= EACH else ((groups[0], g) for g in groups[1:])
        header = "difference,seeds,bits/byte,relative,± windows,± seeds,95 % interval,over".split(",")
        yield table("Paired differences", header, [against(b, a) for a, b in pairs])
    if fields := differing(runs):
        lines = [[field, *(v if v == values[0] else Mark(v) for v in values)] for field, values in fields.items()]
        yield table("Settings that differ", ["setting", *names], lines, True)
    if wrote := {run["name"]: r for run in runs for r in run["records"] if isinstance(r.get("samples"), list)}:
        texts = list(itertools.zip_longest(*(record["samples"] for record in wrote.values()), fillvalue=DASH))
        prompts = PROMPTS if len(texts) == len(PROMPTS) else range(1, len(texts) + 1)
        header = ["prompt", *(f"{name}, step {record.get('step')}" for name, record in wrote.items())]
        yield table("Samples", header, [[str(p), *map(str, t)] for p, t in zip(prompts, texts, strict=True)], True)


# ---------------------------------------------------------------------------------------------------------------------
# curves, as Plotly's JSON


def seconds(run, step):
    """Seconds of training up to a step: between the logged ones, or at their mean speed behind the last."""
    known = [(0, 0), *series(run, "seconds training")]
    known.append((2 * known[-1][0], 2 * known[-1][1]))
    return float(np.interp(step, *zip(*known, strict=True))) if known[2:] else None


def curves(runs, groups):
    """A group has a colour; its seeds differ in their dashes."""
    marks = {run["name"]: (i, j) for i, g in enumerate(groups) for j, run in enumerate(g.values())}
    styled = [(run, (run["name"], style(*marks[run["name"]]))) for run in runs]
    tokens = lambda run, step: times(step, run["facts"]["tokens_a_step"])  # noqa: E731
    operations = lambda run, step: times(step, get(run, "config operations_a_step"))  # noqa: E731
    for x, place in (("training tokens", tokens), ("training FLOPs", operations), ("seconds of training", seconds)):
        lines = [(*named, [(place(run, s), v) for s, v in series(run, "bits_per_byte")], {}) for run, named in styled]
        yield chart("Validation", x, "bits/byte", lines)
    lines = []
    for run, named in styled:
        xs, loss = [tokens(run, step) for step, _ in series(run, "loss")], [v for _, v in series(run, "loss")]
        faint = dict(mode="lines", opacity=0.2, showlegend=False, hoverinfo="skip")
        lines.append((*named, list(zip(xs, loss, strict=True)), faint))
        lines.append((*named, list(zip(xs, smooth(loss, max(1, len(loss) // 20)), strict=True)), dict(mode="lines")))
    yield chart("Training loss (faint) and its running mean", "training tokens", "nats/token", lines)
    lines, keys = [], ("from", "to", "nats_per_token", "standard_error")
    for run, named in styled:
        bins = [[get(b, key) for key in keys] for b in rows(run["scores"], "by_hidden_fraction")]
        lines.append((*named, [((low + high) / 2, *of) for low, high, *of in bins if None not in (low, high)], {}))
    yield chart("Cross-entropy by hidden fraction (± SE)", "hidden fraction", "nats/token", lines)
    sure = lambda run: [(get(b, "confidence"), get(b, "accuracy")) for b in rows(run["scores"], "reliability")]  # noqa: E731
    lines, diagonal = [(*named, sure(run), {}) for run, named in styled], dict(GREY, x0=0, y0=0, x1=1, y1=1)
    yield chart("Reliability", "confidence", "accuracy", lines, shapes=[diagonal])


def frontiers(benchmarks):
    """Quality against cost, one line a strategy; what a reference reaches is a level across."""
    for x in ("forwards", "seconds"):
        lines, levels = {}, []
        for source, row in ((source, row) for source, measured in benchmarks.items() for row in measured):
            name = str(row.get("strategy")) + (f", {source}" if len(benchmarks) > 1 else "")
            nats = get(row, "quality judge_nats_per_token")
            if isinstance(nats, tuple):
                lines.setdefault(name, []).append((get(row, x), *nats))
                if row.get("reference"):
                    level = dict(xref="paper", x0=0, x1=1, y0=nats[0], y1=nats[0])
                    levels.append(GREY | level | dict(label=dict(text="reference", textposition="start")))
        cost = lambda point: point[0] or 0  # noqa: E731
        named = [(name, style(i), sorted(lines[name], key=cost), {}) for i, name in enumerate(lines)]
        yield chart(f"Samples: quality against {x} (± SE)", x, "judged, nats/token", named, "log", levels)


# ---------------------------------------------------------------------------------------------------------------------


def parts(runs, benchmarks=None):
    """What report.to_page shows of runs: title, verdict, tables, charts, players. benchmarks: {name: rows} besides."""
    groups = group(runs)
    benchmarks = {run["name"]: run["benchmark"] for run in runs if run["benchmark"]} | (benchmarks or {})
    broken = "; ".join(f"{field} ({values})" for field, values in unfair(runs, groups).items())
    verdict = f"Not matched twins: {broken}" if broken else "Matched twins: nothing differs that should not"
    drawn = [figure for figure in (*curves(runs, groups), *frontiers(benchmarks)) if figure]
    players = [(run["name"], traces.html(run["replay"])) for run in runs if run["replay"]]
    return f"{len(runs)} runs" if runs[1:] else "One run", verdict, list(tables(runs, groups)), drawn, players


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--output_dir", default=".", help="folder that receives report.html and report.md (default: .)")
    parser.add_argument("--benchmark", default="", help="a JSON of benchmark.py sample, besides those in run folders")
    parser.add_argument("--check_fair", action="store_true", help="exit 1 if the runs are no matched twins")
    args = parser.parse_args()

    runs = read_runs(args.runs)
    benchmarks = {}
    if args.benchmark:
        benchmarks[args.benchmark] = rows(read_json(Path(args.benchmark)), "rows")
        check(
            benchmarks[args.benchmark], f"--benchmark {args.benchmark} holds no rows; benchmark.py sample writes them"
        )
    title, verdict, found, *shown = parts(runs, benchmarks)
    reports = {"report.html": to_page(title, verdict, found, *shown), "report.md": to_markdown(title, verdict, found)}
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in reports.items():
        (out / name).write_text(content, encoding="utf-8", errors="replace")  # half a surrogate pair is no text
    for field, values in differing(runs).items():
        print(f"{field}: {who([run['name'] for run in runs], values)}")
    print(f"{verdict}\nwrote {' and '.join(str(out / name) for name in reports)}")
    if args.check_fair and verdict.startswith("Not"):
        raise RuntimeError(f"n{verdict[1:]}; train and score them alike")


if __name__ == "__main__":
    run_main(main)

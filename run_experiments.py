"""Matched experiments: a table of runs × seeds, planned, started as processes, resumed and gathered in results.csv.

    python run_experiments.py --data_dir data/processed --output_root checkpoints/ablations --max_steps 2000 \
           --d_model 384 --n_layers 8 --n_heads 8 --d_ff 1024            # the plan: what it would take; nothing starts
    … --execute                           # the same flags: starts what is missing, goes on with what was interrupted
    python run_experiments.py --suite schedule --only "linear_*" --seeds 3 --output_root checkpoints/finalists --execute
    python run_experiments.py --suite crossover --output_root checkpoints/crossover --seeds 3 --jobs 2 --execute

A suite is a few lines of `suites`; the runs of one differ in what it names and in nothing else, which is checked before
anything starts. Every other flag belongs to the trainers and goes to every run. A run: a trainer, then evaluate.py.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import fnmatch
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import dataset
import prepare
import train_autoregressive
import train_diffusion
from checkpoint import MODELS, replace
from config import ExperimentsConfig, MaskConfig, Parser, PrepareConfig, TrainConfig, add_flags, check, parse, run_main
from crossover import plus_minus
from machine import child_environment, script_argv, torchrun
from optimizer import make_optimizers
from plot import read_metrics

SCRIPTS = dict(
    transformer="train_diffusion",
    eco_hybrid="train_eco_hybrid",
    autoregressive="train_autoregressive",
    variant="variants",
)
DEFAULTS = dict(autoregressive=train_autoregressive.OWN)  # what a trainer takes beyond config.py's defaults
ARCHS = dict(baseline="transformer", eco="eco_hybrid")
TWINS = dict(diffusion="transformer", autoregressive="autoregressive")
# dropout and weight decay of each kind on a small corpus read many times, by `--suite regularise`
OWN = dict(transformer=dict(dropout=0.1, weight_decay=0.1), autoregressive=train_autoregressive.OWN)
SCORED = dict(transformer=dict(chain_rule=32), autoregressive={})  # the twin's likelihood is exact without it
OLD = dict(values="own", max_mask_rate=1.0, lr=4e-3)  # what the suite combined begins with
VALIDATIONS = 12  # in a run of a length given in epochs; the best of them is the early-stopped model
CLOSE = 0.01  # share by which matched runs may differ in what is matched
PROCESSES = 12  # seconds in which a trainer and evaluate.py start, import, read and save

# ---------------------------------------------------------------------------------------------------------------------
# the suites: name -> rows of (run, kind of model, flags). Ours are the flags in OURS: a length, what prepare.py and
# evaluate.py are told. A run is compared with the one of the same ending in the first row's kind, else the first row


def suites(epochs):
    """epochs: list of numbers, or [] for a suite's own."""
    product, one = itertools.product, "transformer"
    times, masks = ("discrete", "continuous"), ("token", "span")
    rates, schedules, weights = ((0.0, 1.0), (0.1, 1.0), (0.0, 0.8)), ("linear", "cosine"), ("elbo", "low_var", "mix")
    peaks = (("muon", 4e-3), ("muon", 2e-3), ("muon", 8e-3), ("adamw", 7e-4), ("adamw", 3.5e-4), ("adamw", 1.4e-3))
    parts = dict(positions_relative=dict(positions="relative"), positions_learned=dict(positions="learned"),
                 positions_none=dict(positions="none"), own_values=dict(values="own"),
                 attention_gate=dict(attention_gate=True), gelu=dict(feed_forward="gelu"),
                 relu2=dict(feed_forward="relu2"), layer_norm=dict(norm="layer"), sandwich_norm=dict(norm="sandwich"),
                 no_qk_norm=dict(norm="no_qk"))  # fmt: skip
    eco = dict(memory_slots=(32, 16, 64), conv_kernel=(7, 11), attn_every=(0, 2))
    return {
        "seed": [(f"{a}_{t}_{m}", kind, dict(time_mode=t, masking_strategy=m))
                 for (a, kind), t, m in product(ARCHS.items(), times, masks)],
        "schedule": [(f"{s}_{w}_{a:g}-{b:g}", one,
                      dict(mask_schedule=s, loss_weight=w, min_mask_rate=a, max_mask_rate=b))
                     for s, w, (a, b) in product(schedules, weights, rates)],
        "architecture": [("full", one, {}), *((name, "variant", named) for name, named in parts.items()),
                         *((f"local_{w}", one, dict(window=w)) for w in (32, 64, 128)),
                         ("hybrid", "eco_hybrid", {}), ("pure", "eco_hybrid", dict(attn_every=0))],
        "combined": [("before", "variant", OLD), *((name, "variant", OLD | named) for name, named in dict(
                         values=dict(values="mixed"), rates=dict(max_mask_rate=0.8),
                         values_rates=dict(values="mixed", max_mask_rate=0.8),
                         values_rates_lr=dict(values="mixed", max_mask_rate=0.8, lr=8e-3),
                     ).items())],
        "optimizer": [(f"{o}_{lr:g}_decay{w:g}_ema{e:g}", one, dict(optimizer=o, lr=lr, weight_decay=w, ema=e))
                      for (o, lr), w, e in product(peaks, (0.1, 0.0), (0.999, 0.0))],
        "tokenizer": [(f"{t}_{v}", one, dict(data=dict(tokenizer=t, vocab_size=v)))
                      for t, v in product(("bpe", "unigram"), (4096, 8192, 16384))],
        "eco": [("transformer", one, {})]
               + [(f"eco_{k}{v}", "eco_hybrid", {k: v}) for k, values in eco.items() for v in values],
        "crossover": [(f"{a}_{e:g}epochs", kind, OWN[kind] | dict(epochs=e) | SCORED[kind])
                      for (a, kind), e in product(TWINS.items(), epochs or [4, 8, 16, 32])],
        "regularise": [(f"{a}_dropout{d:g}_decay{w:g}_{e:g}epochs", kind, dict(dropout=d, weight_decay=w, epochs=e))
                       for (a, kind), e, d, w in product(TWINS.items(), epochs or [20], (0.0, 0.1, 0.3), (0.1, 0.3))],
    }  # fmt: skip


OURS = ("epochs", "data", "chain_rule")
UNMATCHED = ("tokenizer",)  # another vocabulary is another embedding and another text in tokens: bits/byte compare

# ---------------------------------------------------------------------------------------------------------------------
# planning


class Run:
    """A row of a suite with one seed: its flags, and what the trainer's own parser and models make of them."""

    def __init__(self, name, kind, named, flags, data):
        """named: what the suite sets; flags: the whole command line; data: dataset.Data."""
        self.name, self.kind, self.named, self.data, self.flags = name, kind, named, data, flags
        self.script = f"{SCRIPTS[kind]}.py"
        self.set()
        with torch.device("meta"):  # sizes without memory
            model = MODELS[kind][1](self.sizes)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.operations_a_step = model.training_flops(self.run.seq_len) * self.fields["rows_a_step"]
        linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
        optimizers = make_optimizers(model, self.run.optimizer, self.run.lr, 1.0, self.run.beta2)
        groups = [g for optimizer in optimizers for g in optimizer.param_groups]  # which of them decay, and what is in:
        self.groups = [(g["weight_decay"] > 0, {p in linear for p in g["params"]}) for g in groups]
        if "epochs" in named:
            self.last(named["epochs"] * len(data.train) / self.tokens_a_step)

    def set(self, **changes):
        self.flags = self.flags | changes
        argv, defaults = script_argv(self.script, self.flags)[2:], DEFAULTS.get(self.kind, {})
        self.mask, sizes, self.run = parse("", MaskConfig, MODELS[self.kind][0], TrainConfig, argv=argv, **defaults)
        meta = self.data.meta
        self.sizes = dataclasses.replace(sizes, vocab_size=meta["vocab_size"], max_seq_len=self.run.seq_len)
        self.out, self.steps = Path(self.run.output_dir), self.run.max_steps
        self.fields = dict(kind=self.kind)  # as in the trainer's config.json
        for config in (self.mask, self.sizes, self.run):
            self.fields |= dataclasses.asdict(config)
        rows, hashes = self.run.batch_size * self.run.grad_accum, (self.data.hash, meta["tokenizer"]["sha256"])
        self.fields |= dict(rows_a_step=rows, data_sha256=hashes[0], tokenizer_sha256=hashes[1])
        self.tokens_a_step = rows * self.run.seq_len

    def last(self, steps):
        """Give the run this many steps; a length in epochs brings its validations with it."""
        steps = max(1, round(steps))
        self.set(max_steps=steps, **({"eval_interval": max(1, steps // VALIDATIONS)} if "epochs" in self.named else {}))

    def again(self, seed):
        """The same with another seed, in a folder of its own."""
        run = copy.copy(self)
        run.set(seed=seed, output_dir=f"{self.out}_seed{seed}")
        return run

    def commands(self, resume=False):
        """Both command lines: training, evaluation."""
        scored = dict(ckpt=self.out, data_dir=self.run.data_dir, device=self.run.device)
        scored |= {k: v for k, v in self.named.items() if k == "chain_rule"}
        return script_argv(self.script, self.flags | dict(resume=resume)), script_argv("evaluate.py", scored)

    def seconds(self, probe):
        """Expected, of training, validation and evaluation. A forward takes a third of a training pass."""
        windows = math.ceil(len(self.data.val) / self.run.seq_len)
        some = min(windows, self.run.eval_windows or windows)
        times = math.ceil(self.steps / (self.run.eval_interval or self.steps))
        exact = self.kind == "autoregressive"  # it takes no masks
        forwards = windows + some * times if exact else 16 * windows + some * times * self.run.eval_masks
        forwards += 2 * self.run.seq_len * min(windows, self.named.get("chain_rule", 0))  # in two orders
        a_forward = probe["step"] / 3 / (self.run.batch_size * self.run.grad_accum)  # of a window
        return self.steps * probe["step"] + forwards * a_forward + PROCESSES


def trainer_flags(tokens):
    """What argparse left over, as {flag: value}, a switch True. The trainers' parsers say whether such flags exist."""
    flags, last = {}, ""
    for token in tokens:
        if token.startswith("--"):
            last, given, value = token[2:].partition("=")
            flags[last] = value if given else True
        else:
            check(flags.get(last) is True, f"unrecognized arguments: {token}; --help lists the flags")
            flags[last] = token
    for name in ("output_dir", "resume", "plan"):
        check(name not in flags, f"--{name} is for a single run: here it follows from --output_root and --execute")
    return flags


def names(kind):
    """The flags of a trainer."""
    fields = itertools.chain(*map(dataclasses.fields, (MaskConfig, MODELS[kind][0], TrainConfig)))
    own = {f.name for f in fields if f.metadata["flag"]}
    return own | {f"no_{name}" for name in own} | {"debug"}


def prepared(folder, **flags):
    """A folder of prepare.py, made where it is missing."""
    if not (folder / "meta.json").is_file():
        prepare.prepare(PrepareConfig(output_dir=str(folder), **flags))
    return folder


def make_runs(cfg, given):
    """The runs of a suite, seed by seed. cfg: ExperimentsConfig; given: the trainers' flags of the command line."""
    rows, root = suites([float(e) for e in cfg.epochs.split(",") if e])[cfg.suite], Path(cfg.output_root)
    for pattern in (wanted := cfg.only.split(",") if cfg.only else []):
        check(fnmatch.filter([name for name, *_ in rows], pattern), f"--only: suite {cfg.suite} has no run {pattern!r}")
    rows = [row for row in rows if not wanted or any(fnmatch.fnmatch(row[0], pattern) for pattern in wanted)]
    taken = set().union(*(flags for *_, flags in rows))
    in_epochs, own_data = "epochs" in taken, "data" in taken
    check(in_epochs or not cfg.epochs, f"--epochs is for the suites crossover and regularise, not for {cfg.suite}")
    check(not (cfg.data_dir and (own_data or cfg.input)), "--data_dir is prepared already; --input names other text")
    for name in given:
        mine = name.removeprefix("no_") in taken | ({"max_steps", "eval_interval"} if in_epochs else set())
        check(not mine, f"--{name} is what suite {cfg.suite} sets")
    first = dict(sample_interval=0, keep=0) | ({} if cfg.data_dir else dict(preset="tiny"))
    known, loaded, runs = set().union(*map(names, MODELS)), {}, []
    for name, kind, named in rows:
        told = named.get("data", dict(vocab_size=1024))
        folder = root / "_".join(["data", *(map(str, told.values()) if own_data else [])])
        folder = Path(cfg.data_dir) if cfg.data_dir else prepared(folder, input=cfg.input, **told)
        loaded[folder] = loaded.get(folder) or dataset.load(folder)
        flags = first | {k: v for k, v in given.items() if k in names(kind) or k not in known}
        flags |= {k: v for k, v in named.items() if k not in OURS}
        flags |= dict(data_dir=folder, output_dir=root / name)
        runs.append(Run(name, kind, named, flags, loaded[folder]))
    return runs + [run.again(run.run.seed + i) for i in range(1, cfg.seeds) for run in runs]


def reference(run, runs):
    """The run that a run is compared with: of its seed and length, the first, if possible one of the same ending."""
    same = [r for r in runs if r.run.seed == run.run.seed and r.named.get("epochs") == run.named.get("epochs")]
    ending = lambda r: r.name.partition("_")[2]  # noqa: E731
    twins = [r for r in same if r.kind == same[0].kind != run.kind and ending(r) == ending(run)]
    return (twins or same)[0]


def match(runs, by, probes):
    """Refuse runs that are not matched; with by flops or time, give them the steps that make them so first."""
    amount, unit = dict(
        params=(lambda r: r.parameters, "parameters"),
        flops=(lambda r: r.operations_a_step * r.steps, "operations"),
        time=(lambda r: probes[key(r)]["step"] * r.steps, "seconds"),
    )[by]
    wrong = []
    for run in runs:
        other = reference(run, runs)
        if by != "params" and other is not run:
            run.last(amount(other) / amount(run) * run.steps)
        ours, theirs = (r.fields | {"optimizer_groups": r.groups} for r in (run, other))
        may = {"kind", "output_dir", *run.named, *other.named}
        may |= {"max_steps", "eval_interval"} if by != "params" else set()
        for k in (ours.keys() & theirs.keys()) - may:
            if ours[k] != theirs[k]:
                wrong.append(f"{run.name} has {k} {ours[k]}, {other.name} {theirs[k]}")
        more = amount(run) / amount(other) - 1
        if abs(more) > CLOSE:
            values = f"{amount(run):,.0f} {unit}, {other.name} {amount(other):,.0f} ({more:+.1%})"
            wrong.append(f"{run.name} has {values}")
    more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    check(not wrong, f"not matched by {by}: {'; '.join(sorted(wrong)[:4])}{more}")


# ---------------------------------------------------------------------------------------------------------------------
# expected time and memory


def key(run):
    """Runs of one key take the same time a step."""
    same = "batch_size grad_accum optimizer amp device threads activation_checkpointing".split()
    return f"{run.kind} {dataclasses.replace(run.sizes, dropout=0.0)} {[getattr(run.run, k) for k in same]}"


def probe(kind, mask, sizes, run, threads):
    """Seconds of a step of the real loop, and the most bytes it held."""
    with tempfile.TemporaryDirectory() as folder:
        short = dict(output_dir=f"{folder}/run", threads=run.threads or threads, max_steps=3, log_interval=1, keep=0)
        short |= dict(eval_interval=0, eval_windows=1, eval_masks=1, sample_interval=0, compile=False, check=False)
        train_diffusion.train(kind, mask, sizes, dataclasses.replace(run, **short, wandb=False), quiet=True)
        clock = [record["seconds"] for record in read_metrics(f"{folder}/run") if "loss" in record]
    times = [b["training"] - a["training"] for a, b in itertools.pairwise(clock)]  # without the first, which warms up
    return dict(step=min(times), bytes=max(c["peak_bytes"] for c in clock))


def measure(runs, threads, known):
    """{key: probe} of all runs, each in a process of its own; what is `known` is not measured again."""
    todo = {key(r): (r.kind, r.mask, r.sizes, r.run, threads) for r in runs if key(r) not in known}
    if not todo:
        return known
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return known | dict(zip(todo, pool.map(probe, *zip(*todo.values(), strict=True)), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# what a run folder says


def read_json(path):
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def failure(run):
    return run.out.with_name(f"{run.out.name}.failed.json")


def finished(run):
    """Whether a run was trained with just these flags to its last step, and evaluated after that."""
    old = read_json(run.out / "config.json")
    other = old.get("max_steps") != run.steps or train_diffusion.differences(old, run.fields)
    if other or "bits_per_byte" not in read_json(run.out / "eval.json"):  # there is none, or of questions alone
        return False
    last = [r["step"] for r in read_metrics(run.out) if "bits_per_byte" in r][-1:]
    return last == [run.steps] and (run.out / "eval.json").stat().st_mtime >= (run.out / "latest.pt").stat().st_mtime


def result(run):
    """The run's row of results.csv."""
    failed = read_json(failure(run))
    row = dict(name=run.name, seed=run.run.seed, kind=run.kind, parameters=run.parameters,
               tokens=run.steps * run.tokens_a_step, operations=run.steps * run.operations_a_step)  # fmt: skip
    figures = "bits_per_byte standard_error likelihood best_step tokens_a_second peak_mib seconds".split()
    row |= dict.fromkeys(figures) | dict(status="failed" if failed else "unfinished")
    if finished(run):
        scores = read_json(run.out / "eval.json")
        bits, clock = scores["bits_per_byte"], [r["seconds"] for r in read_metrics(run.out) if "loss" in r]
        rate, peak = statistics.median(s["tokens_a_second"] for s in clock), max(s["peak_bytes"] for s in clock)
        values = bits["mean"], bits["standard_error"], scores["likelihood"], scores["step"]
        values += rate, peak / 2**20, clock[-1]["training"]
        row |= dict(zip(figures, values, strict=True)) | dict(status="done")
    return row | dict(output_dir=str(run.out), error=(failed.get("lines") or [""])[-1])


def gather(runs, root):
    """Write results.csv of what there is and print the mean ± standard error over seeds; returns the rows."""
    rows = [result(run) for run in runs]

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    replace(root / "results.csv", write)
    print(f"\n{'run':<36}{'seeds':>6}{'bits/byte':>18}{'best step':>11}{'tokens/s':>10}{'MiB':>7}")
    for name in dict.fromkeys(row["name"] for row in rows):
        done = [row for row in rows if row["name"] == name and row["status"] == "done"]
        if done:
            step, rate, peak = (
                statistics.fmean(row[k] for row in done) for k in ("best_step", "tokens_a_second", "peak_mib")
            )
            bits = plus_minus([row["bits_per_byte"] for row in done])
            print(f"{name:<36}{len(done):>6}{bits:>18}{step:>11,.0f}{rate:>10,.0f}{peak:>7,.0f}")
    print(f"wrote {root / 'results.csv'}")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# running


def die_with_parent():
    """In a child of ours: should this process be killed outright, the trainer gets SIGTERM and saves. Linux alone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def execute(runs, jobs, threads):
    """Train and evaluate runs, `jobs` at a time; returns those that failed. A signal is passed on and ends it all."""
    queue, running, failed, caught = list(runs), {}, [], []  # running: process -> (run, what comes next, where it logs)

    def start(run, argv, *more):
        with open(f"{run.out}.log", "ab") as log:
            child = subprocess.Popen(
                argv,
                env=child_environment(OMP_NUM_THREADS=str(threads)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the child through us alone
                preexec_fn=die_with_parent,
            )
            running[child] = run, more, log.tell()
        if caught:  # while it started
            child.send_signal(caught[0])

    def fail(run, code, lines):
        record = json.dumps(dict(code=code, lines=lines), ensure_ascii=False, indent=1) + "\n"
        replace(failure(run), lambda t: t.write_text(record, "utf-8"))
        print(f"FAILED {run.out.name} (exit {code}): {lines[-1] if lines else 'no message'}", flush=True)
        failed.append(run)

    def on_signal(number, frame):
        caught.append(number)
        for child in running:
            child.send_signal(number)

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    while running or (queue and not caught):
        while queue and len(running) < jobs and not caught:
            run = queue.pop(0)
            failure(run).unlink(missing_ok=True)
            old, there = any(run.out.glob("*.pt")), read_json(run.out / "config.json").get("max_steps", run.steps)
            if old and there != run.steps:  # the trainer would go on, on another schedule
                fail(run, 2, [f"error: {run.out} holds a run of {there} steps, not {run.steps}; use another folder"])
            else:
                print(f"{'resume' if old else 'start '} {run.out.name}: {run.steps:,} steps", flush=True)
                start(run, *run.commands(resume=old))
        time.sleep(0.1)
        for child in [c for c in running if c.poll() is not None]:
            run, more, begun = running.pop(child)
            if child.returncode == 0 and more and not caught:
                start(run, *more)
            elif child.returncode == 0 and not more:
                bits = result(run)["bits_per_byte"]
                print(f"done   {run.out.name}: {bits:.4f} bits/byte; {len(queue)} wait", flush=True)
            elif not caught:
                text = Path(f"{run.out}.log").read_bytes()[begun:].decode(errors="replace")
                fail(run, child.returncode, text.strip().splitlines()[-5:])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if caught:
        print("stopped; the same command goes on")
        sys.exit(128 + caught[0])
    return failed


def write_plan(runs, cfg, probes):
    """experiment_plan.json; returns its runs."""
    rows = []
    for run in runs:
        row, measured, failed = result(run), probes[key(run)], read_json(failure(run))
        row = {k: row[k] for k in "name kind seed parameters tokens operations status output_dir".split()}
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in run.flags.items()}
        row |= dict(script=run.script, flags=flags, varied=run.named, max_steps=run.steps, failure=failed or None,
                    operations_a_step=run.operations_a_step, expected_seconds=run.seconds(measured),
                    expected_mib=measured["bytes"] / 2**20)  # fmt: skip
        rows.append(row)
    plan = dict(suite=cfg.suite, match=cfg.match, jobs=cfg.jobs, runs=rows, probes=probes)
    text = json.dumps(plan, ensure_ascii=False, indent=1) + "\n"
    replace(Path(cfg.output_root) / "experiment_plan.json", lambda t: t.write_text(text, encoding="utf-8"))
    return rows


def line(run, cfg, threads):
    """A shell line that trains and evaluates a run anywhere, and goes on with one that was begun."""
    train, score = run.commands()
    if cfg.launcher == "torchrun":
        parts, rest = divmod(run.run.grad_accum, cfg.processes)
        check(not rest, f"--grad_accum {run.run.grad_accum} cannot be shared by --processes {cfg.processes}")
        train = [train[0], *torchrun(cfg.processes), *train[1:], "--grad_accum", str(parts)]  # the last one counts
    there = f"ls {shlex.quote(str(run.out))}/*.pt > /dev/null 2>&1"
    prefix = f"GOMP_SPINCOUNT=30000 OMP_NUM_THREADS={threads}"
    text = f"{prefix} {shlex.join(train)} $({there} && echo --resume) && {prefix} {shlex.join(score)}"
    if cfg.launcher == "slurm":
        job = ["sbatch", "--requeue", "--job-name", run.out.name, "--output", f"{run.out}.log", "--open-mode", "append"]
        text = shlex.join([*job, "--cpus-per-task", str(threads), "--wrap", text])
    return text


def main():
    parser = Parser(__doc__)
    add_flags(parser, [ExperimentsConfig])
    own, rest = parser.parse_known_args(sys.argv[1:])
    cfg = ExperimentsConfig(**{k: v for k, v in vars(own).items() if k != "debug"})
    root, (shard, shards) = Path(cfg.output_root), map(int, cfg.shard.split("/"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // cfg.jobs)
    os.environ.update(child_environment())  # for the processes that measure
    with contextlib.redirect_stdout(sys.stderr) if cfg.print_commands else contextlib.nullcontext():
        runs = make_runs(cfg, trainer_flags(rest))
        before = read_json(root / "experiment_plan.json")
        probes = measure(runs, threads, before.get("probes", {}) if before.get("jobs") == cfg.jobs else {})
        if cfg.suite not in UNMATCHED:
            match(runs, cfg.match, probes)
        root.mkdir(parents=True, exist_ok=True)
        rows = write_plan(runs, cfg, probes)
    mine = [i for i, row in enumerate(rows) if i % shards == shard and row["status"] != "done"]
    if cfg.print_commands:
        print("\n".join([line(runs[i], cfg, threads) for i in mine]))
        return

    # --- the plan
    print(f"{'run':<36}{'seed':>6}{'parameters':>12}{'steps':>8}{'operations':>12}{'minutes':>9}{'MiB':>7}  status")
    for row in rows:
        print(f"{row['name']:<36}{row['seed']:>6}{row['parameters']:>12,}{row['max_steps']:>8,}{row['operations']:>12.3g}"
              f"{row['expected_seconds'] / 60:>9.1f}{row['expected_mib']:>7,.0f}  {row['status']}")  # fmt: skip
    total = sum(rows[i]["expected_seconds"] for i in mine) / cfg.jobs / 60
    where = f" in shard {cfg.shard}" if shards > 1 else ""
    print(f"{len(mine)} runs to do{where}: about {total:,.0f} minutes, {cfg.jobs} at a time, {threads} threads each; "
          f"wrote {root / 'experiment_plan.json'}")  # fmt: skip
    if not cfg.execute:
        print("nothing was started; --execute does")
        return

    # --- the runs, the longest first, so that all jobs end at about the same time; then the reports
    mine.sort(key=lambda i: -rows[i]["expected_seconds"])
    failed = execute([runs[i] for i in mine], cfg.jobs, threads)
    write_plan(runs, cfg, probes)
    done = [row["output_dir"] for row in gather(runs, root) if row["status"] == "done"]
    reports = [script_argv("crossover.py", {}, root)] if cfg.suite == "crossover" else []
    if importlib.util.find_spec("plotly"):
        reports += [script_argv("compare.py", dict(output_dir=root), *done)]
    else:
        print("no report.html: pip install plotly==7.1.0 and the same command writes it")
    broken = [Path(argv[1]).name for argv in reports if done and subprocess.call(argv, env=child_environment())]
    if failed or broken:
        what = [f"{run.out.name} ({failure(run)} says why)" for run in failed] + broken
        raise RuntimeError(f"failed: {', '.join(what)}; the same command tries again")


if __name__ == "__main__":
    run_main(main)

"""Speeds as ratios measured in one run, printed as a table and written as one JSON.

    python benchmark.py train               # the training loop against the plainest correct loop of the same model
    python benchmark.py scaling             # the loop in several processes against one, on a CPU's cores
    python benchmark.py prepare             # prepare.py: MB/s, and whether its memory grows with the corpus
    python benchmark.py length              # EcoHybrid against attention as the window grows, and a plot
    python benchmark.py sample --ckpt DENOISER --twin AUTOREGRESSIVE     # ways of writing: quality against time, a plot
    python benchmark.py inference --ckpt DENOISER       # a sample on this CPU: seconds, in PyTorch, ONNX, int8; a start
    python benchmark.py speedrun            # seconds of training until Devdas costs 0.98 bits/byte

A speed alone says more of the machine than of the code: what is compared takes turns in one process, and medians count.
"""

import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import dataset
import diffusion
import export
import frontier
import optimizer
import plot
import prepare as preparing
import sampling
import speedrun
import tokenizer as tokenizers
import train_diffusion
from config import (
    BenchmarkConfig,
    EcoHybridConfig,
    FrontierConfig,
    InferenceConfig,
    Parser,
    PrepareConfig,
    ScalingConfig,
    SpeedrunConfig,
    TrainConfig,
    TransformerConfig,
    add_flags,
    check,
    parse,
    run_main,
)
from eco_hybrid import EcoHybrid
from machine import child_environment, pick_device, pick_precision, script_argv
from model import Transformer

# ---------------------------------------------------------------------------------------------------------------------
# the machine


def machine(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return dict(device=f"{device.type} ({name})", system=platform.platform(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), torch=torch.__version__)  # fmt: skip


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(dtype, device, largest=0, patience=0.5):
    """Operations a second of a square product: (rate, its size). As large as `patience` seconds a product allow.

    A CPU without bf16 instructions is hundreds of times slower in it: the size grows only while the next one is short.
    """
    size, largest = 64, largest or (8192 if device.type == "cuda" else 2048)
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = []
        for _ in range(4):
            wait_for(device)
            start = time.perf_counter()
            a @ b
            wait_for(device)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[1:])  # the first one warms up
        if 2 * size > largest or 8 * seconds > patience:
            return 2 * size**3 / seconds, size
        size *= 2


# ---------------------------------------------------------------------------------------------------------------------
# train


def random_data(folder, V, tokens, seed=0):
    """A folder as prepare.py writes it, of uniformly random ids and a tokenizer of exactly V ids."""
    # every byte, then made-up tokens of three bytes; four special tokens come on top
    ranks = [i.to_bytes(1 if i < 256 else 3, "big") for i in range(V - 4)]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    head = json.dumps({"kind": "tiktoken", "name": "random", "pattern": tokenizers.O200K}).encode()
    tokenizer = tokenizers.from_bytes(b"\n".join([head, *lines]) + b"\n")
    (folder / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    splits, rng = {}, np.random.default_rng(seed)
    for split in ("train", "val"):
        data = preparing.pack(rng.integers(V, size=tokens), V)
        (folder / f"{split}.bin").write_bytes(data)
        splits[split] = dict(tokens=tokens, sha256=hashlib.sha256(data).hexdigest())
    meta = dict(format=1, dtype=preparing.pick_dtype(V).name, vocab_size=V, splits=splits,
                tokenizer=dict(file="tokenizer.model", sha256=tokenizer.sha256))  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))


def plain_loss(model, x0, generator):
    """LLaDA's loss as its authors print it (arXiv 2502.09992, algorithm 1): logits everywhere, then the hidden ones."""
    x_t, masked = diffusion.corrupt(x0, model.mask_id, generator=generator)  # (B, T)
    nll = F.cross_entropy(model(x_t)[masked], x0[masked], reduction="none")  # (N,)
    k = masked.sum(1, keepdim=True).expand_as(x0)  # (B, T) how many of its row are hidden
    return (nll / k[masked]).sum() / len(x0)


def plain_step(model, adamw, ids, run, step):
    """One update of the plainest correct loop: fp32, eager, one AdamW; no clipping, no average, no log."""
    generator = torch.Generator().manual_seed(step)
    device = next(model.parameters()).device
    for micro in range(run.grad_accum):
        rows = range(micro * run.batch_size, (micro + 1) * run.batch_size)
        x0 = dataset.batch(ids, run.seq_len, rows, run.grad_accum * run.batch_size, run.seed, step).to(device)
        (plain_loss(model, x0, generator) / run.grad_accum).backward()
    adamw.step()
    adamw.zero_grad()


def warm_up(run):
    """Steps that are not counted. Compiled code is made anew when the number of hidden tokens first changes."""
    return 3 if run.compile else 1


def our_steps(kind, mask, sizes, run):
    """Seconds of each step but the first ones, and the precision, of the real loop: train_diffusion.train itself."""
    warm = warm_up(run)
    with tempfile.TemporaryDirectory() as folder:
        torch.compiler.reset()  # every call compiles anew: there is a limit to how often without this
        run = dataclasses.replace(run, output_dir=f"{folder}/run", max_steps=warm + run.max_steps)
        train_diffusion.train(kind, mask, sizes, run, quiet=True)
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl", encoding="utf-8")]
        precision = json.loads(Path(f"{folder}/run/config.json").read_text("utf-8"))["precision"].split(".")[1]
    clock = [line["seconds"]["training"] for line in lines if "loss" in line]
    return np.diff(clock)[warm - 1 :].tolist(), precision


PARTS = {  # what a step consists of: the functions that the loop calls for it
    "data": [(dataset, "batch")],
    "forward": [(diffusion, "training_loss")],
    "backward": [(torch.Tensor, "backward")],
    "clip": [(torch.nn.utils, "clip_grad_norm_")],
    "optimizer": [(optimizer.Muon, "step"), (torch.optim.AdamW, "step")],
    "average": [(optimizer.EMA, "update")],
}


def parts_of_a_step(kind, mask, sizes, run, device):
    """Seconds a step of each of PARTS and of the rest, in steps of the real loop whose functions are timed."""
    clocks = {name: [] for name in PARTS}

    def timed(function, times):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            wait_for(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for(device)
            times.append(time.perf_counter() - start)
            return result

        return inner

    with contextlib.ExitStack() as stack:
        for name, functions in PARTS.items():
            for owner, attribute in functions:
                original = getattr(owner, attribute)
                stack.enter_context(mock.patch.object(owner, attribute, timed(original, clocks[name])))
        seconds, _ = our_steps(kind, mask, sizes, run)
    # a function is called several times a step, and what is left over beyond whole steps happened at set-up
    steps, all_steps = len(seconds), len(seconds) + warm_up(run)
    parts = {name: sum(times[-(len(times) // all_steps) * steps :]) / steps for name, times in clocks.items() if times}
    return parts | {"rest": sum(seconds) / steps - sum(parts.values())}


def needed_operations(model, run):
    """Forward and backward (twice the forward) of one step; the head only where a token is hidden, (T + 1) / 2 a row.

    The optimizer's own operations are not counted, nor what the plain loop computes beyond these.
    """
    return model.training_flops(run.seq_len) * run.batch_size * run.grad_accum


def train(argv):
    kind, mask = "transformer", train_diffusion.MaskConfig()
    config_class, model_class = checkpoint.MODELS[kind]
    cfg, sizes, run = parse(__doc__, BenchmarkConfig, config_class, TrainConfig, argv=argv,
                            seq_len=256, batch_size=16, grad_accum=8)  # fmt: skip
    device = train_diffusion.pick_device(run.device)
    sizes = dataclasses.replace(sizes, vocab_size=cfg.vocab_size, max_seq_len=run.seq_len)
    tokens = run.batch_size * run.grad_accum * run.seq_len
    with tempfile.TemporaryDirectory() as folder:
        random_data(Path(folder), cfg.vocab_size, max(1 << 18, 2 * run.seq_len))
        # one step an alternation, everything on, a log line each; validation (one window) is not in its seconds
        run = dataclasses.replace(run, data_dir=folder, max_steps=1, log_interval=1, eval_interval=0, sample_interval=0,
                                  eval_windows=1, eval_masks=1, resume=False, check=False, plan=False)  # fmt: skip
        ids = dataset.load(folder).train
        if run.threads:
            torch.set_num_threads(run.threads)
        torch.manual_seed(run.seed)
        model = model_class(sizes).to(device)
        adamw = torch.optim.AdamW(model.parameters(), lr=run.lr, foreach=False)
        plain_step(model, adamw, ids, run, 0)  # warms up, as the real loop's first step does

        seconds, rates = {"ours": [], "plain": []}, {}
        for i in range(cfg.repeats):
            ours, precision = our_steps(kind, mask, sizes, run)
            seconds["ours"] += ours
            wait_for(device)
            start = time.perf_counter()
            plain_step(model, adamw, ids, run, i + 1)
            wait_for(device)
            seconds["plain"].append(time.perf_counter() - start)
            for name in {"float32", "bfloat16", precision}:
                rates.setdefault(name, []).append(matrix_rate(getattr(torch, name), device))
        parts = parts_of_a_step(kind, mask, sizes, dataclasses.replace(run, max_steps=2), device)

    a_step = {name: statistics.median(times) for name, times in seconds.items()}
    rate = {name: statistics.median(r for r, _ in measured) for name, measured in rates.items()}
    needed = needed_operations(model, run)
    share = {name: needed / a_step["ours"] / rate[name] for name in rate}
    emulated = rate["bfloat16"] < rate["float32"]
    why = f"--amp {run.amp}" + (f"; bf16 is {'slower' if emulated else 'faster'} here" if run.amp == "auto" else "")
    figures = dict(
        machine=machine(device),
        config=dataclasses.asdict(sizes) | dataclasses.asdict(run) | dict(repeats=cfg.repeats, kind=kind),
        precision=precision,
        precision_why=why,
        seconds_a_step=seconds,
        tokens_a_second={name: tokens / s for name, s in a_step.items()},
        ratio=a_step["plain"] / a_step["ours"],
        needed_operations_a_step=needed,
        matrix_rate=rate,
        matrix_size={name: measured[-1][1] for name, measured in rates.items()},
        share=share,
        bf16_share_means_something=not emulated,
        parts_seconds=parts,
    )
    print(f"{figures['machine']['device']}, {torch.get_num_threads()} threads; {sizes}")
    print(f"{run.grad_accum} × {run.batch_size} × {run.seq_len} tokens a step; precision {precision} ({why})\n")
    print(f"{'loop':<44}{'s a step':>12}{'tokens/s':>12}{'from, to':>20}")
    labels = {"ours": f"train_diffusion ({run.optimizer}, everything on)", "plain": "plainest correct loop, fp32"}
    for name, label in labels.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"{label:<44}{a_step[name]:>12.3f}{tokens / a_step[name]:>12,.0f}{f'{low:.3f}, {high:.3f}':>20}")
    print(f"{'ratio':<44}{figures['ratio']:>12.2f}\n")
    print(f"needed: {needed / 1e12:.3f} TFLOP a step, {needed / a_step['ours'] / 1e9:,.1f} GFLOP/s reached")
    for name in sorted(rate):
        note = " <- the precision in use" if name == precision else ""
        if name == "bfloat16" and emulated:
            note += " (no bf16 instructions: a share of this rate means nothing)"
        print(f"{name} square product of {figures['matrix_size'][name]}: {rate[name] / 1e9:,.1f} GFLOP/s, "
              f"share {share[name]:.1%}{note}")  # fmt: skip
    print("\nwhere a step goes: " + ", ".join(f"{k} {v / sum(parts.values()):.1%}" for k, v in parts.items()))
    return cfg, figures


# ---------------------------------------------------------------------------------------------------------------------
# scaling


def scaling(argv):
    """P processes of one thread, one process of P threads, and one of one thread: the same steps, taking turns."""
    parser = Parser(__doc__)
    add_flags(parser, [ScalingConfig])
    own, trainer = parser.parse_known_args(argv)  # what is left goes to train_diffusion.py
    cfg = ScalingConfig(**{k: v for k, v in vars(own).items() if k != "debug"})
    P, seconds = cfg.processes, {}
    with tempfile.TemporaryDirectory() as folder:
        random_data(Path(folder), cfg.vocab_size, 1 << 18)
        steady = dict(data_dir=folder, output_dir=f"{folder}/run", max_steps=4, log_interval=1, sample_interval=0,
                      eval_interval=0, eval_windows=1, eval_masks=1, keep=0, device="cpu")  # fmt: skip
        for _ in range(cfg.repeats):
            for processes, threads in ((1, 1), (1, P), (P, 1)):
                shutil.rmtree(f"{folder}/run", ignore_errors=True)
                flags = steady | dict(
                    grad_accum=P // processes, threads=threads
                )  # P parts a step, whoever computes them
                command = script_argv("train_diffusion.py", flags, processes=processes)
                at = command.index("--data_dir")
                command[at:at] = trainer  # before ours, which count
                done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
                said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
                if done.returncode:
                    failure = ValueError if done.returncode == 2 else RuntimeError
                    raise failure(f"{shlex.join(command)} ended with {done.returncode}: {''.join(said[:1])}")
                lines = [line for line in plot.read_metrics(f"{folder}/run") if "loss" in line]
                clock = [line["seconds"]["training"] for line in lines]
                seconds.setdefault(f"{processes} × {threads}", []).extend(np.diff(clock).tolist())
    rate = {way: lines[0]["tokens"] / statistics.median(times) for way, times in seconds.items()}
    one, threaded, parallel = rate.values()
    print(f"{'processes × threads':<24}{'tokens/s':>12}{'s a step: from, to':>24}")
    for way, times in seconds.items():
        print(f"{way:<24}{rate[way]:>12,.0f}{f'{min(times):.3f}, {max(times):.3f}':>24}")
    print(f"\n{P} processes reach {parallel / threaded:.1%} of one process of {P} threads, "
          f"{parallel / one / P:.1%} of {P} times one thread")  # fmt: skip
    return cfg, dict(machine=machine(torch.device("cpu")), flags=trainer, seconds_a_step=seconds, tokens_a_second=rate,
                     of_threads=parallel / threaded, of_one_times_processes=parallel / one / P)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# prepare

# Memory may rise by this factor while the text grows tenfold: some 50 bytes a document for its hash and where it goes
# (measured: 93 MiB for 2.1 million more documents of one line), and what sampling makes of two equal runs.
# One that held the text would need 360 MB more, 2.5 times as much.
MARGIN = 1.25
LINES = 16  # of the novel make a document of 2.7 kB, about an encyclopedia's article


def repeat_text(sources, path, size):
    """Write `size` bytes, to the next end of a document: the lines of `sources` over and over, no document twice."""
    lines = [line for source in sources for line in source.read_text("utf-8").split("\n") if line.strip()]
    check(lines, f"--input: there is no text in {', '.join(map(str, sources))}")
    with open(path, "wb") as f:
        for number in itertools.count():
            start = number * LINES % len(lines)
            text = "\n".join(lines[start : start + LINES])
            f.write(f"{number} {text}\n\n".encode())  # a blank line ends a document
            if f.tell() >= size:
                return f.tell()


def family(pid):
    """A process and all its descendants, from Linux's /proc."""
    yield pid
    with contextlib.suppress(OSError):  # a process that has just ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child))


def resident(pid, which="VmRSS"):
    """Bytes in memory now, or with VmHWM the most there ever were; 0 where /proc does not say."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{which}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def run_and_watch(command, every=0.02):
    """Run a command: (seconds, peak bytes of it and its children together). RuntimeError if it fails.

    The sum is sampled, and a page that several processes share counts in each. The kernel's own maximum (ru_maxrss)
    will not do: a process is born with its parent's, and ours holds PyTorch.
    """
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(map(resident, family(process.pid))))
            time.sleep(every)
        seconds = time.perf_counter() - start
        printed.seek(0)
        tail = printed.read()[-500:].decode("utf-8", "replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {tail}")
    if not peak:
        raise RuntimeError("memory cannot be read here: that needs Linux, and a command of more than an instant")
    return seconds, peak


def prepare(argv):
    (cfg,) = parse(__doc__, BenchmarkConfig, argv=argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files, _ = preparing.find_inputs(PrepareConfig(input=cfg.input), folder)
        for times in (1, cfg.growth):
            size = repeat_text([path for path, _ in files], folder / "text.txt", int(times * cfg.megabytes * 1e6))
            command = [sys.executable, str(Path(__file__).with_name("prepare.py")), "--input", f"{folder}/text.txt",
                       "--output_dir", f"{folder}/out", "--vocab_size", str(cfg.vocab_size)]  # fmt: skip
            seconds, peak = run_and_watch(command)
            rows.append(dict(times=times, bytes=size, seconds=seconds, megabytes_a_second=size / seconds / 1e6,
                             peak_bytes=peak))  # fmt: skip
    ratio = rows[1]["peak_bytes"] / rows[0]["peak_bytes"]
    print(f"{'text':>10}{'MB':>10}{'seconds':>10}{'MB/s':>10}{'peak MiB, children included':>30}")
    for row in rows:
        print(f"{row['times']:>9}×{row['bytes'] / 1e6:>10,.1f}{row['seconds']:>10.1f}"
              f"{row['megabytes_a_second']:>10.2f}{row['peak_bytes'] / 2**20:>30,.0f}")  # fmt: skip
    print(f"memory at {cfg.growth}× the text: {ratio:.2f} times that at 1×; allowed is {MARGIN}")
    figures = dict(machine=machine(torch.device("cpu")), rows=rows, memory_ratio=ratio, margin=MARGIN)
    return cfg, figures, None if ratio <= MARGIN else f"memory grows with the text: {ratio:.2f} times, over {MARGIN}"


# ---------------------------------------------------------------------------------------------------------------------
# length
#
# Four models of the same width, depth and number of parameters. The vocabulary is small, because the head costs all of
# them the same. A batch of short windows holds --seq_len tokens together: a crossover should be one of arithmetic, not
# of the overhead of small kernels. The sampling step is one window. Attention's operations a token grow with T,
# EcoHybrid's fall: the derived crossover T* is the first T at which EcoHybrid needs no more of them.

LOCAL = 128  # window of the local baseline
TARGETS = {1024: 2.0, 2048: 3.0, 4096: 5.0}  # of pure EcoHybrid's training pass, on a CPU at the default sizes


def rivals(sizes):
    """name -> (model class, its config); the first is what the others are compared with."""
    same = {f.name: getattr(sizes, f.name) for f in dataclasses.fields(TransformerConfig) if f.name != "window"}
    return {
        "transformer": (Transformer, TransformerConfig(**same)),
        "local": (Transformer, TransformerConfig(**same, window=LOCAL)),
        "eco": (EcoHybrid, dataclasses.replace(sizes, attn_every=0)),
        "hybrid": (EcoHybrid, sizes),
    }


def half_hidden(V, B, T):
    """x0 (B, T) of random ids, x_t with half of every row hidden, and where (B, T) bool. Always the same."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(V, (B, T), generator=generator)
    return x0, *diffusion.corrupt(x0, V, torch.full((B,), T // 2), generator)


def training_pass(model, x0, x_t, masked, autocast):
    """Forward and backward as in training: the head at hidden places alone."""
    with autocast:
        nll, _ = diffusion.hidden_nll(model, x_t, masked, x0)
    nll.mean().backward()


@torch.no_grad()
def sampling_step(model, x_t, where, autocast):
    with autocast:
        model(x_t, where)


def timed(call, device):
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def peak_of(call, device):
    """Bytes that a call takes at most, beyond what is there before it; on a CPU exact only in a young process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():  # not Linux: it cannot be read
        return None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident(os.getpid())
    call()
    return resident(os.getpid(), "VmHWM") - before


def young_process():
    """An executor of one process, which has imported this file and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark"])
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context)


def training_peak(model_class, config, B, dtype):
    """Peak bytes of an eager training pass beyond weights and gradients; to be run in a process of its own."""
    model, device, T = model_class(config), torch.device("cpu"), config.max_seq_len
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    training_pass(model, *half_hidden(config.vocab_size, 1, min(T, 16)), autocast)  # loads libraries, makes gradients
    return peak_of(lambda: training_pass(model, *half_hidden(config.vocab_size, B, T), autocast), device)


def derived_crossover(plain, other, limit=1 << 16):
    """Smallest T at which other(T) operations are no more than plain(T); None: not up to the limit."""
    return next((T for T in range(1, limit) if other(T) <= plain(T)), None)


def measured_crossover(lengths, speedups):
    """T from which on no speed-up is below 1, between two lengths by a straight line over log T.

    The smallest length where all are 1 or more (then the crossover may lie lower), None where the last one is not.
    """
    below = [i for i, s in enumerate(speedups) if s < 1]
    if not below or below[-1] == len(lengths) - 1:
        return None if below else lengths[0]
    i = below[-1]
    share = (1 - speedups[i]) / (speedups[i + 1] - speedups[i])
    return lengths[i] * (lengths[i + 1] / lengths[i]) ** share


def measure_length(sizes, T, run, repeats, device, dtype):
    """One length: name -> its figures."""
    B, rival = max(1, run.seq_len // T), rivals(dataclasses.replace(sizes, max_seq_len=T))
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    torch.compiler.reset()  # there is a limit to how often one function is compiled
    torch.manual_seed(run.seed)
    models = {name: model_class(config).to(device) for name, (model_class, config) in rival.items()}
    batch = half_hidden(sizes.vocab_size, B, T)
    x_t, masked = (x[:1] for x in batch[1:])
    x_t, where = x_t.to(device), masked.flatten().nonzero().squeeze(1).to(device)
    seconds = {name: dict(train=[], sample=[]) for name in models}
    for i in range(repeats + 1):
        for name in list(models)[:: -1 if i % 2 else 1]:  # there and back: none is always the first
            model = models[name]
            if run.compile and not i:
                model.compile(dynamic=False, fullgraph=True)
            model.zero_grad()
            model.train()
            seconds[name]["train"].append(timed(lambda m=model: training_pass(m, *batch, autocast), device))
            model.eval()
            seconds[name]["sample"].append(timed(lambda m=model: sampling_step(m, x_t, where, autocast), device))
    cells = {}
    for name, model in models.items():
        if device.type == "cuda":
            model.train()
            peak = peak_of(lambda m=model: training_pass(m, *batch, autocast), device)
        else:
            with young_process() as pool:
                peak = pool.submit(training_peak, *rival[name], B, dtype).result()
        train, sample = (statistics.median(seconds[name][of][1:]) for of in ("train", "sample"))  # the first warms up
        operations = model.flops(T, T // 2)
        cells[name] = dict(
            train=train, sample=sample, all_train=seconds[name]["train"][1:], all_sample=seconds[name]["sample"][1:],
            operations=operations, train_rate=3 * B * operations / train, sample_rate=operations / sample,
            peak_bytes=peak, parameters=sum(p.numel() for p in model.parameters()),
        )  # fmt: skip
    plain = cells["transformer"]
    for cell in cells.values():
        cell["derived_speedup"] = plain["operations"] / cell["operations"]
        for of in ("train", "sample"):
            cell[f"{of}_speedup"] = plain[of] / cell[of]
    return dict(T=T, B=B, models=cells)


def agreement(rows, name, reference):
    """How far one model's seconds follow its operations: lowest and highest of measured / derived, over all lengths.

    speedup: against the Transformer's. growth: of the seconds of a token since the length `reference`.
    """
    cells = [row["models"][name] for row in rows]
    rate = next(row["models"][name]["train_rate"] for row in rows if row["T"] == reference)
    quotients = dict(speedup=[cell["train_speedup"] / cell["derived_speedup"] for cell in cells],
                     growth=[rate / cell["train_rate"] for cell in cells])  # fmt: skip
    return {of: (min(values), max(values)) for of, values in quotients.items()}


def length(argv):
    cfg, sizes, run = parse(__doc__, BenchmarkConfig, EcoHybridConfig, TrainConfig, argv=argv,
                            vocab_size=1024, seq_len=1024)  # fmt: skip
    check(sizes.attn_every > 0, "--attn_every is 0, the hybrid needs to be one; the pure EcoHybrid is measured anyway")
    lengths = sorted({int(n) for n in cfg.lengths.split(",")})
    sizes = dataclasses.replace(sizes, vocab_size=cfg.vocab_size, max_seq_len=lengths[-1])
    device = pick_device(run.device)
    dtype = pick_precision(run.amp, device)
    if run.threads:
        torch.set_num_threads(run.threads)
    precision = str(dtype or torch.float32).split(".")[1]
    facts = machine(device)
    how = "compiled" if run.compile else "eager"
    print(f"{facts['device']}, {facts['threads']} threads, {precision}, {how}; {sizes}")
    print("×: faster than the Transformer; derived ×: by operations; GFLOP/s: of the training pass; MiB: at its peak, "
          "beyond weights and gradients\n")  # fmt: skip
    print(f"{'T':>6}{'batch':>6} {'model':<12}{'train ms':>11}{'from, to':>20}{'×':>7}{'derived ×':>10}{'GFLOP/s':>9}"
          f"{'sample ms':>11}{'×':>7}{'MiB':>8}", flush=True)  # fmt: skip
    rows = []
    for T in lengths:
        row = measure_length(sizes, T, run, cfg.repeats, device, dtype)
        rows.append(row)
        for name, c in row["models"].items():
            spread = f"{1e3 * min(c['all_train']):,.1f}, {1e3 * max(c['all_train']):,.1f}"
            print(f"{T:>6}{row['B']:>6} {name:<12}{1e3 * c['train']:>11,.1f}{spread:>20}{c['train_speedup']:>7.2f}"
                  f"{c['derived_speedup']:>10.2f}{c['train_rate'] / 1e9:>9,.1f}{1e3 * c['sample']:>11,.1f}"
                  f"{c['sample_speedup']:>7.2f}{(c['peak_bytes'] or 0) / 2**20:>8,.0f}", flush=True)  # fmt: skip

    models = {name: model_class(config) for name, (model_class, config) in rivals(sizes).items()}
    needed = {name: functools.partial(model.flops, hidden=0) for name, model in models.items()}  # the head cancels out
    reference = next((row["T"] for row in rows if row["B"] == 1), lengths[-1])
    crossover, agree = {}, {name: agreement(rows, name, reference) for name in models}
    print()
    for name in ("eco", "hybrid"):
        measured = {of: measured_crossover(lengths, [row["models"][name][f"{of}_speedup"] for row in rows])
                    for of in ("train", "sample")}  # fmt: skip
        derived = derived_crossover(needed["transformer"], needed[name])
        crossover[name] = dict(derived=derived) | measured
        tell = {of: f"above {lengths[-1]}" if T is None else f"{'at or below ' * (T == lengths[0])}{T:,.0f}"
                for of, T in measured.items()}  # fmt: skip
        print(f"{name}: T* derived {derived}, measured {tell['train']} (training) and {tell['sample']} (sampling)")
    for name, quotients in agree.items():
        tell = {of: f"{low:.2f} to {high:.2f}" for of, (low, high) in quotients.items()}
        print(f"{name}: measured / derived: speed-up {tell['speedup']}, growth of its own cost since T = {reference:,} "
              f"{tell['growth']}")  # fmt: skip
    targets = []
    names = ("d_model", "n_layers", "n_heads", "d_ff", "memory_slots", "conv_kernel")
    defaults = all(getattr(sizes, name) == getattr(EcoHybridConfig, name) for name in names)
    for row in rows if device.type == "cpu" and defaults else ():
        if goal := TARGETS.get(row["T"]):
            reached = row["models"]["eco"]["train_speedup"]
            targets.append(dict(T=row["T"], goal=goal, reached=reached, met=reached >= goal))
            print(f"eco at {row['T']:,}: {reached:.2f} × of {goal:.1f} ×, {'met' if reached >= goal else 'missed'}")
    figures = dict(
        machine=facts,
        config=dataclasses.asdict(sizes) | dict(local_window=LOCAL, repeats=cfg.repeats, compile=run.compile,
                                                tokens_a_batch=run.seq_len, seed=run.seed),
        precision=precision,
        rows=rows,
        crossover=crossover,
        reference_length=reference,
        measured_over_derived=agree,
        targets=targets,
    )  # fmt: skip
    return cfg, figures


def draw_lengths(figures, path):
    """The speed-ups over the length: measured as lines, derived dashed, and the derived crossover."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    rows, T = figures["rows"], [row["T"] for row in figures["rows"]]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axes, of, title in zip(panels, ("train", "sample"), ("forward and backward", "sampling step"), strict=True):
        for name in list(rows[0]["models"])[1:]:
            cells = [row["models"][name] for row in rows]
            (line,) = axes.plot(T, [c[f"{of}_speedup"] for c in cells], marker="o", markersize=3, label=name)
            axes.plot(T, [c["derived_speedup"] for c in cells], linestyle="--", linewidth=1, color=line.get_color())
        axes.axhline(1, color="black", linewidth=0.8)
        if derived := figures["crossover"]["eco"]["derived"]:
            axes.axvline(derived, color="grey", linestyle=":", label=f"derived T* = {derived}")
        axes.set(title=title, xlabel="tokens a window", xscale="log")
        axes.set_yscale("log", base=2)
        axes.set_xticks(T, T, minor=False)
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("times as fast as full attention (dashed: derived)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def sample(argv):
    (cfg,) = parse(__doc__, FrontierConfig, argv=argv)
    device = pick_device("auto")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    return cfg, dict(machine=machine(device), config=dataclasses.asdict(cfg)) | frontier.run(cfg, device)


# ---------------------------------------------------------------------------------------------------------------------
# inference


class Session:
    """An ONNX file of export.py, run by onnxruntime on the CPU, behind what sampling.denoise knows of a denoiser."""

    def __init__(self, path, mask_id):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session, self.mask_id = onnxruntime.InferenceSession(path, options), mask_id

    def __call__(self, x_t, where=None, lengths=None):
        lengths = torch.full((len(x_t),), x_t.shape[1]) if lengths is None else lengths
        (logits,) = self.session.run(None, dict(x_t=x_t.numpy(), lengths=lengths.numpy()))  # (B, T, V)
        logits = torch.from_numpy(logits)
        return logits if where is None else logits.flatten(0, 1)[where]


@torch.no_grad()
def forms(denoiser, folder):
    """name -> (what answers, bytes of its weights in a file): the forms in which weights can be used on a CPU."""
    from onnxruntime.quantization import quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it advises a step that changes nothing here
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch.export, about itself
        export.save_onnx(denoiser, folder / "fp32.onnx")
    quantize_dynamic(folder / "fp32.onnx", folder / "int8.onnx")
    rounded, weights = copy.deepcopy(denoiser), sum(p.numel() for p in denoiser.parameters())
    for p in rounded.parameters():
        p.copy_(p.bfloat16())
    table = {"fp32": (denoiser, 4 * weights), "bf16, computed in fp32": (rounded, 2 * weights)}
    for name in ("fp32", "int8"):
        path = folder / f"{name}.onnx"
        table[f"ONNX {name}"] = Session(path, denoiser.mask_id), path.stat().st_size
    return table


def text_for(cfg, loaded):
    """Ids of text to try a model on, and what it is: the held-out part of its data if that is here, or of Devdas."""
    folder = Path(cfg.data_dir or loaded.config["data_dir"])
    if cfg.data_dir or (folder / "meta.json").exists():
        return dataset.load(folder).val, "held-out windows"
    with tempfile.TemporaryDirectory() as scratch:
        novel = preparing.find_inputs(PrepareConfig(), Path(scratch))[0][0][0].read_text("utf-8")
    return np.array(loaded.tokenizer.encode(novel[len(novel) * 9 // 10 :])), "windows of Devdas"


@torch.no_grad()
def answer(denoiser, x0, x_t, masked):
    """log-probabilities (N, V) at the hidden places, and each row's mean -log p there (B,)."""
    where = masked.flatten().nonzero().squeeze(1)  # (N,)
    logp = torch.cat([denoiser(row[None], at.nonzero().squeeze(1)) for row, at in zip(x_t, masked, strict=True)])
    logp = logp.float().log_softmax(1)
    nll = -logp.gather(1, x0.flatten()[where][:, None]).squeeze(1)  # (N,)
    return logp, torch.stack([part.mean() for part in nll.split(masked.sum(1).tolist())])


def starting(loaded, cfg, repeats=3):
    """Fresh processes of sample_diffusion.py: peak bytes, and medians of their seconds less those that it says it wrote
    for, and of their CPU seconds in all: a dict."""
    flags = dict(ckpt=loaded.path, max_new_tokens=cfg.tokens, steps=cfg.steps, no_live=True)
    command, seconds, cpu = script_argv("sample_diffusion.py", flags), [], []
    peak = run_and_watch(command)[1] if Path("/proc/self/status").exists() else None
    for _ in range(repeats):
        start, before = time.perf_counter(), os.times()
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
        writing, after = re.search(r"tokens/s \(([\d.]+) s;", done.stdout)[1], os.times()
        seconds.append(time.perf_counter() - start - float(writing))
        cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return dict(seconds=statistics.median(seconds), cpu=statistics.median(cpu), peak_bytes=peak)


def inference(argv):
    (cfg,) = parse(__doc__, InferenceConfig, argv=argv)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    loaded = checkpoint.load(cfg.ckpt or checkpoint.newest_run())
    denoiser, V = loaded.denoiser, loaded.denoiser.mask_id
    check(loaded.kind in ("transformer", "eco_hybrid"), f"{loaded.path} is {loaded.kind}, and no denoiser of our own")
    T = min(cfg.tokens, denoiser.config.max_seq_len)
    ids, what = text_for(cfg, loaded)
    windows = dataset.windows(ids, T)
    x0 = torch.stack([w for w in windows if len(w) == T][: cfg.windows])  # (n, T)
    x_t, masked = diffusion.corrupt(x0, V, generator=torch.Generator().manual_seed(0))
    facts, rows = machine(torch.device("cpu")), []
    print(f"{loaded.path}: {sum(p.numel() for p in denoiser.parameters()):,} parameters; {facts['device']}, "
          f"{facts['threads']} threads; {T} tokens in {cfg.steps} steps; {len(x0)} {what}\n")  # fmt: skip
    print(f"{'weights':<24}{'MiB':>6}{'KL, nats':>10}{'bound':>8}{'change':>20}{'batch':>7}{'ms a forward':>14}"
          f"{'s a sample':>12}{'CPU s':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        table = forms(denoiser, Path(folder))
        exact, nats = answer(denoiser, x0, x_t, masked)
        for name, (model, size) in table.items():
            logp, mine = answer(model, x0, x_t, masked)
            change = mine - nats  # (n,) of the bound, window by window
            row = dict(name=name, bytes=size, kl=(exact.exp() * (exact - logp)).sum(1).mean().item(),
                       bound=mine.mean().item(), change=change.mean().item(),
                       change_error=(change.std() / len(change) ** 0.5).item())  # fmt: skip
            rows += [row | dict(batch=int(B)) for B in cfg.batches.split(",")]
        done = [dict(forward=[], sample=[], cpu=[]) for _ in rows]
        for i in range(cfg.repeats + 1):  # they take turns; the first turn warms up
            for row, times in zip(rows, done, strict=True):
                model, x = table[row["name"]][0], torch.full((row["batch"], T), V)
                where = torch.arange(0, x.numel(), 2)  # half of all places
                forward = functools.partial(torch.no_grad()(model), x, where)
                settings = dict(steps=cfg.steps, forbid=loaded.tokenizer.never)
                writing = sampling.denoise(model, x, generator=torch.Generator().manual_seed(i), **settings)
                cpu = time.process_time()
                seconds = timed(functools.partial(collections.deque, writing, maxlen=0), torch.device("cpu"))
                if i:
                    times["cpu"].append(time.process_time() - cpu)
                    times["sample"].append(seconds)
                    times["forward"].append(timed(forward, torch.device("cpu")))
    for row, times in zip(rows, done, strict=True):
        row |= {of: statistics.median(seconds) for of, seconds in times.items()} | dict(all=times)
        print(f"{row['name']:<24}{row['bytes'] / 2**20:>6.1f}{row['kl']:>10.5f}{row['bound']:>8.4f}"
              f"{row['change']:>+11.5f} ± {row['change_error']:.4f}{row['batch']:>7}{1e3 * row['forward']:>14.1f}"
              f"{row['sample']:>12.3f}{row['cpu']:>8.3f}")  # fmt: skip
    start = starting(loaded, cfg)
    print(f"\nsample_diffusion.py: starts, with imports, in {start['seconds']:.2f} s; {start['cpu']:.2f} CPU s with "
          f"one sample; {(start['peak_bytes'] or 0) / 2**20:,.0f} MiB at its peak")  # fmt: skip
    return cfg, dict(machine=facts, config=dataclasses.asdict(cfg), ckpt=str(loaded.path), rows=rows, start=start)


def race(argv):
    (cfg,) = parse(__doc__, SpeedrunConfig, argv=argv)
    return cfg, dict(machine=machine(torch.device("cpu"))) | speedrun.run(cfg)


# argv -> config, figures, what failed if it can
BENCHMARKS = {"train": train, "prepare": prepare, "length": length, "sample": sample, "inference": inference}
BENCHMARKS |= {"speedrun": race, "scaling": scaling}
DRAWINGS = {"length": draw_lengths, "sample": frontier.draw}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"{__doc__}\nbenchmarks: {', '.join(BENCHMARKS)}; python benchmark.py NAME --help lists the flags of one")
        return
    check(name in BENCHMARKS, f"there is no benchmark {name!r}, but {', '.join(BENCHMARKS)}")
    cfg, figures, *failed = BENCHMARKS[name](sys.argv[2:])
    path = Path(cfg.output or f"checkpoints/benchmark_{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(benchmark=name) | figures, indent=1) + "\n", "utf-8")
    print(f"wrote {path}")
    if name in DRAWINGS:
        DRAWINGS[name](figures, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    if failed and failed[0]:
        raise RuntimeError(failed[0])


if __name__ == "__main__":
    run_main(main)

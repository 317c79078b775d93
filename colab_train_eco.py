"""One shot on a fresh notebook or laptop: data, EcoHybrid training, and a check of what came out; exit 0 or 1.

    python colab_train_eco.py --max_steps 500 --save_interval 100 --log_interval 10 --compile
    python colab_train_eco.py --max_steps 500 --allow_cpu      # the same without a GPU: a small size, minutes

It starts prepare.py, train_eco_hybrid.py and evaluate.py as processes, samples, and writes report.json into the run
folder. docs/COLAB_ECO_RUNBOOK.md says how to run it and how to read the report.
"""

import contextlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import dataset
import sample_diffusion
from config import PRESETS, PROMPTS, ColabConfig, SampleConfig, TrainConfig, TransformerConfig, check, parse, run_main
from evaluate import MARGIN
from machine import child_environment, pick_device, script_argv, total_memory
from plot import read_metrics
from quality import spread

SMALL_TEXT = 1 << 20  # training tokens; 500 steps of the laptop preset pass over fewer of them eight times and more
WARM = 20  # steps until the throughput must be steady: compiling, caches
SWING = 3.0  # p90 / p10 of the throughput, at most
NEW = 64  # tokens written behind each prompt, and of each piece of real text they are compared with
MORE_REPEATS = 0.1  # share of repeated 4-grams above the real text's, at most

# ---------------------------------------------------------------------------------------------------------------------
# pieces


def bytes_a_token(size, V):
    """What a training forward keeps for its backward pass, in fp32: 19 tensors of the model's width a layer, measured,
    taken as 26; and logits, of the half of the tokens that is hidden, with their softmax."""
    c = dict(d_model=TransformerConfig.d_model, n_layers=TransformerConfig.n_layers) | PRESETS[size]
    return 4 * (26 * c["n_layers"] * c["d_model"] + V)


def split(rows, most):
    """(windows a forward, forwards) of a step of `rows` windows: up to `most` at once, evenly."""
    batch_size = max(b for b in range(1, max(1, min(rows, most)) + 1) if rows % b == 0)
    return batch_size, rows // batch_size


def plan(size, memory, V, seq_len=0, batch_size=0, grad_accum=0, tokens=0):
    """(seq_len, batch_size, grad_accum) whose product is the preset's tokens a step (or `tokens`), whatever the memory.

    Half of `memory` (bytes) may hold activations. What is given, not 0, stays as it is.
    """
    c = {k: getattr(TrainConfig, k) for k in ("seq_len", "batch_size", "grad_accum")} | PRESETS[size]
    tokens = tokens or c["seq_len"] * c["batch_size"] * c["grad_accum"]
    fit = int(memory / 2 / bytes_a_token(size, V))  # tokens a forward
    seq_len = seq_len or next((T for T in (1024, 512) if 32 * T <= min(fit, tokens)), 256)
    rows = max(1, tokens // seq_len)
    if not (batch_size or grad_accum):
        return seq_len, *split(rows, fit // seq_len)
    return seq_len, batch_size or math.ceil(rows / grad_accum), grad_accum or math.ceil(rows / batch_size)


def start(script, **flags):
    """Run a script of ours and return its exit code; Ctrl-C and SIGTERM are its own affair, so that it can save."""
    argv = script_argv(script, flags)
    print("\n$ python", script, *argv[2:], flush=True)
    child = subprocess.Popen(argv, env=child_environment())
    old = {s: signal.signal(s, lambda number, _: child.send_signal(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
    code = code if code >= 0 else 128 - code
    if code in (2, 128 + signal.SIGINT, 128 + signal.SIGTERM):  # it has said why, in one line
        sys.exit(code)
    return code


def real_spread(train, n=4, length=NEW, draws=200):
    """Mean `spread` of as much real text as is sampled: n random pieces of the training text (tokens,)."""
    pieces = [w.tolist() for w in dataset.windows(train, length, 4096)]
    random = np.random.default_rng(0)
    chosen = [random.permutation(len(pieces))[:n] for _ in range(draws)]
    return np.mean([spread([pieces[i] for i in row]) for row in chosen], axis=0).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# the checks: each a dict with name, value, limit, passed


def verdict(name, value, limit, passed, **more):
    return dict(name=name, value=value, limit=limit, passed=bool(passed), **more)


def check_log(lines, first):
    """Of the metrics.jsonl: losses finite in every line, throughput steady from step `first` on."""
    losses = [line["loss"] for line in lines if "loss" in line]
    broken = sum(loss is None or not math.isfinite(loss) for loss in losses)
    yield verdict(
        "loss finite", broken, 0, losses and not broken, lines=len(losses), last=losses[-1] if losses else None
    )
    rates = [line["seconds"]["tokens_a_second"] for line in lines if "loss" in line and line["step"] > first]
    low, middle, high = np.percentile(rates or [0.0], (10, 50, 90)).tolist()
    swing = high / max(low, 1e-9) if rates else None
    more = dict(lines=len(rates), after_step=first, tokens_a_second=middle)
    yield verdict("throughput p90/p10", swing, SWING, rates and swing <= SWING, **more)


def check_checkpoint(out, due):
    """The newest numbered checkpoint loads and is that of step `due` or later."""
    step = None
    with contextlib.suppress(RuntimeError):  # damaged
        step = max((checkpoint.load(path).step for path in checkpoint.numbered(out)[-1:]), default=None)
    return verdict("checkpoint at step", step, due, step is not None and step >= due)


def check_bound(scores):
    """Of eval.json: bits per byte well below the unigram model's; the bigram's stands beside it."""
    bits, counted = scores["bits_per_byte"], scores["baselines_bits_per_byte"]
    limit = (1 - MARGIN) * counted["unigram"]
    more = dict(standard_error=bits["standard_error"], step=scores["step"], **counted)
    return verdict("bound, bits/byte", bits["mean"], limit, bits["mean"] <= limit, **more)


def check_collapse(texts, real):
    """Of the ids written behind each prompt: half the real text's distinct-2, few more of its repeated 4-grams."""
    (distinct, repeated), (real_distinct, real_repeated), tokens = spread(texts), real, sum(map(len, texts))
    least, most = real_distinct / 2, real_repeated + MORE_REPEATS
    yield verdict("distinct-2", distinct, least, distinct >= least, real_text=real_distinct, tokens=tokens)
    yield verdict("repeated 4-grams", repeated, most, repeated <= most, real_text=real_repeated, tokens=tokens)


# ---------------------------------------------------------------------------------------------------------------------
# the shot


def prepared(cfg):
    """The folder of prepare.py to train on, made first if need be. A folder without meta.json is not one."""
    if cfg.data_dir:
        meta = Path(cfg.data_dir) / "meta.json"
        check(meta.is_file(), f"{meta} is missing; prepare.py --input TEXT --output_dir {cfg.data_dir} writes it")
        return cfg.data_dir
    name = re.sub(r"\W+", "_", "_".join((cfg.dataset, cfg.dataset_config, cfg.text_field)))
    folder = Path("data") / (name if cfg.dataset else "colab")
    if not (folder / "meta.json").is_file():
        hub = dict(dataset=cfg.dataset, dataset_config=cfg.dataset_config, text_field=cfg.text_field)
        flags = hub if cfg.dataset else dict(vocab_size=1024, romanized=0.1)  # half of the prompts are romanised
        if code := start("prepare.py", output_dir=folder, **flags):
            sys.exit(code)
    return str(folder)


def main():
    (cfg,) = parse(__doc__, ColabConfig)
    device, clock, seconds = pick_device("auto"), time.perf_counter(), {}
    check(
        device.type != "cpu" or cfg.allow_cpu,
        "there is no GPU here; choose a GPU runtime (Colab: Runtime, Change runtime type), or give --allow_cpu",
    )

    def lap(stage):
        nonlocal clock
        seconds[stage], clock = time.perf_counter() - clock, time.perf_counter()

    # --- data
    folder, out = prepared(cfg), Path(cfg.output_dir)
    data = dataset.load(folder)
    lap("data")

    # --- sizes: by the device's memory; a run that goes on keeps its own, cut anew for the device that is here now
    old, begun, resume = {}, 0, cfg.resume and any(out.glob("*.pt"))
    if resume:
        state, _ = checkpoint.read_newest(out)
        old, begun = state["config"], state["step"] if state["step"] < cfg.max_steps else 0
    memory, V = total_memory(device), data.meta["vocab_size"]
    small = device.type == "cpu" or len(data.train) < SMALL_TEXT
    size = cfg.size if cfg.size != "auto" else old.get("preset") or ("tiny" if small else "laptop")
    tokens, length = (old["rows_a_step"] * old["seq_len"], old["seq_len"]) if resume else (0, 0)
    seq_len, batch_size, grad_accum = plan(
        size, memory, V, cfg.seq_len or length, cfg.batch_size, cfg.grad_accum, tokens
    )
    needs = batch_size * seq_len * bytes_a_token(size, V)
    sizes = dict(size=size, seq_len=seq_len, batch_size=batch_size, grad_accum=grad_accum)
    sizes |= dict(tokens_a_step=seq_len * batch_size * grad_accum, activation_bytes_estimated=needs)
    print(
        f"{size} on {device}: {batch_size} windows × {seq_len} tokens × {grad_accum} = "
        f"{sizes['tokens_a_step']:,} tokens a step; activations take at most {needs / 2**30:.1f} GiB of the "
        f"{memory / 2**30:.1f} there, by estimate"
    )

    # --- training
    left = cfg.max_steps - begun
    flags = dict(preset=size, data_dir=folder, output_dir=out, seq_len=seq_len, batch_size=batch_size)
    flags |= dict(grad_accum=grad_accum, max_steps=cfg.max_steps, save_interval=min(cfg.save_interval, cfg.max_steps))
    flags |= dict(log_interval=min(cfg.log_interval, max(1, left // 2)), device=device)
    if resume:
        (out / "report.json").unlink(missing_ok=True)  # of the run as it was
    code = start("train_eco_hybrid.py", **flags, compile=cfg.compile, resume=resume)
    lap("training")
    lines = read_metrics(out) if (out / "metrics.jsonl").is_file() else []
    checks = [verdict("training's exit code", code, 0, code == 0)]
    checks += check_log(lines, begun + min(WARM, left // 2))

    # --- evaluation, samples
    texts = []
    if code == 0:
        checks.append(check_checkpoint(out, cfg.max_steps // flags["save_interval"] * flags["save_interval"]))
        code = start("evaluate.py", ckpt=out, data_dir=folder, max_windows=256, device=device)
        checks.append(verdict("evaluation's exit code", code, 0, code == 0))
        lap("evaluation")
    if code == 0:
        checks.append(check_bound(json.loads((out / "eval.json").read_text(encoding="utf-8"))))
        loaded = checkpoint.load(out, device)
        new = min(NEW, seq_len // 2)  # a short window holds fewer tokens, and perhaps not all prompts
        prompts = [p for p in PROMPTS if len(loaded.tokenizer.encode(p)) <= seq_len - new] or [""]
        samples = sample_diffusion.generate(loaded, prompts, SampleConfig(max_new_tokens=new))
        texts = [loaded.tokenizer.decode(ids) for ids in samples.texts]
        written = [ids[len(ids) - n :] for ids, n in zip(samples.texts, samples.written, strict=True)]
        checks += check_collapse(written, real_spread(data.train, len(prompts), new))
        lap("samples")
        print("\n" + "\n\n".join(texts))

    # --- report
    failed = [c["name"] for c in checks if not c["passed"]]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = dict(device=str(device), name=gpu, memory_bytes=memory, cores=os.cpu_count(), torch=torch.__version__)
    report = dict(passed=not failed, checks=checks, machine=machine, sizes=sizes, data=folder, run=str(out))
    report |= dict(resumed_at=begun, seconds=seconds, samples=texts)
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    out.mkdir(parents=True, exist_ok=True)  # the trainer may have failed before it made one
    checkpoint.replace(out / "report.json", lambda t: t.write_text(text, encoding="utf-8"))
    number = lambda x: "none" if x is None else f"{x:.4g}" if isinstance(x, float) else f"{x:,}"  # noqa: E731
    print(f"\n{'check':24}{'value':>8}{'limit':>8}")
    for c in checks:
        more = ", ".join(f"{k} {number(v)}" for k, v in list(c.items())[4:])
        result = "ok    " if c["passed"] else "FAILED"
        print(f"{c['name']:24}{number(c['value']):>8}{number(c['limit']):>8}  {result}  {more}".rstrip())
    print(f"wrote {out / 'report.json'} ({sum(seconds.values()):,.0f} s)")
    if failed:
        batch_size, grad_accum = split(batch_size * grad_accum, batch_size // 2)
        hint = f"; if memory ran out, --resume --batch_size {batch_size} --grad_accum {grad_accum} takes about half"
        hint = hint if checks[0]["value"] else ""
        raise RuntimeError(f"failed: {', '.join(failed)}{hint}; docs/COLAB_ECO_RUNBOOK.md says what to do")


if __name__ == "__main__":
    run_main(main)

"""The race to a bound: how long until Devdas costs 0.98 bits/byte? Started as `python benchmark.py speedrun`.

    python benchmark.py speedrun                        # the last of RECORDS, three seeds
    python benchmark.py speedrun --record quickstart    # one of them by name

An interpolated bigram model costs 1.002 with the first record's tokenizer, 0.967 with the later ones'. What may change
from record to record: everything that makes the model. What may not: the text and its held-out tenth, windows of 128
tokens, and the bound of all of them with 16 masks each, taken by the trainer while the clock stands.
"""

import shutil
import subprocess
from pathlib import Path

import prepare
from config import PrepareConfig, check
from intervals import mean_error
from machine import child_environment, script_argv
from plot import read_metrics

GOAL = 0.98  # bits/byte
FIXED = dict(preset="tiny", seq_len=128, eval_masks=16, eval_windows=0, log_interval=1, keep=0)
LARGER = dict(tokenizer="unigram", vocab_size=4096)  # the novel has 2,935
FIRST = dict(values="own", lr=4e-3, max_mask_rate=1.0, batch_size=16, ema=0.999)  # whatever the defaults become
FAST = dict(lr=8e-3, max_mask_rate=0.8)
SHALLOW = FAST | dict(n_layers=2, ema=0, eval_interval=10)
HALF = dict(min_mask_rate=0.4, max_mask_rate=0.6, warmup=0.06)
RECORDS = {  # recipes, oldest first: name -> the trainer, flags of prepare.py, flags of the trainer
    "quickstart": ("variants.py", dict(vocab_size=1024), FIRST | dict(max_steps=900, eval_interval=50)),
    "pieces": ("train_diffusion.py", LARGER, FAST | dict(batch_size=8, max_steps=300, eval_interval=20)),
    "shallow": ("train_eco_hybrid.py", LARGER, SHALLOW | dict(max_steps=180)),
    "attention": ("train_eco_hybrid.py", LARGER, SHALLOW | dict(attn_every=2, max_steps=150)),
    "half": ("train_eco_hybrid.py", LARGER, SHALLOW | dict(attn_every=2, max_steps=125) | HALF),
}


def reached(lines):
    """lines: metrics.jsonl. (seconds of training, step, bits/byte there), or None if no validation is within GOAL.

    The seconds are those where a straight line from the validation before the first one within GOAL crosses GOAL, so
    that validating more often makes no record; step and bits/byte are that first one's.
    """
    seconds, before = 0.0, None  # before: seconds and bits/byte of the validation before
    for line in lines:
        if "loss" in line:
            seconds = line["seconds"]["training"]
        elif bits := line.get("bits_per_byte"):  # null where it is not finite
            if bits <= GOAL:
                share = (before[1] - GOAL) / (before[1] - bits) if before else 1.0
                return (before[0] + share * (seconds - before[0]) if before else seconds), line["step"], bits
            before = seconds, bits
    return None


def run(cfg):
    """cfg: config.SpeedrunConfig. Train the record once a seed, one after another; returns the figures, a dict.

    Raises RuntimeError if a training fails or ends above GOAL.
    """
    name = cfg.record or list(RECORDS)[-1]
    check(name in RECORDS, f"there is no record {name!r}, but {', '.join(RECORDS)}")
    script, of_data, of_run = RECORDS[name]
    root = Path(cfg.root)
    data = root / ("data_" + "_".join(map(str, of_data.values())))
    if not (data / "meta.json").exists():
        prepare.prepare(PrepareConfig(output_dir=str(data), **of_data))
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        out = root / f"{name}_seed{seed}"
        flags = FIXED | of_run | dict(data_dir=data, output_dir=out, seed=seed, threads=cfg.threads, device="cpu")
        shutil.rmtree(out, ignore_errors=True)  # the clock starts at nought
        done = subprocess.run(script_argv(script, flags), env=child_environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
        if not (first := reached(read_metrics(out))):
            raise RuntimeError(f"{name}, seed {seed}, ends above {GOAL} bits/byte, see {out}")
        rows.append(dict(seed=seed, seconds=first[0], step=first[1], bits_per_byte=first[2]))
        print(
            f"{name}, seed {seed}: {GOAL} after {first[0]:.1f} s of training; {first[2]:.4f} after {first[1]:,} steps"
        )
    mean, error = mean_error([row["seconds"] for row in rows])
    print(f"{name}: {mean:.1f} s" + ("" if error is None else f" ± {error:.1f} over {len(rows)} seeds"))
    return dict(record=name, goal=GOAL, flags=of_data | of_run, runs=rows, seconds=mean, standard_error=error)

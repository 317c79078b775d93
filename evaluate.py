"""Any checkpoint → eval.json: the cost of held-out text, in units that compare across tokenizers.

    python evaluate.py --ckpt checkpoints/diffusion_hi/best.pt
    python evaluate.py --ckpt checkpoints/eco_hybrid_hi --against checkpoints/diffusion_hi   # window by window

Every token of the split is scored, the end of each document too; bytes and characters are those of the scored text.
A denoiser's cost is the bound on -log p (an upper limit, from random masks), an autoregressive model's is exact.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import torch

import checkpoint
import dataset
import diffusion
import ngram
from config import EvaluateConfig, check, parse, run_main
from intervals import paired, ratio
from machine import pick_device

BINS = 10
MARGIN = 0.18  # how far below the unigram's the bound must be for --check


def text_sizes(windows, tokenizer):
    """Tokens, bytes and characters of each window: three (windows,) float64."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    n_bytes = torch.tensor([len(b) for b in table], dtype=torch.float64)
    n_chars = torch.tensor([sum(c & 0xC0 != 0x80 for c in b) for b in table], dtype=torch.float64)  # UTF-8 lead bytes
    tokens = torch.tensor([len(w) for w in windows], dtype=torch.float64)
    return tokens, *(torch.stack([t[w].sum() for w in windows]) for t in (n_bytes, n_chars))


def evaluate(denoiser, tokenizer, windows, masks=16, seed=0, batch_size=32):
    """Bound ± standard error of the windows, and cross-entropy by the hidden fraction of tokens: a dict.

    A model that knows its exact `nll` is asked for that instead: one pass, no masks, no hidden fraction.
    """
    exact = hasattr(denoiser, "nll")
    if exact:
        masks, nats = 0, torch.cat([denoiser.nll(torch.stack(windows[s])) for s in diffusion.runs(windows, batch_size)])
        nats = nats[:, None]  # (windows, 1), nats per token
    else:
        nats, hidden = diffusion.bound_windows(denoiser, windows, masks, seed, batch_size)  # (windows, masks)
    tokens, n_bytes, n_chars = text_sizes(windows, tokenizer)
    total = nats.double().mean(1) * tokens  # (windows,) nats
    result = {
        "likelihood": "exact" if exact else "bound",
        "windows": len(windows),
        "masks": masks,
        "tokens": int(tokens.sum()),
        "bytes": int(n_bytes.sum()),
        "characters": int(n_chars.sum()),
    }
    units = dict(
        nats_per_token=(total, tokens),
        bits_per_byte=(total / math.log(2), n_bytes),
        bits_per_character=(total / math.log(2), n_chars),
    )
    for name, (cost, size) in units.items():
        mean, error = ratio(cost, size)
        result[name] = {"mean": mean, "standard_error": error}
    result["per_window"] = {"nats": [round(v, 3) for v in total.tolist()], "bytes": n_bytes.long().tolist()}
    result["by_hidden_fraction"] = [] if exact else by_hidden_fraction(nats, hidden)
    return result


def by_hidden_fraction(nats, hidden):
    """Mean ± standard error of nats (windows, masks) in each of BINS bins of the hidden fraction: a list of dicts."""
    which, rows = (hidden * BINS).ceil().long().clamp(1, BINS) - 1, []  # (windows, masks) bin of k / T
    for b in range(BINS):
        values = nats[which == b].double()
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        rows.append(
            {
                "from": b / BINS,
                "to": (b + 1) / BINS,
                "n": len(values),
                "nats_per_token": float(values.mean()) if len(values) else None,
                "standard_error": error,
            }
        )
    return rows


def compare(ours, theirs):
    """Print the paired differences of two equally long lists of eval.json, one pair a seed, and their mean."""
    print(f"{'paired difference, bits/byte':<44}{'ours':>8}{'theirs':>8}{'difference':>20}")
    differences, levels = [], []
    for a, b in zip(ours, theirs, strict=True):
        mean, error = paired(a, b)
        levels.append(b["bits_per_byte"]["mean"])
        differences.append(mean)
        name = f"{Path(a['checkpoint']).parent.name} - {Path(b['checkpoint']).parent.name}"
        print(f"{name:<44}{a['bits_per_byte']['mean']:>8.4f}{levels[-1]:>8.4f}{f'{mean:+.4f} ± {error:.4f}':>20}")
    n, d = len(differences), torch.tensor(differences, dtype=torch.float64)
    spread = f" ± {float(d.std() / n**0.5):.4f} over {n} pairs" if n > 1 else ""
    print(f"mean {float(d.mean()):+.4f}{spread}, {float(d.mean()) / (sum(levels) / n):+.2%}")


def counting(train, windows, tokenizer):
    """Bits per byte that unigram and bigram models, fitted on `train` (tokens,), cost on the windows: a dict."""
    scored, V = torch.cat(windows).numpy(), tokenizer.vocab_size
    scale = 1 / math.log(2) / float(text_sizes(windows, tokenizer)[1].sum())
    train = train[: ngram.MOST_TOKENS]
    return {"unigram": ngram.unigram(train, scored, V) * scale, "bigram": ngram.bigram(train, scored, V) * scale}


def run(cfg):
    """Score a checkpoint, print the figures and write eval.json, whose content is returned. cfg: EvaluateConfig.

    Raises FloatingPointError if the cost is not finite, and RuntimeError if cfg.check is on and it is not well below
    what a unigram model costs.
    """
    loaded = checkpoint.load(cfg.ckpt or checkpoint.newest_run(), pick_device(cfg.device), cfg.ema)
    tokenizer = loaded.tokenizer
    data = dataset.load(cfg.data_dir or loaded.config["data_dir"])
    check(
        data.meta["tokenizer"]["sha256"] == tokenizer.sha256,
        f"{cfg.data_dir or loaded.config['data_dir']} was made with another tokenizer "
        f"({data.meta['tokenizer']['sha256'][:12]}) than {loaded.path} ({tokenizer.sha256[:12]})",
    )
    output = Path(cfg.output) if cfg.output else loaded.path.parent / "eval.json"
    check(output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}")
    ids = getattr(data, cfg.split)
    windows = dataset.windows(ids, loaded.denoiser.config.max_seq_len, cfg.max_windows)
    start = time.perf_counter()
    result = evaluate(loaded.denoiser, tokenizer, windows, cfg.masks, cfg.seed, cfg.batch_size)
    seconds = time.perf_counter() - start
    if not math.isfinite(result["bits_per_byte"]["mean"]):
        raise FloatingPointError(f"the cost of text under {loaded.path} is not finite: its weights are broken")

    baselines = counting(data.train, windows, tokenizer)
    result = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "kind": loaded.kind,
        "split": cfg.split,
        "data_sha256": data.hash,
        "ema": cfg.ema,
        "seed": cfg.seed,
        "batch_size": cfg.batch_size,
        **result,
        "baselines_bits_per_byte": baselines,
        "seconds": seconds,
    }

    how = f"{cfg.masks} masks each" if result["masks"] else "exact likelihood"
    print(
        f"{loaded.path}, step {loaded.step:,}: {result['windows']} windows of {cfg.split}, {how}, "
        f"{result['tokens']:,} tokens, {result['bytes']:,} bytes ({seconds:.1f} s)"
    )
    for name in ("bits_per_byte", "bits_per_character", "nats_per_token"):
        print(f"  {name.replace('_', ' '):20} {result[name]['mean']:.4f} ± {result[name]['standard_error']:.4f}")
    print("  bits per byte of counting: " + ", ".join(f"{name} {value:.4f}" for name, value in baselines.items()))
    if result["by_hidden_fraction"]:
        print("  hidden        nats/token")
    for b in result["by_hidden_fraction"]:
        if b["n"]:
            print(
                f"  {b['from']:.0%} – {b['to']:.0%}".ljust(16)
                + f"{b['nats_per_token']:.3f} ± {b['standard_error'] or 0:.3f}"
            )
    checkpoint.replace(output, lambda t: t.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    print(f"wrote {output}")
    if cfg.check:
        ours = result["bits_per_byte"]["mean"]
        against = "; ".join(f"{name} {bits:.4f} ({ours / bits - 1:+.1%})" for name, bits in baselines.items())
        print(f"check: {result['likelihood']} {ours:.4f} bits/byte; {against}")
        if not ours <= (1 - MARGIN) * baselines["unigram"]:
            raise RuntimeError(f"the cost is not {MARGIN:.0%} below the unigram's; train longer, look at metrics.jsonl")
    return result


def main():
    (cfg,) = parse(__doc__, EvaluateConfig)
    names = [name.strip() for name in cfg.ckpt.split(",")]
    folders = [Path(name.strip()) for name in cfg.against.split(",") if name.strip()]
    check(all(names) or len(names) == 1, f"--ckpt {cfg.ckpt!r} names nothing between two commas")
    check(
        not folders or len(folders) == len(names), f"{len(names)} --ckpt cannot be paired with {len(folders)} --against"
    )
    check(not cfg.output or len(names) == 1, "--output is for one --ckpt; several write eval.json beside each")
    for folder in folders:
        check((folder / "eval.json").is_file(), f"--against {folder}: no eval.json there; evaluate it first, alike")
    theirs = [json.loads((folder / "eval.json").read_text("utf-8")) for folder in folders]
    ours = [run(dataclasses.replace(cfg, ckpt=name)) for name in names]
    if theirs:
        compare(ours, theirs)


if __name__ == "__main__":
    run_main(main)

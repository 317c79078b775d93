"""Any checkpoint → eval.json: the cost of held-out text, in units that compare across tokenizers.

    python evaluate.py --ckpt checkpoints/diffusion_hi/best.pt
    python evaluate.py --ckpt checkpoints/eco_hybrid_hi --against checkpoints/diffusion_hi   # window by window
    python evaluate.py --chain_rule 32 --judge checkpoints/twin     # minutes more: exact likelihood, samples
    python evaluate.py --ckpt checkpoints/chat_hi --qa              # question answering alone, into the same file

Every token of the split is scored, the end of each document too; bytes and characters are those of the scored text.
A denoiser's cost is the bound on -log p (an upper limit, from random masks), an autoregressive model's is exact.
--chain_rule gives a denoiser's exact cost under two fixed orders. --judge measures what a model writes (quality.py).
"""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

import torch

import checkpoint
import dataset
import diffusion
import hub
import ngram
import quality
import questions
import sampling
from config import EvaluateConfig, check, one_line, parse, run_main
from intervals import paired, ratio
from machine import pick_device, total_memory

BINS = 10
ORDERS = {"left_to_right": None, "own_order": sampling.STRATEGIES["confidence"]}  # of the chain rule
MOST_LOGITS = 1 << 29  # of a forward: 2 GiB; vocabularies of pretrained models are large
MARGIN = 0.18  # how far below the unigram's the bound must be for --check


def figure(numerator, denominator):
    return dict(zip(("mean", "standard_error"), ratio(numerator, denominator), strict=True))


def text_sizes(windows, tokenizer):
    """Tokens, bytes and characters of each window: three (windows,) float64."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    n_bytes = torch.tensor([len(b) for b in table], dtype=torch.float64)
    n_chars = torch.tensor([sum(c & 0xC0 != 0x80 for c in b) for b in table], dtype=torch.float64)  # UTF-8 lead bytes
    tokens = torch.tensor([len(w) for w in windows], dtype=torch.float64)
    return tokens, *(torch.stack([t[w].sum() for w in windows]) for t in (n_bytes, n_chars))


def spans(windows, answers=None):
    """Of each window (T_w,) its answer, EOS included, or, where there are no chats, all of it."""
    ends = answers.tolist() if answers is not None else [(0, len(w)) for w in windows]
    return [w[begin:end] for w, (begin, end) in zip(windows, ends, strict=True)]


class Accuracy:
    """An observer: how often the likeliest token is right, by the hidden fraction of its window, in BINS bins."""

    def __init__(self):
        self.sums = torch.zeros(2, BINS, dtype=torch.float64)  # tokens, how many were right

    def __call__(self, logits, target, share):
        right = (logits.argmax(1) == target).cpu().double()  # (N,)
        self.sums.index_add_(1, bins_of(share), torch.stack((torch.ones_like(right), right)))

    def figures(self):
        rows = enumerate(self.sums.T.tolist())
        return [{"from": b / BINS, "to": (b + 1) / BINS, "n": int(n), "accuracy": right / n if n else None}
                for b, (n, right) in rows]  # fmt: skip


def evaluate(denoiser, tokenizer, windows, masks=16, seed=0, batch_size=32, observe=None, answers=None):
    """Bound ± standard error of the windows, and cross-entropy by the hidden fraction of tokens: a dict.

    A model that knows its exact `nll` is asked for that instead: one pass, no masks, no hidden fraction.
    observe: see diffusion.token_nll.
    answers (windows, 2), of chats: what each answer costs, its first EOS included, given the prompt before it. The EOS
    behind that, which fill the row, are part of what a denoiser is asked for, so that its bound is one on the answer:
    their nats count, as tokens and bytes they do not. The observer sees the answers' text, no EOS; so does Accuracy.
    """
    exact, given, accuracy = hasattr(denoiser, "nll"), None, Accuracy()
    tokens, n_bytes, n_chars = text_sizes(spans(windows, answers), tokenizer)
    scored, see = tokens, observe  # (windows,) tokens of which nats are the mean
    if answers is not None:
        given = answers[:, 0]
        scored = scored if exact else torch.tensor([len(w) for w in windows]) - given

        def see(logits, target, *share):
            text = target != tokenizer.eos_id
            for observer in (observe, None if exact else accuracy):
                if observer:
                    observer(logits[text], target[text], *(v[text.cpu()] for v in share))

    batch_size = min(batch_size, max(1, MOST_LOGITS // (tokenizer.vocab_size * len(windows[0]))))
    if exact:
        masks, runs = 0, diffusion.runs(windows, batch_size)
        batches = ((torch.stack(windows[s]), {} if answers is None else dict(answer=answers[s])) for s in runs)
        nats = torch.cat([denoiser.nll(x0, see, **of) for x0, of in batches])[:, None]  # (windows, 1), per token
    else:  # (windows, masks) both
        nats, hidden = diffusion.bound_windows(denoiser, windows, masks, seed, batch_size, see, given)
    total = nats.double().mean(1) * scored  # (windows,) nats
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
        result[name] = figure(cost, size)
    result["per_window"] = {"nats": [round(v, 3) for v in total.tolist()], "bytes": n_bytes.long().tolist()}
    result["by_hidden_fraction"] = [] if exact else by_hidden_fraction(nats, hidden)
    if answers is not None:
        result["accuracy_by_hidden_fraction"] = [] if exact else accuracy.figures()
    return result


def bins_of(share):
    """Which of BINS bins each share is in, from 0 on."""
    return (share * BINS).ceil().long().clamp(1, BINS) - 1


def by_hidden_fraction(nats, hidden):
    """Mean ± standard error of nats (windows, masks) in each of BINS bins of the hidden fraction: a list of dicts."""
    which, rows = bins_of(hidden), []  # (windows, masks) bin of k / T
    for b in range(BINS):
        values = nats[which == b].double()
        mean = float(values.mean()) if len(values) else None
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        figures = {"nats_per_token": mean, "standard_error": error}
        rows.append({"from": b / BINS, "to": (b + 1) / BINS, "n": len(values), **figures})
    return rows


class Reliability:
    """An observer: how sure the model was of its likeliest token, against how often that was right, in BINS bins.

    Every hidden token under every mask counts once, and of an autoregressive model every token.
    """

    def __init__(self):
        self.sums = torch.zeros(3, BINS, dtype=torch.float64)  # tokens, their confidence, how many were right

    def __call__(self, logits, target, *_):
        best, token = logits.max(1)
        confidence = (best.float() - logits.float().logsumexp(1)).exp().cpu().double()  # (N,)
        values = torch.stack((torch.ones_like(confidence), confidence, (token == target).cpu().double()))
        self.sums.index_add_(1, bins_of(confidence), values)

    def figures(self):
        """The curve, and the mean distance of its bins from the diagonal (the expected calibration error): a dict."""
        rows = []
        for b, (n, sure, right) in enumerate(self.sums.T.tolist()):
            means = {"confidence": sure / n if n else None, "accuracy": right / n if n else None}
            rows.append({"from": b / BINS, "to": (b + 1) / BINS, "n": int(n), **means})
        n, sure, right = self.sums
        return {"reliability": rows, "calibration_error": float((sure - right).abs().sum() / n.sum())}


# ---------------------------------------------------------------------------------------------------------------------
# what takes a forward a token


def evenly(windows, n):
    """n of the full windows, evenly spread, or all if they are fewer: their places in the list."""
    full = [i for i, w in enumerate(windows) if len(w) == len(windows[0])]
    n = min(n, len(full))
    return [full[i * len(full) // n] for i in range(n)]


def chain_rule(denoiser, tokenizer, windows, bound, n, batch_size=32):
    """Exact likelihood of n of the windows under each of ORDERS, beside their bound (nats of every window): a dict.

    Both orders are distributions of their own. From left to right is not what the model was trained for more than any
    other order; its own order is the one in which it writes.
    """
    which = evenly(windows, n)
    some = [windows[i] for i in which]
    tokens, n_bytes, _ = text_sizes(some, tokenizer)
    costs = {}  # (n,) nats each
    for name, score in ORDERS.items():
        batches = (torch.stack(some[s]) for s in diffusion.runs(some, batch_size))
        costs[name] = torch.cat([diffusion.chain_rule(denoiser, x0, score) for x0 in batches]) * tokens
    costs["bound"] = torch.tensor([bound[i] for i in which], dtype=torch.float64)
    result = {}
    for name, nats in costs.items():
        result[name] = {
            "windows": len(some),
            "bits_per_byte": figure(nats / math.log(2), n_bytes),
            "nats_per_token": figure(nats, tokens),
            "bits_per_byte_less_bound": figure((nats - costs["bound"]) / math.log(2), n_bytes),
            "per_window": {"window": which, "nats": [round(v, 3) for v in nats.tolist()]},
        }
    return result


def samples(loaded, judge, windows, cfg):
    """Figures of what a model writes behind the first quarter of cfg.samples windows, and of what really stands there:
    two dicts of quality.measure. A window is as long as both models allow."""
    T = min(len(windows[0]), judge.denoiser.config.max_seq_len)
    real, given = torch.stack([windows[i][:T] for i in evenly(windows, cfg.samples)]), T // 4  # (samples, T)
    texts, how = quality.continued(loaded, real, given, cfg.sample_steps, cfg.seed, cfg.batch_size)
    ours, theirs = (quality.measure(t, loaded.tokenizer, judge, given) for t in (texts, real.tolist()))
    return ours | {"judge": str(judge.path), **how}, theirs


# ---------------------------------------------------------------------------------------------------------------------
# pairs of runs


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


# ---------------------------------------------------------------------------------------------------------------------
# the report


def show(value):
    if isinstance(value, dict):
        return f"{value['mean']:.4f} ± {value['standard_error']:.4f}"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def words(name):
    return name.replace("_", " ")


def print_scores(result):
    how = f"{result['masks']} masks each" if result["masks"] else "exact likelihood"
    of = "answers" if "accuracy_by_hidden_fraction" in result else "windows"
    print(
        f"{result['checkpoint']}, step {result['step']:,}: {result['windows']} {of} of {result['split']}, {how}, "
        f"{result['tokens']:,} tokens, {result['bytes']:,} bytes ({result['seconds']:.1f} s)"
    )
    for name in ("bits_per_byte", "bits_per_character", "nats_per_token"):
        print(f"  {words(name):20} {show(result[name])}")
    counted = result["baselines_bits_per_byte"]
    print("  bits per byte of counting: " + ", ".join(f"{name} {value:.4f}" for name, value in counted.items()))
    if result["by_hidden_fraction"]:
        print("  hidden        nats/token")
    for b in result["by_hidden_fraction"]:
        if b["n"]:
            error = f"{b['standard_error'] or 0:.3f}"
            print(f"  {b['from']:.0%} – {b['to']:.0%}".ljust(16) + f"{b['nats_per_token']:.3f} ± {error}")
    for b in result.get("accuracy_by_hidden_fraction", []):
        if b["n"]:
            print(f"  {b['from']:.0%} – {b['to']:.0%} hidden: {b['accuracy']:.1%} of {b['n']:,} tokens right")
    print(f"  confidence    right    of tokens    (calibration error {result['calibration_error']:.4f})")
    for b in result["reliability"]:
        if b["n"]:
            print(f"  {b['confidence']:<14.3f}{b['accuracy']:<9.3f}{b['n']:,}")


def print_chain_rule(orders):
    print(f"  {orders['bound']['windows']} full windows       {'bits per byte':20}less bound")
    for name, order in orders.items():
        less = show(order["bits_per_byte_less_bound"]) if name != "bound" else ""
        print(f"  {words(name):24}{show(order['bits_per_byte']):20}{less}".rstrip())


def print_samples(ours, real):
    print(f"  written by {ours['strategy']}, {ours['steps']} forwards, temperature {ours['temperature']}, behind "
          f"{ours['given']} given tokens; judge {ours['judge']}")  # fmt: skip
    print(f"  {'':24}{'written':20}real text")
    for name in real:
        print(f"  {words(name):24}{show(ours[name]):20}{show(real[name])}")


def written(output):
    """What stands in `output` already: a dict. Raises RuntimeError if it is damaged."""
    try:
        old = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        check(isinstance(old, dict), "no JSON object")
        return old
    except ValueError as e:
        raise RuntimeError(f"{output} is damaged ({one_line(e)}); delete it") from None


def unlike(old, which, beside):
    """The first thing in which figures `old` are not of the checkpoint `which`: a text, empty if they are.

    beside: both lie in one folder, which may have moved."""
    place = (lambda path: Path(path).name) if beside else (lambda path: Path(path).resolve())
    for key, value in which.items():
        there = old.get(key, value)
        if there != value and not (key == "checkpoint" and place(there) == place(value)):
            return f"{key} {there}, not {value}"
    return ""


def write(output, result):
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    checkpoint.replace(output, lambda t: t.write_text(text, encoding="utf-8"))
    print(f"wrote {output}")


def ask(cfg, loaded, output, which):
    """Put the questions to a checkpoint, print the figures and add them to `output`, whose content is returned.

    Raises ValueError if the file holds figures of another checkpoint than `which` says.
    """
    items, old = questions.load(cfg.qa), written(output)
    other = unlike(old, which, beside=not cfg.output)
    check(
        not other,
        f"{output} is of another checkpoint ({other}); evaluate this one without --qa first, or name another --output",
    )
    start = time.perf_counter()
    result = questions.evaluate(loaded, items, cfg.answer_tokens, cfg.batch_size, cfg.data_dir)
    result |= {"file": cfg.qa, "sha256": checkpoint.sha256(cfg.qa), "seconds": time.perf_counter() - start}
    print(f"{loaded.path}, step {loaded.step:,}: {len(items)} questions of {cfg.qa}, each answered in up to "
          f"{cfg.answer_tokens} tokens, greedily from left to right ({result['seconds']:.1f} s)")  # fmt: skip
    questions.report(result)
    result = which | old | {"qa": result}
    write(output, result)
    return result


def run(cfg):
    """Score a checkpoint, print the figures and write eval.json, whose content is returned. cfg: EvaluateConfig.

    Raises FloatingPointError if the cost is not finite, and RuntimeError if cfg.check is on and it is not well below
    what a unigram model costs.
    """
    loaded = checkpoint.load(cfg.ckpt or checkpoint.newest_run(), pick_device(cfg.device), cfg.ema)
    tokenizer = loaded.tokenizer
    folder = loaded.path.parent
    if str(loaded.path).startswith("hub:") and not cfg.output:
        folder = Path("checkpoints", str(loaded.path).replace("hub:", "hub--").strip("/").replace("/", "--"))
        folder.mkdir(parents=True, exist_ok=True)
    output = Path(cfg.output) if cfg.output else folder / "eval.json"
    check(output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}")
    which = {"checkpoint": str(loaded.path), "step": loaded.step, "kind": loaded.kind, "ema": cfg.ema}
    if cfg.qa:
        return ask(cfg, loaded, output, which)
    data_dir = cfg.data_dir or loaded.config.get("data_dir")
    check(data_dir, f"{loaded.path} was not trained here: --data_dir says what to score")
    data, its_own = dataset.load(data_dir), f"; prepare.py --tokenizer {loaded.path}" if loaded.step == 0 else ""
    check(
        data.meta["tokenizer"]["sha256"] == tokenizer.sha256,
        f"{data_dir} was made with another tokenizer "
        f"({data.meta['tokenizer']['sha256'][:12]}) than {loaded.path} ({tokenizer.sha256[:12]}){its_own}",
    )
    check(
        not (cfg.chain_rule and hasattr(loaded.denoiser, "nll")),
        f"{loaded.path} is {loaded.kind}: its likelihood is exact already; leave --chain_rule out",
    )
    check(not (data.answers and (cfg.chain_rule or cfg.judge)), "--chain_rule and --judge are for text, this is chats")
    judge = checkpoint.load(cfg.judge, pick_device(cfg.device)) if cfg.judge else None
    if judge:
        quality.check_judge(judge, tokenizer)
    ids = getattr(data, cfg.split)
    T = data.meta["seq_len"] if data.answers else loaded.denoiser.config.max_seq_len
    windows = dataset.windows(ids, T, cfg.max_windows)
    answers = data.answers[cfg.split][: len(windows)] if data.answers else None
    start, curve = time.perf_counter(), Reliability()
    result = evaluate(loaded.denoiser, tokenizer, windows, cfg.masks, cfg.seed, cfg.batch_size, curve, answers)
    seconds = time.perf_counter() - start
    if not math.isfinite(result["bits_per_byte"]["mean"]):
        raise FloatingPointError(f"the cost of text under {loaded.path} is not finite: its weights are broken")

    text = data.train  # of chats, what the counting models learn and are asked for is the answers too
    if data.answers:
        text = torch.cat(spans(dataset.windows(data.train, T), data.answers["train"])).numpy()
    baselines = counting(text, spans(windows, answers), tokenizer)
    result = {
        **which,
        "split": cfg.split,
        "data_sha256": data.hash,
        "seed": cfg.seed,
        "batch_size": cfg.batch_size,
        **result,
        **curve.figures(),
        "baselines_bits_per_byte": baselines,
        "seconds": seconds,
    }

    print_scores(result)
    if cfg.chain_rule:
        bound = result["per_window"]["nats"]
        orders = chain_rule(loaded.denoiser, tokenizer, windows, bound, cfg.chain_rule, cfg.batch_size)
        result["chain_rule"] = orders
        print_chain_rule(orders)
    if judge:
        result["samples"], result["real_text"] = samples(loaded, judge, windows, cfg)
        print_samples(result["samples"], result["real_text"])
    with contextlib.suppress(RuntimeError):  # a damaged file is written anew
        old = written(output)
        if "qa" in old and not unlike(old, which, beside=not cfg.output):
            result["qa"] = old["qa"]  # still true of this checkpoint
    write(output, result)
    if cfg.check:
        ours = result["bits_per_byte"]["mean"]
        against = "; ".join(f"{name} {bits:.4f} ({ours / bits - 1:+.1%})" for name, bits in baselines.items())
        print(f"check: {result['likelihood']} {ours:.4f} bits/byte; {against}")
        if not ours <= (1 - MARGIN) * baselines["unigram"]:
            raise RuntimeError(f"the cost is not {MARGIN:.0%} below the unigram's; train longer, look at metrics.jsonl")
    return result


def main():
    (cfg,) = parse(__doc__, EvaluateConfig)
    if cfg.available:
        print("\n".join(hub.available(total_memory(pick_device(cfg.device)))))
        return
    names = [name.strip() for name in cfg.ckpt.split(",")]
    folders = [Path(name.strip()) for name in cfg.against.split(",") if name.strip()]
    check(all(names) or len(names) == 1, f"--ckpt {cfg.ckpt!r} names nothing between two commas")
    check(
        not folders or len(folders) == len(names), f"{len(names)} --ckpt cannot be paired with {len(folders)} --against"
    )
    check(not cfg.output or len(names) == 1, "--output is for one --ckpt; several write eval.json beside each")
    for folder in folders:
        check((folder / "eval.json").is_file(), f"--against {folder}: no eval.json there; evaluate it first, alike")
    theirs = [written(folder / "eval.json") for folder in folders]
    for folder, scores in zip(folders, theirs, strict=True):
        check("bits_per_byte" in scores, f"--against {folder}: its eval.json holds no likelihood; evaluate it first")
    ours = [run(dataclasses.replace(cfg, ckpt=name)) for name in names]
    if theirs:
        compare(ours, theirs)


if __name__ == "__main__":
    run_main(main)

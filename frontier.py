"""Ways of writing compared: quality against forwards and against seconds. Started as `python benchmark.py sample`.

    python benchmark.py sample --ckpt checkpoints/diffusion_hi --twin checkpoints/autoregressive_hi

Every way continues the same prompts of the validation text, one prompt at a time (batch 1), by the same number of
tokens (EOS is forbidden), and the ways take turns, so that a busy machine slows all of them. The twin judges what was
written (quality.measure), and writes too, with its cache. Two references: the twin, and the plainest exact sampler, one
token a forward in random order with everything computed anew each time.
"""

import collections
import statistics
import time

import torch

import checkpoint
import dataset
import quality
import sampling
from config import check

REFERENCE, TWIN = "random", "twin, KV cache"
NEAR = dict(judge=0.05, entropy=0.03)  # as good as the reference: at most so much worse, and as varied
GOAL = 8.0  # times the reference's speed, at a quality near it
MARKERS = "os^vD*Phx+<>1234"


def ways(new, block):
    """{name: [settings of sampling.denoise]} for `new` tokens: each strategy, from one token a forward to sixteen."""
    steps = [new // n for n in (1, 2, 4, 8, 16) if new // n]
    fixed = [name for name in sampling.STRATEGIES if name not in sampling.AHEAD]
    table = {name: [dict(strategy=name, steps=n) for n in steps] for name in fixed}
    surer, bounds = (0.9, 0.7, 0.5, 0.3), (0.1, 0.5, 1.0, 2.0)
    table["threshold"] = [dict(strategy="threshold", steps=new, threshold=t) for t in surer]
    table["entropy_bounded"] = [dict(strategy="entropy_bounded", steps=new, entropy_bound=b) for b in bounds]
    table["ReMDM cap"] = [dict(strategy="random", steps=n, remask=0.02) for n in steps[:4]]
    table["ReMDM loop"] = [dict(strategy="random", steps=n, remask=0.02, loop=0.5) for n in steps[:4]]
    for name, order in (("blocks, random", "random"), ("blocks, confidence", "confidence")):
        table[name] = [dict(strategy=order, steps=n, block_length=block) for n in steps if n >= -(-new // block) + 1]
    table["blocks, no cache"] = [settings | dict(cache=False) for settings in table["blocks, random"]]
    table["blocks, entropy_bounded"] = [w | dict(block_length=block) for w in table["entropy_bounded"]]
    table["confidence, no 4-gram twice"] = [dict(strategy="confidence", steps=n, no_repeat=4) for n in steps]
    return table


def label(settings):
    """What distinguishes the ways of one name."""
    limit = settings.get("threshold", settings.get("entropy_bound"))
    return f"{settings['steps']} steps" if limit is None else f"limit {limit}"


def timed(steps, device):
    """The last of an iterator's steps, and the seconds that all took."""
    start = time.perf_counter()
    (step,) = collections.deque(steps, maxlen=1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return step, time.perf_counter() - start


class Watched:
    """A denoiser that, besides answering from the cache, computes what it would have answered without one."""

    can_cache = True

    def __init__(self, denoiser):
        self.denoiser, self.mask_id, self.cache, self.drift = denoiser, denoiser.mask_id, denoiser.cache, []

    def __call__(self, x, where, lengths, cache, start):
        ours = self.denoiser(x, where, lengths, cache=cache, start=start).log_softmax(1)  # (N, V)
        if start:
            canvas = torch.cat((self.before[:, :start], x), 1)
            exact = self.denoiser(canvas, where + start).log_softmax(1)  # batch 1: flat places move by what is before
            self.drift += (exact.exp() * (exact - ours)).sum(1).tolist()
        else:
            self.before = x
        return ours


def measure(cfg, device):
    """(rows, real, drift): a dict a way of writing; the figures of the real text; nats by which the cache drifts."""
    loaded, twin = (checkpoint.load(path, device) for path in (cfg.ckpt or checkpoint.newest_run(), cfg.twin))
    denoiser, tokenizer = loaded.denoiser, loaded.tokenizer
    check(not hasattr(denoiser, "extend"), f"--ckpt {loaded.path} is autoregressive; name a denoiser, and it as --twin")
    own = denoiser.block_length
    check(not own, f"--ckpt {loaded.path} writes in blocks of {own} alone; name a plain denoiser, blocks are compared")
    quality.check_judge(twin, tokenizer)
    T = cfg.prompt_tokens + cfg.new_tokens
    limit = min(m.config.max_seq_len for m in (denoiser, twin.denoiser))
    check(T <= limit, f"--prompt_tokens and --new_tokens are {T} together, the models' windows hold {limit}")
    windows = dataset.windows(dataset.load(cfg.data_dir or loaded.config["data_dir"]).val, T)
    windows = [w for w in windows if len(w) == T]
    check(len(windows) >= cfg.samples, f"--samples is {cfg.samples}, the validation text has {len(windows)} windows")
    real = torch.stack([windows[i * len(windows) // cfg.samples] for i in range(cfg.samples)]).to(device)  # (n, T)

    never = [*tokenizer.never, tokenizer.eos_id]
    drawing = dict(temperature=cfg.temperature, top_p=cfg.top_p, forbid=never)
    table = [(name, settings) for name, all_of in ways(cfg.new_tokens, cfg.block).items() for settings in all_of]
    rows = [dict(strategy=TWIN, settings={}, label="1 a forward", steps=cfg.new_tokens, reference=True)]
    for name, settings in table:
        plain = name == REFERENCE and settings["steps"] == cfg.new_tokens
        rows.append(dict(strategy=name, settings=settings, label=label(settings), steps=settings["steps"],
                         reference=plain))  # fmt: skip
    done = [[] for _ in rows]  # (tokens, forwards, seconds) of each sample
    for i in range(-1, cfg.samples):  # the first round warms up: fewer tokens, not counted
        x = real[max(i, 0)][None].clone()
        x[:, cfg.prompt_tokens :] = denoiser.mask_id
        for row, out in zip(rows, done, strict=True):
            settings = drawing | dict(generator=torch.Generator().manual_seed(i + 1))
            if row["strategy"] == TWIN:
                decoding = sampling.write(twin.denoiser, x, **settings)
            elif i >= 0 or row["steps"] <= 64:
                decoding = sampling.denoise(denoiser, x, **row["settings"], **settings)
            else:
                continue
            step, seconds = timed(decoding, device)
            if i >= 0:
                out.append((step.x[0].tolist(), step.forwards, seconds))
    for row, out in zip(rows, done, strict=True):
        texts, forwards, seconds = zip(*out, strict=True)
        row |= dict(
            forwards=statistics.mean(forwards),
            seconds=statistics.median(seconds),
            all_seconds=seconds,
            tokens_a_second=cfg.new_tokens / statistics.median(seconds),
            quality=quality.measure(texts, tokenizer, twin, cfg.prompt_tokens),
            text=tokenizer.decode(texts[0][cfg.prompt_tokens :]),
        )
    drift = []
    if denoiser.can_cache:
        watched = Watched(denoiser)
        settings = dict(strategy="random", steps=max(cfg.new_tokens // 4, -(-T // cfg.block)), block_length=cfg.block)
        collections.deque(sampling.denoise(watched, x, **settings, **drawing), maxlen=0)
        drift = watched.drift
    facts = dict(ckpt=str(loaded.path), twin=str(twin.path), T=T)
    return rows, quality.measure(real.tolist(), tokenizer, twin, cfg.prompt_tokens), drift, facts


def verdict(rows):
    """The fastest way that is as good as the reference, and how many times as fast it is: a dict."""
    twin, plain = (next(r for r in rows if r["reference"] and (r["strategy"] == TWIN) == of) for of in (True, False))
    nats = lambda row: row["quality"]["judge_nats_per_token"]["mean"]  # noqa: E731
    as_good = [
        row
        for row in rows
        if row["strategy"] != TWIN
        and nats(row) <= (1 + NEAR["judge"]) * nats(plain)
        and abs(row["quality"]["unigram_entropy"] / plain["quality"]["unigram_entropy"] - 1) <= NEAR["entropy"]
    ]
    best = min(as_good, key=lambda row: row["seconds"])  # the reference itself is among them
    return dict(
        strategy=best["strategy"],
        label=best["label"],
        times_the_reference=plain["seconds"] / best["seconds"],
        times_the_twin=twin["seconds"] / best["seconds"],
        as_good=[f"{row['strategy']}, {row['label']}" for row in as_good],
        goal=GOAL,
    )


def run(cfg, device):
    """Print the table and return the figures of `benchmark.py sample`. cfg: a config.FrontierConfig."""
    check(cfg.twin, "--twin is missing: an autoregressive run of the same data, which judges what is written")
    rows, real, drift, facts = measure(cfg, device)
    print(f"{facts['ckpt']} continues {cfg.samples} prompts of {cfg.prompt_tokens} tokens by {cfg.new_tokens}, one at "
          f"a time, temperature {cfg.temperature}, top-p {cfg.top_p}; judge {facts['twin']}\n")  # fmt: skip
    print(f"{'strategy':<28}{'':<18}{'forwards':>9}{'s':>8}{'tokens/s':>10}{'judge, nats':>15}{'entropy':>9}"
          f"{'dist-1':>8}{'dist-2':>8}{'4-grams x2':>11}{'bad akshara':>12}")  # fmt: skip
    for row in [dict(strategy="real text", label="", quality=real), *rows]:
        q, speed = row["quality"], "".rjust(27)
        if "seconds" in row:
            speed = f"{row['forwards']:>9.1f}{row['seconds']:>8.3f}{row['tokens_a_second']:>10,.0f}"
        judge = f"{q['judge_nats_per_token']['mean']:.3f} ± {q['judge_nats_per_token']['standard_error']:.3f}"
        print(f"{row['strategy']:<28}{row['label']:<18}{speed}{judge:>15}{q['unigram_entropy']:>9.3f}"
              f"{q['distinct_1']:>8.3f}{q['distinct_2']:>8.3f}{q['repeated_4grams']:>11.4f}"
              f"{q['invalid_aksharas']:>12.4f}")  # fmt: skip
    best = verdict(rows)
    print(f"\nfastest of those as good as one token a forward (judge within {NEAR['judge']:.0%}, entropy within "
          f"{NEAR['entropy']:.0%}): {best['strategy']}, {best['label']}: {best['times_the_reference']:.1f} × its speed "
          f"(goal {GOAL:g}), {best['times_the_twin']:.2f} × the twin's")  # fmt: skip
    if drift:
        print(f"cache of blocks of {cfg.block}: drifts by {statistics.mean(drift):.4f} nats (KL) on average, "
              f"{max(drift):.3f} at most, over {len(drift):,} predictions")  # fmt: skip
    figures = dict(rows=rows, real_text=real, verdict=best, drift=dict(mean=statistics.mean(drift), most=max(drift))
                   if drift else None, **facts)  # fmt: skip
    return figures


def draw(figures, path):
    """Judge's nats against forwards and against seconds, a line a strategy; hollow where variety is lost."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    rows, real = figures["rows"], figures["real_text"]
    plain = next(row for row in rows if row["strategy"] == REFERENCE and row["reference"])
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    for axes, of in zip(panels, ("forwards", "seconds"), strict=True):
        for n, name in enumerate(names):
            mine = [row for row in rows if row["strategy"] == name]
            x, y = [r[of] for r in mine], [r["quality"]["judge_nats_per_token"]["mean"] for r in mine]
            color, marker = plt.cm.tab20(n % 20), MARKERS[n % len(MARKERS)]
            axes.plot(x, y, color=color, linewidth=1, alpha=0.6)
            varied = [abs(r["quality"]["unigram_entropy"] / plain["quality"]["unigram_entropy"] - 1) <= NEAR["entropy"]
                      for r in mine]  # fmt: skip
            for a, b, full in zip(x, y, varied, strict=True):
                axes.plot(a, b, marker=marker, color=color, markerfacecolor=color if full else "none", linestyle="")
            axes.plot([], [], marker=marker, color=color, label=name)
        axes.axhline(real["judge_nats_per_token"]["mean"], color="grey", linestyle=":", label="real text")
        worst = (1 + NEAR["judge"]) * plain["quality"]["judge_nats_per_token"]["mean"]
        axes.axhline(worst, color="black", linewidth=0.8, linestyle="--", label="5 % above one token a forward")
        axes.set(xscale="log", xlabel=of + " a text")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("judge's nats per token (hollow: entropy off by more than 3 %)")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)

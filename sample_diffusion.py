"""Any checkpoint → Hindi text: continue a prompt, fill blanks, or write freely, all positions at once, step by step.

    python sample_diffusion.py --prompt "एक दिन" --max_new_tokens 64 --steps 16
    python sample_diffusion.py --prompt "मैं कल ___ गया था" --html replay.html      # ___5___ is a blank of five tokens
    python sample_diffusion.py --ckpt checkpoints/chat_hi --chat                    # a talk, after train_instruct.py

In a talk /stop or Ctrl-C stops an answer, Ctrl-C twice or the end of the input leaves; what no longer fits into the
model's window is forgotten, oldest first. Questions can be piped in, a line each.
An autoregressive checkpoint continues a prompt from left to right, one token a forward, and cannot fill blanks;
--strategy, --steps, --threshold and --confidence_stop are for denoisers and change nothing there.
Counted are the tokens that are shown and were not given; forwards are passes through the model, of the whole batch.
"""

import dataclasses
import itertools
import re
import select
import shutil
import sys
import time
from dataclasses import dataclass

import torch

import chat
import checkpoint
import gif
import sampling
import traces
from config import SampleConfig, check, parse, run_main
from machine import pick_device

BLANK = re.compile(r"_{3,}(?:(\d+)_{3,})?")
LONGEST_BLANK = 8  # tokens of a blank of free length, at most
CANVASES = 64  # lengths of all free blanks tried together, at most


def canvases(prompt, tokenizer, mask_id, max_new_tokens, limit):
    """A prompt → the canvases (lists of ids with MASKs) it can become: several if a blank's length is free.

    Raises ValueError if one is longer than `limit`, or if there is nothing to fill.
    """
    pieces = BLANK.split(prompt)  # text, length or None, text, ...

    def fits(longest):
        check(
            longest <= limit,
            f"the prompt and what is to be written take {longest} tokens, the model's window holds {limit}; "
            f"shorten the prompt ({len(tokenizer.encode(prompt))} tokens) or --max_new_tokens",
        )

    fits(sum(int(n or 1) for n in pieces[1::2]) if pieces[1:] else len(tokenizer.encode(prompt)) + max_new_tokens)
    if len(pieces) == 1:
        rows = [tokenizer.encode(prompt) + [mask_id] * max_new_tokens]
    else:
        # the space before a blank belongs to the word that fills it, as in every token of a word
        texts = [
            tokenizer.encode(t.removesuffix(" ") if i < len(pieces) // 2 else t) for i, t in enumerate(pieces[::2])
        ]
        lengths = [int(n) if n else None for n in pieces[1::2]]
        check(all(n != 0 for n in lengths), "a blank of 0 tokens holds nothing; use 1 or more")
        m = lengths.count(None)  # with many free blanks fewer lengths each: CANVASES ** (1 / m)
        most = next(n for n in range(LONGEST_BLANK, 0, -1) if n**m <= CANVASES)
        rows = []
        for free in itertools.product(range(1, most + 1), repeat=m):
            row, free = list(texts[0]), iter(free)
            for n, text in zip(lengths, texts[1:], strict=True):
                row += [mask_id] * (n or next(free)) + text
            rows.append(row)
        rows = [row for row in rows if len(row) <= limit] or [min(rows, key=len)]
    longest = max(map(len, rows))
    fits(longest)
    check(longest > 0, "there is nothing to write: the prompt is empty and --max_new_tokens is 0")
    return rows


def right_padded(rows, pad_id, device):
    """Lists of ids → x (B, T) and lengths (B,), None if all rows are equally long."""
    T = max(map(len, rows))
    x = torch.tensor([row + [pad_id] * (T - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return x, (lengths if len(set(map(len, rows))) > 1 else None)


class Screen:
    """The first row's text, redrawn in place after each step."""

    def __init__(self):
        self.drawn, self.size = 0, shutil.get_terminal_size()

    def show(self, units):
        lines = traces.render(units, self.size.columns - 1)[-self.size.lines + 3 :]
        sys.stdout.write("\x1b[F" * self.drawn + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()
        self.drawn = len(lines)


# settings of sampling.denoise alone, by the names that their flags have
CHOOSING = ("strategy", "steps", "threshold", "entropy_bound", "confidence_stop", "block_length", "remask", "loop")


@dataclass
class Samples:
    texts: list  # ids of each sample, cut at EOS
    written: list  # tokens of each that were not given
    steps: list  # every Step of the batch
    seconds: list  # when each was done, since the start
    rows: list  # the row of the batch that each sample is, and how long it is


def decoding(loaded, x, lengths, cfg, blanks=False, observe=None):
    """The Steps that fill x (B, T) as cfg (a SampleConfig) says, and draw no token that is no text. blanks: nor EOS."""
    denoiser, tokenizer = loaded.denoiser, loaded.tokenizer
    never = [*tokenizer.never]
    if blanks:
        never.append(tokenizer.eos_id)  # it has no text: a blank would show fewer tokens than it was given
    drawing = {k: getattr(cfg, k) for k in ("temperature", "top_k", "top_p", "no_repeat")}
    drawing |= dict(min_new=cfg.min_new_tokens, eos_id=None if blanks else tokenizer.eos_id, forbid=never)
    drawing |= dict(lengths=lengths, generator=torch.Generator().manual_seed(cfg.seed), observe=observe)
    if hasattr(denoiser, "extend"):
        return sampling.write(denoiser, x, **drawing)
    return sampling.denoise(denoiser, x, **{k: getattr(cfg, k) for k in CHOOSING}, **drawing)


def generate(loaded, prompts, cfg, on_step=None):
    """Samples for each prompt, cfg.num_samples each, in one batch. on_step(step, length of row 0) sees each step.

    A prompt is a text, or a list of ids (chat.prompt), behind which cfg.max_new_tokens are written.

    A blank of free length is tried in every length, each a row; the row whose tokens were surest on average wins.
    """
    tokenizer, denoiser = loaded.tokenizer, loaded.denoiser
    blanks = any(isinstance(prompt, str) and BLANK.search(prompt) for prompt in prompts)
    causal = hasattr(denoiser, "extend")
    check(not (causal and blanks), "an autoregressive model cannot fill blanks; leave ___ out, or name a denoiser")
    check(not (cfg.block_length and blanks), "blanks need what stands behind them: leave --block_length out")
    check(not (denoiser.block_length and blanks), "blanks need what stands behind them: name a model without blocks")
    rows, groups = [], []  # groups: one a sample, the rows that compete for it
    for prompt in prompts:
        if isinstance(prompt, str):
            options = canvases(prompt, tokenizer, denoiser.mask_id, cfg.max_new_tokens, denoiser.config.max_seq_len)
        else:
            options = [prompt + [denoiser.mask_id] * cfg.max_new_tokens]
        for _ in range(cfg.num_samples):
            groups.append(range(len(rows), len(rows) + len(options)))
            rows += options
    x, lengths = right_padded(rows, tokenizer.pad_id, next(denoiser.parameters()).device)
    given, log_p, steps = x != denoiser.mask_id, torch.zeros(x.shape, device=x.device), []
    start, seconds = time.perf_counter(), []
    for step in decoding(loaded, x, lengths, cfg, blanks):
        log_p += torch.where(step.revealed, step.confidence.clamp(min=1e-9).log(), 0.0)
        steps.append(step)
        seconds.append(time.perf_counter() - start)
        if on_step:
            on_step(step, len(rows[0]))
    mean_log_p = log_p.sum(1) / (~given).sum(1).clamp(min=1)  # (B,)
    best = [max(group, key=lambda r: float(mean_log_p[r])) for group in groups]
    texts, written = [], []
    for r in best:
        ids, new = steps[-1].x[r, : len(rows[r])].tolist(), (~given[r]).tolist()
        last_given = max((i for i in range(len(ids)) if not new[i]), default=-1)
        end = next((i for i in range(last_given + 1, len(ids)) if ids[i] == tokenizer.eos_id), len(ids))
        texts.append(ids[:end])
        written.append(sum(new[:end]))
    return Samples(texts, written, steps, seconds, [(r, len(rows[r])) for r in best])


# ---------------------------------------------------------------------------------------------------------------------
# a talk


class Stopped(Exception):
    """Nobody wants the rest of this answer."""


def asked(loaded, turns, cfg):
    """Turns that end with the user's → (ids that the answer stands behind, cfg for as many new tokens as then fit).

    The oldest exchanges are left out until cfg.max_new_tokens, or half of the window, are free for the answer. Raises
    ValueError if the last question alone is too long.
    """
    limit = loaded.denoiser.config.max_seq_len
    most = limit - min(cfg.max_new_tokens, limit // 2)
    kept = chat.latest(turns, lambda t: len(chat.prompt(t, loaded.tokenizer)) <= most)
    ids = chat.prompt(kept or turns[-1:], loaded.tokenizer)
    check(kept, f"the question takes {len(ids)} tokens, of the window's {limit} there are {most} for it; shorten it")
    return ids, dataclasses.replace(cfg, max_new_tokens=min(cfg.max_new_tokens, limit - len(ids)))


def ask(loaded, turns, cfg, on_step=None):
    """The text that answers turns which end with the user's, see `asked`. on_step(step, n_prompt) sees each step."""
    ids, cfg = asked(loaded, turns, cfg)
    samples = generate(loaded, [ids], cfg, on_step and (lambda step, length: on_step(step, len(ids))))
    return chat.answer(samples.texts[0][len(ids) :], loaded.tokenizer)


def talk(loaded, cfg):
    """Questions, from --prompt or line by line from standard input, and their answers, as they appear."""
    check(cfg.max_new_tokens, "--max_new_tokens is 0, an answer needs 1 or more")
    check(cfg.num_samples == 1 and not cfg.html and not cfg.json, "--num_samples, --html and --json are not for --chat")
    tokenizer, terminal = loaded.tokenizer, sys.stdin.isatty() and sys.stdout.isatty() and not cfg.prompt
    turns, waiting, leave = [], [cfg.prompt] if cfg.prompt else [], False
    while waiting or not cfg.prompt:
        try:
            line = waiting.pop(0) if waiting else input("> ") if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            if leave or not terminal:
                raise
            leave = True
            print("\n(Ctrl-C again leaves)")
            continue
        if line.strip() in ("", "/stop"):
            continue
        turns.append(dict(role="user", content=line))
        screen = Screen() if cfg.live and sys.stdout.isatty() else None
        trace, so_far, leave = traces.Trace(tokenizer, loaded.denoiser.mask_id), [], False

        def show(step, n, screen=screen, trace=trace, so_far=so_far):
            so_far[:] = step.x[0, n:].tolist()
            if screen:
                here = {k: getattr(step, k)[:, n:] for k in ("x", "revealed", "confidence")}
                trace.add(dataclasses.replace(step, **here))
                screen.show(trace.units)
            while terminal and select.select([sys.stdin], [], [], 0)[0]:
                typed = sys.stdin.readline()
                if screen:
                    screen.drawn += 1  # its echo took a line
                if typed.strip() in ("", "/stop"):  # an empty line too, and the end of the input
                    raise Stopped
                waiting.append(typed)

        note = ""
        try:
            text = ask(loaded, turns, cfg, show)
        except (Stopped, KeyboardInterrupt) as e:
            if not terminal:
                raise
            text, leave = chat.answer(so_far, tokenizer), isinstance(e, KeyboardInterrupt)
            note = " (stopped; Ctrl-C again leaves)" if leave else " (stopped)"
        except ValueError as e:
            if not terminal:
                raise
            turns.pop()
            print(e)
            continue
        if screen:
            screen.show([])  # the text follows, without what stands behind its end
        print(text + note, flush=True)
        turns.append(dict(role="assistant", content=text))


def main():
    (cfg,) = parse(__doc__, SampleConfig)
    loaded = checkpoint.load(cfg.ckpt or checkpoint.newest_run(chat=cfg.chat), pick_device(cfg.device), cfg.ema)
    tokenizer, mask_id = loaded.tokenizer, loaded.denoiser.mask_id
    if cfg.tokenizer:
        given = checkpoint.sha256(cfg.tokenizer)
        check(
            given == tokenizer.sha256,
            f"{cfg.tokenizer} (sha256 {given[:12]}) is not the tokenizer of {loaded.path} "
            f"({tokenizer.sha256[:12]}); leave --tokenizer out",
        )
    if cfg.chat:
        return talk(loaded, cfg)
    prompts = [p.strip() for p in cfg.prompt.split("||")]
    blanks = any(BLANK.search(p) for p in prompts)

    # a blank of free length is many canvases until the best is known, so only the others appear live
    screen = Screen() if cfg.live and sys.stdout.isatty() and not blanks else None
    causal = hasattr(loaded.denoiser, "extend")
    choosing = {} if causal else dict(strategy=cfg.strategy, steps=cfg.steps)
    meta = dict(model=str(loaded.path), **choosing, temperature=cfg.temperature, seed=cfg.seed)
    trace = traces.Trace(tokenizer, mask_id, prompts[0], meta)

    def show(step, length):
        trace.add(step, length=length)
        screen.show(trace.units)

    samples = generate(loaded, prompts, cfg, show if screen else None)
    if screen:
        screen.show([])  # the text follows, cut where it ends
    else:
        row, length = samples.rows[0]
        for step, seconds in zip(samples.steps, samples.seconds, strict=True):
            trace.add(step, row, seconds, length)
    print("\n\n".join(tokenizer.decode(ids) for ids in samples.texts))
    written, forwards, seconds = sum(samples.written), samples.steps[-1].forwards, samples.seconds[-1]
    print(
        f"\n{written} tokens in {forwards} forwards{'' if causal else f' of {cfg.steps} steps asked'}, "
        f"{written / max(1, forwards):.1f} tokens a forward, {written / seconds:,.0f} tokens/s "
        f"({seconds:.2f} s; {loaded.path}, step {loaded.step:,})"
    )
    save_gif = lambda path: gif.save(trace.to_dict(), path)  # noqa: E731
    for path, write in ((cfg.html, trace.save_html), (cfg.json, trace.save), (cfg.gif, save_gif)):
        if path:
            write(path)
            print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)

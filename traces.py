"""A trace: the record of one denoising run, played by player.html, shown live in a terminal, stored as one JSON.

    trace = Trace(tokenizer, denoiser.mask_id, prompt="एक दिन", meta={"strategy": "confidence"})
    for step in sampling.denoise(denoiser, x, ...):
        trace.add(step)
        print("\\n".join(render(trace.units, width=80)))
    trace.save("sample.json"); trace.save_html("sample.html")

    {"format": 1, "prompt": str, "meta": {...}, "length": T, "text": str, "pieces": {id: text}, "steps": [
        {"tokens": [id] * T, "revealed": [position], "remasked": [position], "confidence": [float] * T,
         "forwards": int, "seconds": float, "units": [[text, state, confidence or null, [position]]],
         "top": {position: [entropy in nats, [[id, probability], ...]]}}]}

steps[0] is the canvas before the first forward. `top` and `pieces` stand there where someone watched (see Watch): what
the model thought of a position when it looked at it for the step. A unit is what a reader sees as one thing: a grapheme
cluster, an open position, or a special token (no text). Its state is one of STATES; the open ones, OPEN, are as many as
there are MASKs.
"""

import itertools
import json
import math
import os
import time
import unicodedata
from pathlib import Path

import regex  # \X keeps क्ष and स्त्री whole (Unicode's rule GB9c); `re` has no \X. tiktoken brings it along

STATES = ("prompt", "open", "new", "kept", "remasked")
OPEN = ("open", "remasked")  # remasked: open, and was not so one step before
EVERY = 128  # tokens up to which a trace keeps what was thought of all open positions, not of the decided ones alone
BLOCK = "░"  # stands for an open position wherever there is only plain text
PLAYER = Path(__file__).with_name("player.html")
SLOT = '<script type="application/json" id="trace">null</script>'

CLUSTER = regex.compile(r"\X")
MARK = regex.compile(r"[\p{M}\u200c\u200d]")  # drawn on a base before it; without one it gets a dotted circle
BIDI = regex.compile(r"\p{Bidi_Control}")

# ---------------------------------------------------------------------------------------------------------------------
# tokens → units


def characters(data):
    """Bytes → [(character, first byte, end, its fault or "")]; joined it is data.decode(errors="replace")."""
    out, at = [], 0
    while at < len(data):
        try:
            good, bad, why = data[at:].decode(), None, ""
        except UnicodeDecodeError as e:
            good, bad, why = data[at : at + e.start].decode(), at + e.end, e.reason
        for c in good:
            out.append((c, at, at := at + len(c.encode()), ""))
        if bad is not None:
            fault = "no start" if 0x80 <= data[at] < 0xC0 else "no end" if why == "unexpected end of data" else "wrong"
            out.append(("\ufffd", at, at := bad, fault))
    return out


def clusters(tokens, tokenizer, mask_id, age):
    """A row of T ids → [(text, positions, latest)] in reading order. latest is the position that was decided last, by
    age[position]; None is an open position.

    The row is decoded as a whole and then split, because a conjunct or a character may lie over several tokens. What
    can't be drawn before an open neighbour is decided (a piece of a character, a mark without its base) is counted into
    that neighbour's unit. So open units are exactly the MASKs, and every position is in at least one unit.
    """
    units, carry = [], []  # carry: positions for the open unit that comes next
    runs = [(key, list(run)) for key, run in itertools.groupby(range(len(tokens)), lambda i: tokens[i] == mask_id)]
    for n, (is_open, run) in enumerate(runs):
        if is_open:
            units += [("", [i], None) for i in run]
            units[-len(run)][1][:0] = carry
            continue
        pieces = [tokenizer.token_bytes(tokens[i]) for i in run]
        position = [i for i, piece in zip(run, pieces, strict=True) for _ in piece]  # of every byte
        chars = characters(b"".join(pieces))
        lo, hi = 0, len(chars)
        if n > 0:  # after an open position: the rest of a character, or marks, whose beginning is not there yet
            while lo < hi and (chars[lo][3] == "no start" or MARK.match(chars[lo][0])):
                lo += 1
        if n < len(runs) - 1 and lo < hi and chars[hi - 1][3] == "no end":
            hi -= 1
        seen = run[0] - 1  # the last position that is in a unit
        if lo:
            units[-1][1].extend(range(run[0], (seen := position[chars[lo - 1][2] - 1]) + 1))
        text = "".join(c for c, *_ in chars[lo:hi])
        for match in CLUSTER.finditer(text):
            first, last = chars[lo + match.start()][1], chars[lo + match.end() - 1][2] - 1
            where = list(range(position[first], position[last] + 1))
            units += [("", [i], i) for i in range(seen + 1, where[0])]  # special tokens
            units.append((match.group(), where, max(where, key=lambda i: (age[i], i))))
            seen = where[-1]
        carry = []
        if hi < len(chars):
            carry = list(range(position[chars[hi][1]], run[-1] + 1))  # special tokens behind it too: no gap
            units += [("", [i], i) for i in range(seen + 1, carry[0])]
            seen = carry[-1]
        units += [("", [i], i) for i in range(seen + 1, run[-1] + 1)]
    return units


# ---------------------------------------------------------------------------------------------------------------------
# steps → a trace


class Watch:
    """An `observe` for the samplers: the k likeliest tokens and the entropy at each open position, as of the last step.

    watch = Watch(); for step in sampling.denoise(..., observe=watch): trace.add(step, top=watch.of(0))
    """

    def __init__(self, k=5):
        self.k, self.last = k, None

    def __call__(self, probs, row, position):
        """probs (N, V), row (N,), position (N,)"""
        entropy = -(probs * probs.clamp(min=1e-30).log()).sum(1)  # (N,) nats
        self.last = (row, position, entropy, *probs.topk(min(self.k, probs.shape[1]), dim=1))

    def of(self, row):
        """{position: [entropy, [[id, probability], ...]]} of a row, the likeliest first."""
        if self.last is None:
            return {}
        columns = (part[self.last[0] == row].tolist() for part in self.last[1:])
        return {at: [round(h, 3), [[i, round(p, 4)] for i, p in zip(ids, ps, strict=True) if p > 0]]
                for at, h, ps, ids in zip(*columns, strict=True)}  # fmt: skip


class Trace:
    """Collects the steps of one row. `canvas` is the row before the first step; where it is not given, it is the first
    step with the positions put back that this step revealed. `earlier` is the trace that `canvas` reopened some
    positions of: what the model wrote there and what still stands is no prompt now."""

    def __init__(self, tokenizer, mask_id, prompt="", meta=None, canvas=None, earlier=None):
        self.tokenizer, self.mask_id = tokenizer, mask_id
        self.prompt = prompt.encode(errors="replace").decode()  # a command line can carry lone surrogates
        self.meta = dict(meta or {})
        self.steps, self.pieces = [], {}
        self.start = time.perf_counter()
        if canvas is not None:
            self._append(listed(canvas), None, 0, 0.0, earlier=earlier)

    def add(self, step, row=0, seconds=None, length=None, top=None):
        """seconds since the start, now by default; length: where the row is right-padded, its own; top: Watch.of."""
        tokens, confidence = listed(step.x[row])[:length], listed(step.confidence[row])[:length]
        seconds = round(time.perf_counter() - self.start if seconds is None else seconds, 4)
        if not self.steps and step.forwards > 0:
            revealed = listed(step.revealed[row])[:length]
            canvas = [self.mask_id if r else t for t, r in zip(tokens, revealed, strict=True)]
            self._append(canvas, None, 0, 0.0)
        if self.steps and tokens == self.steps[-1]["tokens"] and (step.forwards == 0 or self.mask_id not in tokens):
            return  # the canvas a second time, or a row that was complete while others of its batch go on
        self._append(tokens, confidence, int(step.forwards), seconds, top)

    def _append(self, tokens, confidence, forwards, seconds, top=None, earlier=None):
        k, mask = len(self.steps), self.mask_id
        confidence = [round(c, 4) if math.isfinite(c) else 0.0 for c in confidence or [0.0] * len(tokens)]
        if k == 0:
            self.given = {i for i, t in enumerate(tokens) if t != mask}
            self.age, self.sure = [0] * len(tokens), [None] * len(tokens)
            if earlier:
                stands = self.given - earlier.given
                self.given &= earlier.given
                for i in stands:
                    self.sure[i] = earlier.sure[i]
                then = {i: earlier.steps[earlier.age[i]].get("top", {}).get(str(i)) for i in stands}
                top = {i: seen for i, seen in then.items() if seen}
        before = self.steps[-1]["tokens"] if k else tokens
        assert len(tokens) == len(before), f"step {k} has {len(tokens)} positions, the canvas has {len(before)}"
        revealed = [i for i, t in enumerate(tokens) if t != mask and t != before[i]]  # a redrawn token is new too
        remasked = [i for i, t in enumerate(tokens) if t == mask and t != before[i]]
        for i in revealed:  # later steps may report another confidence; what counts is the one it was decided with
            self.age[i], self.sure[i] = k, confidence[i]
        self.given.difference_update(revealed, remasked)

        def unit(text, where, latest):
            if latest is None:
                here = next(i for i in where if tokens[i] == mask)  # the others are what could not be drawn
                return [text, "remasked" if here in remasked else "open", None, where]
            state = "prompt" if latest in self.given else "new" if k and self.age[latest] == k else "kept"
            return [text, state, self.sure[latest], where]

        known = {u[3][0]: u for u in self.units}  # what has not changed is the same object: T steps of T units are many
        units = [known[u[3][0]] if u == known.get(u[3][0]) else u
                 for u in (unit(*u) for u in clusters(tokens, self.tokenizer, mask, self.age))]  # fmt: skip
        self.steps.append({"tokens": tokens, "revealed": revealed, "remasked": remasked, "confidence": confidence,
                           "forwards": forwards, "seconds": seconds, "units": units})  # fmt: skip
        if top:
            wanted = set(revealed) if k and len(tokens) > EVERY else top
            self.steps[-1]["top"] = {str(i): top[i] for i in top if i in wanted}
            for i in {i for _, likeliest in self.steps[-1]["top"].values() for i, _ in likeliest}:
                self.pieces[str(i)] = self.tokenizer.token_bytes(i).decode(errors="replace")

    @property
    def units(self):
        """Of the newest step, for `render`."""
        return self.steps[-1]["units"] if self.steps else []

    def to_dict(self):
        length = len(self.steps[0]["tokens"]) if self.steps else 0
        return {"format": 1, "prompt": self.prompt, "meta": self.meta, "length": length, "text": plain(self.units),
                **({"pieces": self.pieces} if self.pieces else {}), "steps": self.steps}  # fmt: skip

    def save(self, path):
        write(path, json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")

    def save_html(self, path):
        write(path, html(self.to_dict()))


def listed(row):
    return row.tolist() if hasattr(row, "tolist") else list(row)


def write(path, text):
    """The whole file or nothing: to a sibling name, then renamed. Pipes and devices (/dev/stdout) are written to."""
    path = Path(os.path.realpath(path)) if os.path.isfile(path) else Path(path)  # a link stays a link
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")  # a folder is refused here
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# a trace → a page; units → a terminal


def html(trace):
    """A self-contained page. The JSON in it is ASCII without < > &: no text can end the script element or act in it."""
    data = json.dumps(trace, separators=(",", ":"), allow_nan=False)
    for c in "<>&":
        data = data.replace(c, f"\\u{ord(c):04x}")
    page = PLAYER.read_text(encoding="utf-8")
    assert page.count(SLOT) == 1, f"{PLAYER} needs the line {SLOT} once, has it {page.count(SLOT)} times"
    return page.replace(SLOT, SLOT.replace("null", data))


def plain(units):
    return "".join(BLOCK if state in OPEN else text for text, state, *_ in units)


def visible(c):
    """Nothing in a text may steer the terminal: control characters become pictures of themselves."""
    if c == "\t":
        return " "
    if c < " " or c == "\x7f":
        return chr(0x2400 + ord(c)) if c < " " else "\u2421"
    return "\u2426" if BIDI.match(c) or "\x80" <= c <= "\x9f" else c


def columns(text):
    """How wide a terminal draws it, about: marks that sit on their base take nothing, East Asian wide ones two."""
    free = ("Mn", "Me", "Cf")
    return sum(0 if unicodedata.category(c) in free else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)  # fmt: skip


STYLE = {"prompt": "\x1b[1m", "open": "\x1b[2m", "remasked": "\x1b[2;48;5;53m", "new": "\x1b[48;5;24m", "kept": ""}


def render(units, width=80, color=True):
    """Units → lines of at most `width` columns, broken at spaces where there are any."""
    lines, line = [], []  # line: [(text, columns, state)]
    for text, state, *_ in units:
        if text in ("\n", "\r\n", "\u2028", "\u2029"):
            lines.append(line)
            line = []
            continue
        text = BLOCK if state in OPEN else "".join(map(visible, text))
        size = columns(text)
        while line and size + sum(n for _, n, _ in line) > width:
            cut = len(line)
            if text != " ":  # a word goes to the next line whole, if it does not fill this one
                cut = max((i + 1 for i, (t, *_) in enumerate(line) if t == " "), default=cut)
            lines.append(line[:cut])
            line = line[cut:]
            if text == " ":
                break
        else:
            line.append((text, size, state))
    out = []
    for cells in [*lines, line]:
        # one escape a run of equal state, never inside a cluster: a terminal that shapes can still shape
        runs = [(state, "".join(t for t, *_ in run)) for state, run in itertools.groupby(cells, lambda cell: cell[2])]
        out.append("".join(f"{STYLE[s]}{t}\x1b[0m" if color and STYLE[s] and t else t for s, t in runs))
    return out

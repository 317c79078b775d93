"""What stands behind the pages of app.py: models, requests and their limits, text that appears, charts, handlers.

    do = handlers(models={"mine": "checkpoints/mine"}, cfg=AppConfig())     # do.generate(...), do.run_race(...), ...

A handler gets what a visitor sent, checks it, and returns what the components of the page show next; one that takes
time yields it. Every failure of a request becomes one line on the page.
"""

import csv
import dataclasses
import functools
import hashlib
import html
import inspect
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import chat
import checkpoint
import compare
import gif
import inside
import race
import report
import sample_diffusion
import traces
from config import SampleConfig, check, one_line
from machine import pick_device
from sample_diffusion import BLANK, canvases, decoding, right_padded
from sampling import STRATEGIES

HERE = Path(__file__).resolve().parent
TEXTS = json.loads((HERE / "app_texts.json").read_text(encoding="utf-8"))
LETTERS, STEPS, REPEATS, TURNS = 8000, 1024, 20, 100  # most of each that a request may ask for
ROOM = 16  # windows of the model that the canvases of a text with blanks may fill together
FOLDERS = 50  # of sessions whose files are kept
ARRIVED = "x-nanohindi-arrived"  # header with the time.monotonic() of a request, set by the server alone
PACE = 0.06  # seconds between two pictures of a text that appears
CLEAR, GRID = "rgba(0,0,0,0)", "rgba(128,128,128,.25)"

# ---------------------------------------------------------------------------------------------------------------------
# models and requests


def labelled(paths):
    """{label: path as text}: the label is the shortest end of the path that no other shares."""
    paths = list(paths)
    ends = [[str(Path(*Path(p).parts[-k:])) for k in range(1, len(Path(p).parts) + 1)] for p in paths]
    alone = lambda end: sum(end in others for others in ends) == 1  # noqa: E731
    return {next(filter(alone, own), str(p)): str(p) for own, p in zip(ends, paths, strict=True)}


def find_models(cfg):
    """{label: what checkpoint.load takes} of the models to offer."""
    if cfg.ckpt:
        names = list(dict.fromkeys(name.strip() for name in cfg.ckpt.split(",") if name.strip()))
        return {n: n for n in names if n.startswith("hub:")} | labelled([n for n in names if not n.startswith("hub:")])
    boxes = {Path("models").resolve(), HERE / "models"}  # what came with the code, and what was exported here
    boxed = sorted({p.parent for box in boxes for p in box.glob("*/model.safetensors")})
    found = (p for root in ("checkpoints", "models") for n in ("*/*.pt", "*/*/*.pt") for p in Path(root).glob(n))
    runs = {p.parent for p in found if p.name in ("best.pt", "latest.pt")}
    return labelled([*boxed, *sorted(runs, key=lambda run: -run.stat().st_mtime)])


def file_of(path):
    """The file that a folder's model comes from, or None."""
    files = [Path(path), *(Path(path) / n for n in ("best.pt", "latest.pt", "model.safetensors"))]
    return next((f for f in files if f.is_file()), None)


def about(path, device):
    """Of a model, by its config.json, the hub's are loaded: does it write from left to right, does it judge, was it
    tuned to answer; and the tokens of its window."""
    if path.startswith("hub:"):
        loaded = read_model(path, device, None)
        told = dict(kind=loaded.kind, seq_len=loaded.denoiser.config.max_seq_len)
    else:
        try:
            folder = Path(path) if Path(path).is_dir() else Path(path).parent
            told = json.loads((folder / "config.json").read_text("utf-8"))
            told = told.get("run", {}) | told.get("model_config", {}) | told  # the first two: of an export
        except (OSError, ValueError, AttributeError, TypeError):
            told = {}
    window = told.get("max_seq_len") or told.get("seq_len") or STEPS
    window = window if isinstance(window, int) else STEPS
    kind = told.get("kind")
    return dict(
        causal=kind in ("autoregressive", "hub_causal", "hub_seq2seq"),
        judges=kind in ("autoregressive", "hub_causal"),
        window=min(STEPS, window),
        chats=bool(told.get("chats")),
    )


@functools.lru_cache(maxsize=4)  # a few stay in memory; a file that has changed is read again
def read_model(path, device, changed):
    return checkpoint.load(path, pick_device(device))


def clean(text, words):
    """Any string as text that UTF-8 can hold, within the server's limit."""
    check(isinstance(text, str), f"the text is a {type(text).__name__}")
    check(len(text) <= LETTERS, words["long_text"].format(len(text), LETTERS))
    return text.encode(errors="replace").decode()


def shown(text):
    return "".join(map(traces.visible, text)).strip() or "␣"


def table(title, header, lines, note="", words=False):
    return report.to_html(report.Table(html.escape(title), note, header, lines, words))


def packed(*messages):
    """For app.js: a JSON without anything that could be markup."""
    return json.dumps(messages, allow_nan=False).replace("<", "\\u003c")


def guarded(handler):
    """Any failure of a request, out of memory too, becomes one line on the page; the app lives on."""

    def told(e):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return gr.Error(html.escape(one_line(e)[:400], quote=False), title="⚠", print_exception=False)

    @functools.wraps(handler)
    def plain(*args, **kwargs):
        try:
            return handler(*args, **kwargs)
        except Exception as e:
            raise told(e) from None

    @functools.wraps(handler)
    def stream(*args, **kwargs):
        try:
            yield from handler(*args, **kwargs)
        except Exception as e:
            raise told(e) from None

    return stream if inspect.isgeneratorfunction(handler) else plain


# ---------------------------------------------------------------------------------------------------------------------
# text that appears


def settings(length, steps, strategy, temperature, top_p, block, remask, seed):
    """What a page sends → a SampleConfig. Raises ValueError for what is empty, no number or out of range."""
    empty = [name for name, value in locals().items() if value is None]
    check(not empty, f"no number: {', '.join(empty)}")
    try:
        whole = dict(max_new_tokens=int(length), steps=int(steps), block_length=int(block), seed=int(seed))
        part = dict(temperature=float(temperature), top_p=float(top_p), remask=float(remask))
    except (TypeError, OverflowError) as e:
        raise ValueError(f"a setting is no number: {e}") from None
    check(whole["steps"] <= STEPS, f"{whole['steps']} steps are more than the app's {STEPS}")
    check(strategy in STRATEGIES, "there is no such order")
    check(abs(whole["seed"]) < 2**63, "the seed has more than 63 bits")
    return SampleConfig(strategy=strategy, **whole, **part)


def appear(loaded, rows, cfg, blanks=False, prompt="", halt=lambda: False, earlier=None):
    """Fill canvases (lists of ids), which compete: yields the Trace of the surest one so far, after each step.
    earlier: see traces.Trace."""
    tokenizer, mask_id = loaded.tokenizer, loaded.denoiser.mask_id
    x, lengths = right_padded(rows, tokenizer.pad_id, next(loaded.denoiser.parameters()).device)
    choosing = {} if hasattr(loaded.denoiser, "extend") else dict(steps=cfg.steps, strategy=cfg.strategy)
    name = loaded.path.parent.name if loaded.path.suffix else str(loaded.path)
    meta = dict(model=name, **choosing, temperature=cfg.temperature, seed=cfg.seed)
    watch, all_traces = traces.Watch(), [traces.Trace(tokenizer, mask_id, prompt, meta, row, earlier) for row in rows]
    open_at_first, log_p = (x == mask_id).sum(1).clamp(min=1), torch.zeros(len(x))
    steps, clock = decoding(loaded, x, lengths, cfg, blanks, watch), 0.0
    while not halt():
        start = time.perf_counter()
        step = next(steps, None)
        clock += time.perf_counter() - start
        if step is None:
            return
        log_p += torch.where(step.revealed, step.confidence.clamp(min=1e-9).log(), 0.0).sum(1).cpu()
        for r, trace in enumerate(all_traces):
            trace.add(step, r, clock, len(rows[r]), watch.of(r))
        yield all_traces[int((log_p / open_at_first.cpu()).argmax())]


def live(trace, run):
    """The newest step alone: a picture that stays small however long the run, for app.js."""
    last = trace.steps[-1]
    ids = {str(i) for _, likeliest in last.get("top", {}).values() for i, _ in likeliest}
    now = trace.to_dict() | dict(steps=[last], run=run, pieces={i: trace.pieces[i] for i in ids})
    return dict(trace=now, live=True)


def whole(trace, **more):
    return dict(trace=trace.to_dict(), **more)


# ---------------------------------------------------------------------------------------------------------------------
# charts


def figure(chart):
    """A chart of report.py as a figure that is readable on light and dark pages. None stays None."""
    if chart is None:
        return None
    return go.Figure(chart).update_layout(font=dict(color="#8a8a8a"), template="none")


def bars(title, names, values, unit, errors=None):
    names = [html.escape(name) for name in names]
    found = go.Figure(
        go.Bar(x=values, y=names, orientation="h", marker=dict(color=report.COLORS[: len(names)]), error_x=errors)
    )
    return found.update_layout(
        title=title, xaxis=dict(title=unit, rangemode="tozero", gridcolor=GRID), height=130 + 45 * len(names),
        template="none", font=dict(color="#8a8a8a"), paper_bgcolor=CLEAR, plot_bgcolor=CLEAR,
        margin=dict(l=10, r=20, t=50, b=45), yaxis=dict(automargin=True, autorange="reversed"),
    )  # fmt: skip


def question_bars(folders, words):
    """Accuracy with its 95 % interval out of each eval.json that has one, as bars: an update of a plot."""
    found = []
    for name, folder in folders.items():
        try:
            qa = json.loads((Path(folder) / "eval.json").read_text("utf-8"))["qa"]["accuracy"]
            found.append((name, *(float(qa[k]) for k in ("mean", "low", "high")), int(qa["n"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not found:
        return gr.update(visible=False)
    names, mean, low, high, n = zip(*found, strict=True)
    errors = dict(type="data", symmetric=False, array=[h - m for h, m in zip(high, mean, strict=True)],
                  arrayminus=[m - l for m, l in zip(mean, low, strict=True)])  # fmt: skip
    drawn = bars(words["questions"], [f"{a} (n = {k})" for a, k in zip(names, n, strict=True)], mean, "", errors)
    return gr.update(value=drawn, visible=True)


def heat(found, tokens):
    """A panel a layer and part: rows look at columns, mean over heads."""
    found = [f for f in found if f[1] != "think"][:16]
    columns = min(3, len(found))
    names = [f"{layer + 1}: {part}" for layer, part, _ in found]
    panels = make_subplots(-(-len(found) // columns), columns, subplot_titles=names)
    labels = [f"{i + 1} {html.escape(shown(t))}" for i, t in enumerate(tokens)]
    for i, (_, part, weights) in enumerate(found):
        z = weights.mean(0)  # (queries, keys)
        keys = labels if part == "attention" and z.shape[1] == len(labels) else None
        if part == "write":
            z, keys = z[:, 1:], labels  # without the key that stands for nothing
        rows = labels if z.shape[0] == len(labels) and part != "write" else None
        panel = go.Heatmap(z=z.cpu().numpy(), x=keys, y=rows, colorscale="Cividis", showscale=False)
        panels.add_trace(panel, row=i // columns + 1, col=i % columns + 1)
    panels.update_yaxes(autorange="reversed", showticklabels=len(tokens) <= 16)
    panels.update_xaxes(showticklabels=len(tokens) <= 16)
    height = 60 + 300 * -(-len(found) // columns)
    return panels.update_layout(
        height=height,
        margin=dict(l=70, r=10, t=50, b=70),
        template="none",
        paper_bgcolor=CLEAR,
        font=dict(color="#8a8a8a"),
    )


def spoken(chart, words):
    """A chart of compare.py in the page's language. None stays None."""
    say = words["results"]
    for part in (chart["layout"][k] for k in ("title", "xaxis", "yaxis")) if chart else ():
        title = part if "text" in part else part["title"]
        title["text"] = say.get(title["text"], title["text"])
    return chart


def spoken_table(table, words):
    say = words["results"]
    return report.Table(say.get(table.title, table.title), say.get(table.note, table.note),
                        [say.get(h, h) for h in table.header], table.lines, table.words)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# handlers


class Recent(dict):
    """The last thousand things that were put; sessions that were left are forgotten."""

    def put(self, key, value):
        self.pop(key, None)
        self[key] = value
        while len(self) > 1000:
            self.pop(next(iter(self)), None)


def handlers(models, cfg):
    """What the page's events call, for models {name: path}: a namespace of functions."""
    halted = Recent()  # session -> when it last asked to stop
    tongues = Recent()  # session -> its language
    saved = tempfile.TemporaryDirectory(prefix="nanohindi_")  # goes with the process

    def folders():
        """{label: path} of the run folders at hand, those that began after the app too."""
        found = [p.parent for d in ("*", "*/*") for p in Path("checkpoints").glob(f"{d}/config.json")]
        mine = [Path(p) for p in models.values() if (Path(p) / "config.json").is_file()]
        return labelled(dict.fromkeys(p.resolve() for p in (*mine, *sorted(found))))

    def runs_at_hand():
        return {name: path for name, path in folders().items() if (Path(path) / "metrics.jsonl").is_file()}

    def causal(name):
        return facts[name]["causal"]

    def judges(name):
        return facts[name]["judges"]

    def get(name, words=TEXTS["en"]):
        check(models, words["nothing"])
        check(name in models, words["no_model"])
        path = models[name]
        file = file_of(path)
        return read_model(path, cfg.device, file and file.stat().st_mtime_ns)

    def loads(name):
        """Whether a model is whole."""
        try:
            return bool(get(name))
        except Exception as e:
            print(f"warning: {name} cannot be used: {one_line(e)}", file=sys.stderr)
            return False

    facts = {name: about(path, cfg.device) for name, path in models.items()}

    def window(*names):
        """Tokens that all of these models have room for."""
        return min((facts[name]["window"] for name in names if name in facts), default=STEPS)

    @guarded
    def fit(*asked):
        """Models' names, length, steps → sliders that end where the smallest of their windows does."""
        *names, length, steps = asked
        most = window(*names)
        return [gr.update(maximum=most, value=min(int(n), most)) for n in (length, steps)]

    def tasks(name):
        """A model that was tuned to answer is asked, the others write on."""
        return "chat" if name in facts and facts[name]["chats"] else "continue"

    def suited(mode, name):
        """A question goes to a model that was tuned to answer, a denoiser first; other tasks stay where they are."""
        tuned = sorted((n for n in facts if facts[n]["chats"]), key=lambda n: facts[n]["causal"])
        return name if mode != "chat" or name in tuned or not tuned else tuned[0]

    def orders(mode):
        """The order that is usual for a task, as of sample_diffusion.py; and whether there is a talk to forget."""
        return SampleConfig(chat=mode == "chat").strategy, gr.update(visible=mode == "chat")

    def begin(request):
        """Whether this request is to stop, a function: a stop was asked for since it came in, or its time is over."""
        came, end = float(request.headers.get(ARRIVED, time.monotonic())), time.monotonic() + cfg.time_limit
        warn = functools.cache(lambda: gr.Warning(words_of(request)["late"], title="⚠"))  # once

        def stopping():
            if time.monotonic() > end:
                warn()
            return halted.get(request.session_hash, 0) > came or time.monotonic() > end

        return stopping

    def halt(request: gr.Request):
        halted.put(request.session_hash, time.monotonic())

    def speaks(lang, request: gr.Request):
        tongues.put(request.session_hash, lang if lang in TEXTS else "en")

    def words_of(request):
        return TEXTS[tongues.get(request.session_hash, "en")]

    def folder_of(request):
        """Where the files of a session are made; gradio takes a copy. The last ones are kept, until the app ends."""
        made = sorted(Path(saved.name).iterdir(), key=lambda f: f.stat().st_mtime)
        for old in made[:-FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
        folder = Path(saved.name) / hashlib.sha256(request.session_hash.encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        os.utime(folder)
        return folder

    # --- generate

    def run(loaded, rows, how, blanks, prompt, halt, earlier=None):
        """Yields messages for the stage, and at last (message, the trace, ids)."""
        shown_at, trace, run = 0.0, None, time.time_ns() % 2**40
        for trace in appear(loaded, rows, how, blanks, prompt, halt, earlier):
            if time.perf_counter() - shown_at > PACE:
                yield packed(live(trace, run)), None
                shown_at = time.perf_counter()
        if trace is None:  # stopped before the first step
            trace = traces.Trace(loaded.tokenizer, loaded.denoiser.mask_id, prompt, canvas=rows[0], earlier=earlier)
        yield packed(whole(trace, edit=True)), trace

    @guarded
    def generate(model, mode, prompt, length, steps, strategy, temperature, top_p, block, remask, seed, kept,
                 request: gr.Request):  # fmt: skip
        halt, how = begin(request), settings(length, steps, strategy, temperature, top_p, block, remask, seed)
        words = words_of(request)
        loaded, prompt, turns, asked = get(model, words), clean(prompt, words).strip(), [], []
        tokenizer, mask_id, limit = loaded.tokenizer, loaded.denoiser.mask_id, loaded.denoiser.config.max_seq_len
        if mode == "chat":
            turns = [*(kept or {}).get("turns", [])[-TURNS:], dict(role="user", content=prompt)]
            asked, how = sample_diffusion.asked(loaded, turns, how)
            rows, blanks = [asked + [mask_id] * how.max_new_tokens], False
        else:
            blanks = mode == "fill" or bool(BLANK.search(prompt))
            check(not blanks or BLANK.search(prompt), words["no_blank"])
            check(not blanks or not hasattr(loaded.denoiser, "extend"), words["only_on"])
            rows = canvases(prompt, tokenizer, mask_id, how.max_new_tokens, limit)
            check(sum(map(len, rows)) <= ROOM * limit, words["many_blanks"])
        for message, trace in run(loaded, rows, how, blanks, prompt, halt):
            if trace and turns:
                answer = chat.answer([i for i in trace.steps[-1]["tokens"][len(asked) :] if i != mask_id], tokenizer)
                turns = [*turns, dict(role="assistant", content=answer)]
            yield (
                message,
                trace and dict(model=model, how=how, blanks=blanks, trace=trace, turns=turns, asked=len(asked)),
            )

    @guarded
    def again(kept, request: gr.Request, event: gr.EventData):
        """Write anew what was marked: the reopened words alone or, where words are pinned, all that were not given."""
        words = words_of(request)
        check(kept, words["nothing_yet"])
        halt, loaded, earlier = begin(request), get(kept["model"], words), kept["trace"]
        tokens, mask_id = earlier.steps[-1]["tokens"], loaded.denoiser.mask_id
        opened, pinned = ({int(i) for i in event._data.get(k, [])} for k in ("open", "pin"))
        check(not hasattr(loaded.denoiser, "extend"), words["only_on"])
        check(all(0 <= i < len(tokens) for i in opened | pinned), "a place that was marked is not in the text")
        if pinned:
            opened |= set(range(len(tokens))) - earlier.given - pinned
        row = [mask_id if i in opened else t for i, t in enumerate(tokens)]
        check(mask_id in row, words["unmarked"])
        how = settings(0, kept["how"].steps, kept["how"].strategy, kept["how"].temperature, kept["how"].top_p, 0,
                       kept["how"].remask, kept["how"].seed + 1)  # fmt: skip
        turns = kept["turns"]
        for message, trace in run(loaded, [row], how, kept["blanks"], earlier.prompt, halt, earlier):
            if trace and turns:  # the talk goes on behind the new answer
                answer = [i for i in trace.steps[-1]["tokens"][kept["asked"] :] if i != mask_id]
                turns = [*turns[:-1], dict(role="assistant", content=chat.answer(answer, loaded.tokenizer))]
            yield message, trace and kept | dict(how=how, trace=trace, turns=turns)

    def export(kind):
        @guarded
        def save(kept, request: gr.Request):
            check(kept, words_of(request)["nothing_yet"])
            path, trace = folder_of(request) / f"nanohindi.{kind}", kept["trace"]
            {"html": trace.save_html, "json": trace.save, "gif": lambda p: gif.save(trace.to_dict(), p)}[kind](path)
            return gr.update(value=str(path), visible=True)

        return save

    # --- race

    @guarded
    def run_race(left, right, prompt, length, steps, strategy, temperature, seed, judge, repeats, points, lang,
                 request: gr.Request):  # fmt: skip
        halt, words = begin(request), TEXTS[lang]
        first = settings(length, steps, strategy, temperature, 1, 0, 0, seed)
        check(1 <= int(repeats or 0) <= REPEATS, f"{repeats} repeats are not from 1 to {REPEATS}")
        models, prompt = [get(left, words), get(right, words)], clean(prompt, words)
        judging = get(judge, words) if judge else None
        check(not BLANK.search(prompt), words["race_blank"])
        labels = [f"{name} ({words[side]})" for name, side in ((left, "left"), (right, "right"))]
        rows, held = [[], []], [None, None]
        for n in range(int(repeats)):
            how = dataclasses.replace(first, seed=first.seed + n)
            starts, runs, seen = [], [], [[], []]
            for name, m in zip((left, right), models, strict=True):
                mask_id, limit = m.denoiser.mask_id, m.denoiser.config.max_seq_len
                (canvas,) = canvases(prompt, m.tokenizer, mask_id, how.max_new_tokens, limit)
                x = torch.tensor([canvas], device=next(m.denoiser.parameters()).device)  # (1, T)
                starts.append(functools.partial(decoding, m, x, None, how))
                runs.append(traces.Trace(m.tokenizer, mask_id, prompt, dict(model=name), canvas=canvas))
                next(starts[-1]())  # the first forward of a process is slow, and not the model's fault
            shown_at, run = 0.0, time.time_ns() % 2**40
            for i, step, seconds in race.race([start() for start in starts]):
                runs[i].add(step, seconds=seconds)
                seen[i].append(seconds)
                if time.perf_counter() - shown_at > PACE:
                    yield packed(*(live(t, run) for t in runs)), *[gr.skip()] * 5
                    shown_at = time.perf_counter()
                if halt():
                    break
            if halt() and n:  # half a run is not counted
                return
            for i, m in enumerate(models):
                last = runs[i].steps[-1]
                ids, new = race.written(last["tokens"], runs[i].given, m.tokenizer.eos_id, m.denoiser.mask_id)
                got = race.figures(seen[i], last["forwards"], new)
                if judging and not halt():
                    got["judge"] = race.judged(judging, prompt, m.tokenizer.decode(ids))
                if held[i] is None and not halt():  # with a run of its own, as watching memory takes time
                    peak = race.peak_memory(m.denoiser, lambda start=starts[i]: any(halt() for _ in start()))
                    held[i] = None if halt() else peak / 2**20
                rows[i].append(got | dict(memory=held[i]))
            best = [race.medians(r) for r in rows]
            new = [(l, b["tokens_per_second"], b["judge"]) for l, b in zip(labels, best, strict=True)]
            charts = *race_charts(labels, best, words), frontier([*points, *new], words), [*points, *new][-40:]
            yield packed(*map(whole, runs)), race_table(labels, best, n + 1, words), *charts
            if halt():
                return

    def race_table(labels, best, n, words):
        header = [words["who"], *(words["judge_bits" if k == "judge" else k] for k in race.FIGURES)]
        write = lambda v: "–" if v is None else f"{v:,.3f}" if v < 10 else f"{v:,.0f}"  # noqa: E731
        lines = [[label, *(write(b[k]) for k in race.FIGURES)] for label, b in zip(labels, best, strict=True)]
        return table(f"{words['medians']}, n = {n}", header, lines)

    def race_charts(labels, best, words):
        for key in ("tokens_per_second", "memory"):
            yield bars(words[key], labels, [b[key] or 0 for b in best], words[key])

    def frontier(points, words):
        lines = {}
        for label, speed, bits in points:
            lines.setdefault(label, []).append((speed, bits))
        styled = [(label, report.style(i), p, dict(mode="markers")) for i, (label, p) in enumerate(lines.items())]
        return figure(report.chart(words["judge_bits"], words["tokens_per_second"], words["judge_bits"], styled, "log"))

    # --- inside

    def sentence_of(name, text, words):
        loaded, text = get(name, words), clean(text, words)
        ids, limit = loaded.tokenizer.encode(text), loaded.denoiser.config.max_seq_len
        check(0 < len(ids) <= limit, words["long_sentence"].format(len(ids), limit))
        return loaded, torch.tensor([ids], device=next(loaded.denoiser.parameters()).device)  # (1, T)

    @guarded
    def process(name, text, t, unit, schedule, seed, lang):
        words, (loaded, x0) = TEXTS[lang], sentence_of(name, text, TEXTS[lang])
        check(not hasattr(loaded.denoiser, "extend"), words["no_holes"])
        t, seed = t or 0, seed or 0  # a field that was emptied
        check(0 <= float(t) <= 1 and schedule in ("linear", "cosine"), "the time is not from 0 to 1")
        rate, x_t, _ = inside.hidden(x0, loaded.tokenizer, loaded.denoiser.mask_id, float(t), schedule, unit == "span",
                                     int(seed))  # fmt: skip
        trace, holes = inside.believed(loaded, x0, x_t, meta={words["rate"]: round(rate, 3)})
        header = [words[k] for k in ("hole", "truth", "guess", "probability", "rank", "entropy")]
        lines = [
            [str(h["position"] + 1), shown(h["truth"]), shown(h["guess"]), f"{h['probability']:.3f}", str(h["rank"])]
            + [f"{h['entropy']:.2f}"]
            for h in holes
        ]
        view = whole(trace, title=words["hidden"]) | dict(clock=0)  # at the holes, not at what fills them
        return packed(view), table(words["holes"], header, lines)

    @guarded
    def settle(name, text, seed, lang, request: gr.Request):
        halt, words, (loaded, x0) = begin(request), TEXTS[lang], sentence_of(name, text, TEXTS[lang])
        found, drawn_at = [], 0.0
        for masks, bits, error in inside.settling(loaded, x0, seed=int(seed or 0)):
            found.append((masks, bits, error))
            if halt():
                break
            if time.perf_counter() - drawn_at > 0.4:
                yield settled(found, words)
                drawn_at = time.perf_counter()
        yield settled(found, words)

    def settled(found, words):
        masks, bits, error = found[-1]
        how = f"{masks} {words['masks']}" if masks else words["exact"]
        line = [(words["bound"], report.style(0), found, {})]
        text = f"**{bits:.3f}{'' if error is None else f' ± {error:.3f}'}** {words['bound']} ({how})"
        return text, figure(report.chart(words["bound"], words["masks"], words["bound"], line))

    @guarded
    def look(name, text, t, unit, schedule, seed, request: gr.Request):
        loaded, x0 = sentence_of(name, text, words_of(request))
        x_t = x0
        if not hasattr(loaded.denoiser, "extend"):
            args = loaded.tokenizer, loaded.denoiser.mask_id, float(t or 0), schedule, unit == "span", int(seed or 0)
            x_t = inside.hidden(x0, *args)[1]
        text = lambda i: loaded.tokenizer.token_bytes(i).decode(errors="replace") or traces.BLOCK  # noqa: E731
        return heat(inside.looks(loaded.denoiser, x_t), [text(i) for i in x_t[0].tolist()])

    # --- results

    def measured(lang):
        """Two plots out of files: quality against time (benchmark.py sample), questions right (evaluate.py --qa)."""
        words, there = TEXTS[lang if lang in TEXTS else "en"], folders()
        files = {n: Path(p) / "benchmark_sample.json" for n, p in there.items()}
        files |= {f.stem: f for f in Path("checkpoints").glob("benchmark_*.json")}
        found = {}
        for name, file in files.items():
            try:
                found[name] = compare.rows(compare.read_json(file), "rows")
            except (OSError, RuntimeError):
                continue
        _, drawn = compare.frontiers({name: rows for name, rows in found.items() if rows})  # by forwards, by seconds
        if drawn:
            drawn["layout"] |= dict(height=600)  # a dozen ways of writing need room in the legend
            drawn["layout"]["legend"]["y"] = -0.15
        front = gr.update(value=figure(spoken(drawn, words)), visible=True) if drawn else gr.update(visible=False)
        return front, question_bars(there, words)

    @guarded
    def results(chosen, seen, lang):
        """Tables and curves of the runs, where a file of theirs has changed."""
        there, words = runs_at_hand(), TEXTS[lang if lang in TEXTS else "en"]
        paths = {name: Path(p) for name, p in there.items() if name in (chosen or [])}
        files = [p / n for p in paths.values() for n in ("metrics.jsonl", "eval.json")]
        files += Path("checkpoints").glob("*/results.csv")
        now = [lang, list(there), *((str(f), f.stat().st_mtime_ns) for f in files if f.is_file())]
        if now == seen:
            return [gr.skip()] * 5
        runs, notes = [], []
        for name, path in paths.items():
            try:
                runs += [compare.read_runs([path])[0] | dict(name=name)]
            except (ValueError, RuntimeError, OSError) as e:
                notes.append(f"<p>{html.escape(one_line(e))}</p>")
        groups = compare.group(runs)
        drawn = [f for f in compare.curves(runs, groups) if f] if runs else []
        parts = [report.to_html(spoken_table(t, words)) for t in compare.tables(runs, groups)] if runs else []
        named = lambda f, start: f["layout"]["title"]["text"].startswith(start)  # noqa: E731
        pick = lambda start: next((figure(spoken(f, words)) for f in drawn if named(f, start)), None)  # noqa: E731
        choices = gr.skip() if seen and seen[1] == now[1] else gr.update(choices=now[1])
        return choices, "".join([*notes, *parts, *experiments()]), pick("Validation"), pick("Training loss"), now

    def experiments():
        for path in sorted(Path("checkpoints").glob("*/results.csv")):
            try:
                lines = list(csv.reader(io.StringIO(path.read_text("utf-8", errors="replace"))))[:101]
            except (OSError, csv.Error):
                continue
            if lines:
                yield table(str(path), lines[0], lines[1:])

    @guarded
    def make_report(chosen, request: gr.Request):
        paths = [p for name, p in runs_at_hand().items() if name in (chosen or [])]
        check(paths, words_of(request)["no_run"])
        path, page = folder_of(request) / "report.html", report.to_page(*compare.parts(compare.read_runs(paths)))
        path.write_text(page, encoding="utf-8", errors="replace")
        return gr.update(value=str(path), visible=True), page

    return SimpleNamespace(**{k: v for k, v in locals().items() if inspect.isfunction(v)})

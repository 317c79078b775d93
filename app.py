"""The web app: see text appear, race two models, look inside one, read the results.

    python app.py                                     # every run under checkpoints/ and models/, on localhost:7860
    python app.py --ckpt checkpoints/mine,checkpoints/twin --port 7861

Four tabs of Gradio around player.html, in Hindi and English. Nothing is fetched from outside. Whatever a request asks
for is checked here, on the server: one model computes at a time, the others wait or are refused.
"""

import csv
import functools
import hashlib
import html
import inspect
import io
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler is to be silent

import torch

import chat
import checkpoint
import compare
import gif
import inside
import race
import report
import traces
from config import AppConfig, SampleConfig, check, one_line, parse, run_main
from machine import pick_device
from sample_diffusion import BLANK, canvases, decoding, right_padded
from sampling import STRATEGIES

try:
    import gradio as gr
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ImportError as e:
    gr, missing = None, e.name

HERE = Path(__file__).parent
TEXTS = json.loads((HERE / "app_texts.json").read_text(encoding="utf-8"))
LETTERS, STEPS, REPEATS, BODY = 8000, 1024, 20, 1 << 20  # most of each that a request may ask for; bytes of its body
PACE = 0.06  # seconds between two pictures of a text that appears
MODEL = dict(concurrency_id="model", concurrency_limit=1)  # events that compute, one at a time
EXAMPLES = ["एक दिन", "पार्वती ने कहा", "देवदास ___ चला गया", "mai kal bazaar gaya tha"]
CSS = """
.stage { display: flex; flex-wrap: wrap; gap: 12px; } .gradio-container { max-width: 1180px !important; margin: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; }
.numbers td, .numbers th { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
.words td { padding: .25rem .6rem; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
"""
KEYS = """() => document.addEventListener("keydown", e => {
  const press = id => [...document.querySelectorAll(id)].find(b => b.offsetParent)?.click();
  if (e.key === "Escape") press("button.stop-key");
  if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) press("button.go-key");
})"""

FRAME = """const frame = element.querySelector("iframe");
watch("value", () => { frame.hidden = !props.value; frame.srcdoc = props.value; });"""

# ---------------------------------------------------------------------------------------------------------------------
# models and requests


def find_models(cfg):
    """{name: what checkpoint.load takes} of the models to offer."""
    if cfg.ckpt:
        return {name.strip(): name.strip() for name in cfg.ckpt.split(",") if name.strip()}
    runs = {p.parent for root in ("checkpoints", "models") for n in ("best.pt", "latest.pt") for d in ("*", "*/*")
            for p in Path(root).glob(f"{d}/{n}")}  # fmt: skip
    return {str(run): str(run) for run in sorted(runs, key=lambda run: -run.stat().st_mtime)}


def file_of(path):
    """The file that a run folder's model comes from, or None."""
    files = [Path(path), *(Path(path) / n for n in ("best.pt", "latest.pt"))]
    return next((f for f in files if f.is_file()), None)


@functools.lru_cache(maxsize=4)  # a few stay in memory; a file that has changed is read again
def read_model(path, device, changed):
    return checkpoint.load(path, pick_device(device))


def clean(text):
    """Any string as text that UTF-8 can hold, within the server's limit."""
    check(isinstance(text, str), f"the text is a {type(text).__name__}")
    check(len(text) <= LETTERS, f"the text has {len(text)} characters, the app takes {LETTERS}")
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
        return gr.Error(html.escape(one_line(e)[:400]), print_exception=False)

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


class Guard:
    """ASGI: bodies beyond BODY and uploads are refused; a page may fetch from this server alone."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size = dict(scope["headers"]).get(b"content-length", b"0")
        if scope["path"].endswith("/upload") or not size.isdigit() or int(size) > BODY:
            return await PlainTextResponse("refused\n", 413)(scope, receive, send)
        got = 0

        async def limited():  # a body without a length
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return {"type": "http.disconnect"} if got > BODY else message

        async def with_policy(message):
            if message["type"] == "http.response.start":
                policy = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'"
                message["headers"] = [*message["headers"], (b"content-security-policy", policy)]
            await send(message)

        await self.app(scope, limited, with_policy)


# ---------------------------------------------------------------------------------------------------------------------
# text that appears


def settings(length, steps, strategy, temperature, top_p, block, remask, seed):
    """What a page sends → a SampleConfig. Raises ValueError for what is no number or out of range."""
    try:
        whole = dict(max_new_tokens=int(length), steps=int(steps), block_length=int(block), seed=int(seed))
        part = dict(temperature=float(temperature), top_p=float(top_p), remask=float(remask))
    except (TypeError, OverflowError) as e:
        raise ValueError(f"a setting is no number: {e}") from None
    check(whole["steps"] <= STEPS, f"{whole['steps']} steps are more than the app's {STEPS}")
    check(strategy in STRATEGIES, "there is no such order")
    check(abs(whole["seed"]) < 2**63, "the seed has more than 63 bits")
    return SampleConfig(strategy=strategy, **whole, **part)


def appear(loaded, rows, cfg, blanks=False, prompt="", halt=lambda: False):
    """Fill canvases (lists of ids), which compete: yields the Trace of the surest one so far, after each step."""
    tokenizer, mask_id = loaded.tokenizer, loaded.denoiser.mask_id
    x, lengths = right_padded(rows, tokenizer.pad_id, next(loaded.denoiser.parameters()).device)
    meta = dict(model=str(loaded.path), steps=cfg.steps, strategy=cfg.strategy, temperature=cfg.temperature)
    if hasattr(loaded.denoiser, "extend"):
        meta = {k: meta[k] for k in ("model", "temperature")}
    meta["seed"] = cfg.seed
    watch, all_traces = traces.Watch(), [traces.Trace(tokenizer, mask_id, prompt, meta, row) for row in rows]
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
    clear = "rgba(0,0,0,0)"
    return found.update_layout(
        title=title, xaxis=dict(title=unit, rangemode="tozero"), height=130 + 45 * len(names), template="none",
        font=dict(color="#8a8a8a"), paper_bgcolor=clear, plot_bgcolor=clear, margin=dict(l=180, r=20, t=50, b=45),
    )  # fmt: skip


def questions(folders, words):
    """Accuracy with its 95 % interval out of each eval.json that has one, as bars: an update of a plot."""
    found = []
    for folder in folders:
        try:
            qa = json.loads((Path(folder) / "eval.json").read_text("utf-8"))["qa"]["accuracy"]
            found.append((str(folder), *(float(qa[k]) for k in ("mean", "low", "high")), int(qa["n"])))
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
    columns, clear = min(3, len(found)), "rgba(0,0,0,0)"
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
    return panels.update_layout(height=height, template="none", paper_bgcolor=clear, font=dict(color="#8a8a8a"))


# ---------------------------------------------------------------------------------------------------------------------
# the page


def build(models, cfg):
    """The page, a gr.Blocks, for models {name: path}."""
    names, halted, spoken = list(models), {}, []  # halted: sessions whose run is to stop; spoken: what has a language
    saved = tempfile.TemporaryDirectory(prefix="nanohindi_")  # goes with the process
    folders = [p for p in map(Path, models.values()) if (p / "config.json").is_file()]

    def get(name):
        check(models, TEXTS["en"]["nothing"])
        check(name in models, "there is no such model")
        path = models[name]
        file = file_of(path)
        return read_model(path, cfg.device, file and file.stat().st_mtime_ns)

    def causal(name):
        config = Path(models[name]) / "config.json"
        return config.is_file() and json.loads(config.read_text("utf-8")).get("kind") == "autoregressive"

    def say(make, keys, **more):
        """A component whose texts {property: key of TEXTS} change with the language."""
        component = make(**speak("en", keys), **more)
        spoken.append((component, keys))
        return component

    def speak(lang, keys):
        words = {p: TEXTS[lang][k] for p, k in keys.items()}
        return {p: [(v, k) for k, v in w.items()] if isinstance(w, dict) else w for p, w in words.items()}

    def stage(panes=1, edit=False, **more):
        """panes players side by side; each is told what to show by a JSON list of messages."""
        replay = '<p><button class="replay"></button> <span></span></p>' if panes > 1 else ""
        page, script = traces.PLAYER.read_text("utf-8"), (HERE / "app.js").read_text("utf-8")
        labels = {lang: "▶ " + words["replay"] for lang, words in TEXTS.items()}
        props = dict(page=page, panes=panes, edit=edit, lang="en", labels=labels)
        component = gr.HTML(html_template=f'<div class="stage"></div>{replay}', js_on_load=script, **props, **more)
        stages.append(component)
        return component

    def begin(request):
        halted[request.session_hash] = False
        while len(halted) > 1000:  # sessions that were left
            halted.pop(next(iter(halted)))
        return lambda: halted.get(request.session_hash, False)

    def halt(request: gr.Request):
        halted[request.session_hash] = True

    # --- generate

    def run(loaded, rows, how, blanks, prompt, halt):
        """Yields messages for the stage, and at last (message, the trace, ids)."""
        shown_at, trace, run = 0.0, None, time.time_ns() % 2**40
        for trace in appear(loaded, rows, how, blanks, prompt, halt):
            if time.perf_counter() - shown_at > PACE:
                yield packed(live(trace, run)), None
                shown_at = time.perf_counter()
        if trace is None:  # stopped before the first step
            trace = traces.Trace(loaded.tokenizer, loaded.denoiser.mask_id, prompt, canvas=rows[0])
        yield packed(whole(trace, edit=True)), trace

    @guarded
    def generate(model, mode, prompt, length, steps, strategy, temperature, top_p, block, remask, seed, kept,
                 request: gr.Request):  # fmt: skip
        halt, how = begin(request), settings(length, steps, strategy, temperature, top_p, block, remask, seed)
        loaded, prompt, turns = get(model), clean(prompt), []
        tokenizer, mask_id, limit = loaded.tokenizer, loaded.denoiser.mask_id, loaded.denoiser.config.max_seq_len
        if mode == "chat":
            check(how.max_new_tokens <= limit, f"{how.max_new_tokens} tokens are more than the model's {limit}")
            room = lambda turns: len(chat.prompt(turns, tokenizer)) + how.max_new_tokens <= limit  # noqa: E731
            turns = chat.latest([*(kept or {}).get("turns", []), dict(role="user", content=prompt)], room)
            check(turns, f"the question and {how.max_new_tokens} tokens are more than the model's {limit}")
            asked = chat.prompt(turns, tokenizer)
            rows, blanks = [asked + [mask_id] * how.max_new_tokens], False
        else:
            blanks = mode == "fill" or bool(BLANK.search(prompt))
            check(not blanks or BLANK.search(prompt), "there is no blank in the text: write ___ where one is wanted")
            check(not blanks or not hasattr(loaded.denoiser, "extend"), "an autoregressive model cannot fill blanks")
            rows = canvases(prompt, tokenizer, mask_id, how.max_new_tokens, limit)
        for message, trace in run(loaded, rows, how, blanks, prompt, halt):
            if trace and turns:
                answer = chat.answer([i for i in trace.steps[-1]["tokens"][len(asked) :] if i != mask_id], tokenizer)
                turns = [*turns, dict(role="assistant", content=answer)]
            yield message, trace and dict(model=model, how=how, blanks=blanks, trace=trace, turns=turns)

    @guarded
    def again(kept, request: gr.Request, event: gr.EventData):
        """Write anew what was marked: the reopened words alone or, where words are pinned, all that were not given."""
        check(kept, TEXTS["en"]["nothing_yet"])
        halt, loaded, trace = begin(request), get(kept["model"]), kept["trace"]
        tokens, mask_id = trace.steps[-1]["tokens"], loaded.denoiser.mask_id
        opened, pinned = ({int(i) for i in event._data.get(k, [])} for k in ("open", "pin"))
        check(not hasattr(loaded.denoiser, "extend"), "an autoregressive model cannot write in the middle")
        check(all(0 <= i < len(tokens) for i in opened | pinned), "a place that was marked is not in the text")
        if pinned:
            opened |= set(range(len(tokens))) - trace.given - pinned
        row = [mask_id if i in opened else t for i, t in enumerate(tokens)]
        check(mask_id in row, "nothing is marked to be written again")
        how = settings(0, kept["how"].steps, kept["how"].strategy, kept["how"].temperature, kept["how"].top_p, 0,
                       kept["how"].remask, kept["how"].seed + 1)  # fmt: skip
        for message, trace in run(loaded, [row], how, kept["blanks"], kept["trace"].prompt, halt):
            yield message, trace and kept | dict(how=how, trace=trace)

    def export(kind):
        @guarded
        def save(kept, request: gr.Request):
            check(kept, TEXTS["en"]["nothing_yet"])
            folder = Path(saved.name) / hashlib.sha256(request.session_hash.encode()).hexdigest()
            folder.mkdir(exist_ok=True)
            path, trace = folder / f"nanohindi.{kind}", kept["trace"]
            {"html": trace.save_html, "json": trace.save, "gif": lambda p: gif.save(trace.to_dict(), p)}[kind](path)
            return gr.update(value=str(path), visible=True)

        return save

    # --- race

    @guarded
    def run_race(left, right, prompt, length, steps, strategy, temperature, seed, judge, repeats, points, lang,
                 request: gr.Request):  # fmt: skip
        halt, words = begin(request), TEXTS[lang]
        check(1 <= int(repeats) <= REPEATS, f"{int(repeats)} repeats are not from 1 to {REPEATS}")
        models, prompt, judging = [get(left), get(right)], clean(prompt), get(judge) if judge else None
        check(not BLANK.search(prompt), "a race continues a text: leave blanks out")
        labels = [f"{name} ({words[side]})" for name, side in ((left, "left"), (right, "right"))]
        rows, held = [[], []], [None, None]
        for n in range(int(repeats)):
            how = settings(length, steps, strategy, temperature, 1, 0, 0, int(seed) + n)
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
            for i, m in enumerate(models):
                last = runs[i].steps[-1]
                ids, new = race.written(last["tokens"], runs[i].given, m.tokenizer.eos_id, m.denoiser.mask_id)
                got = race.figures(seen[i], last["forwards"], new)
                if judging and not halt():
                    got["judge"] = race.judged(judging, prompt, m.tokenizer.decode(ids))
                if held[i] is None and not halt():  # with a run of its own, as watching memory takes time
                    held[i] = race.peak_memory(m.denoiser, lambda start=starts[i]: list(start())) / 2**20
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

    def sentence_of(name, text):
        loaded, text = get(name), clean(text)
        ids, limit = loaded.tokenizer.encode(text), loaded.denoiser.config.max_seq_len
        check(0 < len(ids) <= limit, f"the sentence has {len(ids)} tokens, the model reads 1 to {limit}")
        return loaded, torch.tensor([ids], device=next(loaded.denoiser.parameters()).device)  # (1, T)

    @guarded
    def process(name, text, t, unit, schedule, seed, lang):
        words, (loaded, x0) = TEXTS[lang], sentence_of(name, text)
        check(not hasattr(loaded.denoiser, "extend"), "an autoregressive model has no holes; choose a denoiser")
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
        view = whole(trace) | dict(clock=0)  # at the holes, not at what fills them
        return packed(view), table(words["holes"], header, lines)

    @guarded
    def settle(name, text, seed, lang, request: gr.Request):
        halt, words, (loaded, x0) = begin(request), TEXTS[lang], sentence_of(name, text)
        found, drawn_at = [], 0.0
        for masks, bits, error in inside.settling(loaded, x0, seed=int(seed)):
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
    def look(name, text, t, unit, schedule, seed):
        loaded, x0 = sentence_of(name, text)
        x_t = x0
        if not hasattr(loaded.denoiser, "extend"):
            args = loaded.tokenizer, loaded.denoiser.mask_id, float(t), schedule, unit == "span", int(seed)
            x_t = inside.hidden(x0, *args)[1]
        text = lambda i: loaded.tokenizer.token_bytes(i).decode(errors="replace") or traces.BLOCK  # noqa: E731
        return heat(inside.looks(loaded.denoiser, x_t), [text(i) for i in x_t[0].tolist()])

    # --- results

    def results(chosen, seen):
        """Tables and curves of the runs, where a file of theirs has changed."""
        paths = [p for p in folders if str(p) in (chosen or [])]
        files = [p / n for p in paths for n in ("metrics.jsonl", "eval.json")]
        now = [(str(f), f.stat().st_mtime_ns) for f in files if f.is_file()]
        if now == seen:
            return [gr.skip()] * 4
        runs, notes = [], []
        for path in paths:
            try:
                runs += compare.read_runs([path])
            except (ValueError, RuntimeError, OSError) as e:
                notes.append(f"<p>{html.escape(one_line(e))}</p>")
        for i, run in enumerate(runs):
            run["name"] = str(paths[i])
        groups = compare.group(runs)
        drawn = [f for f in compare.curves(runs, groups) if f] if runs else []
        parts = [report.to_html(t) for t in compare.tables(runs, groups)] if runs else []
        pick = lambda start: next((figure(f) for f in drawn if f["layout"]["title"]["text"].startswith(start)), None)  # noqa: E731
        return "".join([*notes, *parts, *experiments()]), pick("Validation"), pick("Training loss"), now

    def experiments():
        for path in sorted(Path("checkpoints").glob("*/results.csv")):
            lines = list(csv.reader(io.StringIO(path.read_text("utf-8", errors="replace"))))[:101]
            if lines:
                yield table(str(path), lines[0], lines[1:])

    @guarded
    def make_report(chosen):
        paths = [p for p in folders if str(p) in (chosen or [])]
        check(paths, "choose a run")
        runs = compare.read_runs(paths)
        groups, bench = compare.group(runs), {r["name"]: r["benchmark"] for r in runs if r["benchmark"]}
        drawn = [f for f in (*compare.curves(runs, groups), *compare.frontiers(bench)) if f]
        path = Path(saved.name) / "report.html"
        page = report.to_page(f"{len(runs)} runs", "", list(compare.tables(runs, groups)), drawn)
        path.write_text(page, encoding="utf-8", errors="replace")
        return gr.update(value=str(path), visible=True), page

    # --- what stands where

    stages, twins = [], [n for n in names if causal(n)]
    denoisers = [n for n in names if n not in twins] or names
    first, second = (denoisers or [None])[0], (twins or names or [None])[0]
    with gr.Blocks(title="nanoHinDi", fill_width=True, delete_cache=(600, 3600), analytics_enabled=False) as page:
        kept, points, seen = gr.State(time_to_live=3600), gr.State([], time_to_live=3600), gr.State()
        with gr.Row():
            say(gr.Markdown, dict(value="title"))
            languages = dict(choices=[("English", "en"), ("हिन्दी", "hi")], value="en", scale=0, min_width=250)
            lang = say(gr.Radio, dict(label="language"), elem_id="lang", **languages)
        if not models:
            say(gr.Markdown, dict(value="none"))

        with say(gr.Tab, dict(label="tab_generate"), id="generate"):
            with gr.Row():
                model = say(gr.Dropdown, dict(label="model"), choices=names, value=first)
                mode = say(gr.Radio, dict(label="mode", choices="modes"), value="continue")
            box = dict(value=EXAMPLES[0], lines=2, max_length=LETTERS, elem_id="prompt")
            prompt = say(gr.Textbox, dict(label="prompt", info="prompt_hint"), **box)
            gr.Examples(EXAMPLES, prompt, label="उदाहरण · Examples")
            with say(gr.Accordion, dict(label="more"), open=False):
                with gr.Row():
                    length = say(gr.Slider, dict(label="length"), minimum=1, maximum=512, value=48, step=1)
                    steps = say(gr.Slider, dict(label="steps"), minimum=1, maximum=512, value=48, step=1)
                    strategy = say(gr.Dropdown, dict(label="strategy"), choices=list(STRATEGIES), value="confidence")
                    temperature = say(gr.Slider, dict(label="temperature"), minimum=0, maximum=2, value=0.7, step=0.05)
                with gr.Row():
                    top_p = say(gr.Slider, dict(label="top_p"), minimum=0.05, maximum=1, value=1, step=0.05)
                    block = say(gr.Slider, dict(label="block"), minimum=0, maximum=128, value=0, step=8)
                    remask = say(gr.Slider, dict(label="remask"), minimum=0, maximum=0.5, value=0, step=0.01)
                    seed = say(gr.Number, dict(label="seed"), value=1337, precision=0)
            with gr.Row():
                go_button = say(gr.Button, dict(value="go"), variant="primary", elem_classes="go-key", elem_id="go")
                stop = say(gr.Button, dict(value="stop"), elem_classes="stop-key", elem_id="stop")
                forget = say(gr.Button, dict(value="new_chat"), visible=False)
            board = stage(edit=True, elem_id="board")
            with gr.Row():
                say(gr.Markdown, dict(value="export"))
                buttons = [
                    say(gr.Button, dict(value=f"as_{k}"), size="sm", elem_id=f"as_{k}") for k in ("html", "json", "gif")
                ]
            file = say(gr.File, dict(label="file"), visible=False, elem_id="file")
        asked = [model, mode, prompt, length, steps, strategy, temperature, top_p, block, remask, seed, kept]
        gr.on([go_button.click], generate, asked, [board, kept], api_name="generate", **MODEL)
        board.again(again, [kept], [board, kept], api_name=False, **MODEL)
        stop.click(halt, queue=False, api_name="stop")
        forget.click(lambda: (None, packed(dict(trace=None))), None, [kept, board], api_name=False)
        mode.change(lambda m: gr.update(visible=m == "chat"), mode, forget, api_name=False)
        for kind, button in zip(("html", "json", "gif"), buttons, strict=True):
            button.click(export(kind), [kept], file, api_name=f"export_{kind}")

        with say(gr.Tab, dict(label="tab_race"), id="race"):
            say(gr.Markdown, dict(value="race_note"))
            with gr.Row():
                left = say(gr.Dropdown, dict(label="left"), choices=names, value=first)
                right = say(gr.Dropdown, dict(label="right"), choices=names, value=second)
                judge = say(gr.Dropdown, dict(label="judge"), choices=[("–", ""), *((n, n) for n in twins)],
                            value=(twins or [""])[0])  # fmt: skip
            start = say(gr.Textbox, dict(label="prompt"), value=EXAMPLES[1], max_length=LETTERS)
            with gr.Row():
                race_length = say(gr.Slider, dict(label="length"), minimum=1, maximum=512, value=64, step=1)
                race_steps = say(gr.Slider, dict(label="steps"), minimum=1, maximum=512, value=16, step=1)
                race_order = say(gr.Dropdown, dict(label="strategy"), choices=list(STRATEGIES), value="dilated")
                race_heat = say(gr.Slider, dict(label="temperature"), minimum=0, maximum=2, value=0.7, step=0.05)
                race_seed = say(gr.Number, dict(label="seed"), value=1, precision=0)
                repeats = say(gr.Slider, dict(label="repeats"), minimum=1, maximum=REPEATS, value=1, step=1)
            with gr.Row():
                racing = say(gr.Button, dict(value="race"), variant="primary", elem_classes="go-key", elem_id="race")
                race_stop = say(gr.Button, dict(value="stop"), elem_classes="stop-key")
            both = stage(2, elem_id="both")
            figures = gr.HTML(elem_id="race_table")
            with gr.Row():
                speed, memory = gr.Plot(show_label=False), gr.Plot(show_label=False)
            with gr.Row():
                front, quizzed = gr.Plot(show_label=False), gr.Plot(show_label=False, visible=False)
        asked = [
            left,
            right,
            start,
            race_length,
            race_steps,
            race_order,
            race_heat,
            race_seed,
            judge,
            repeats,
            points,
            lang,
        ]
        racing.click(run_race, asked, [both, figures, speed, memory, front, points], api_name="race", **MODEL)
        race_stop.click(halt, queue=False, api_name=False)

        with say(gr.Tab, dict(label="tab_inside"), id="inside"):
            say(gr.Markdown, dict(value="inside_note"))
            with gr.Row():
                seer = say(gr.Dropdown, dict(label="model"), choices=names, value=first)
                own = say(
                    gr.Textbox,
                    dict(label="sentence"),
                    value="पार्वती ने कहा, मैं कल घर जाऊँगी।",
                    max_length=LETTERS,
                    scale=2,
                )
            with gr.Row():
                moment = say(gr.Slider, dict(label="time"), minimum=0, maximum=1, value=0.5, step=0.01, elem_id="time")
                unit = say(gr.Radio, dict(label="unit", choices="units"), value="token")
                schedule = say(gr.Radio, dict(label="schedule", choices="schedules"), value="linear")
                draw = say(gr.Number, dict(label="seed"), value=0, precision=0)
            window = stage(elem_id="window")
            holes = gr.HTML(elem_id="holes")
            with gr.Row():
                settle_button = say(gr.Button, dict(value="settle"), elem_id="settle")
                look_button = say(gr.Button, dict(value="look"), elem_id="look")
                inside_stop = say(gr.Button, dict(value="stop"), elem_classes="stop-key")
            bound_text = gr.Markdown(elem_id="bound")
            bound_plot, layers = gr.Plot(show_label=False), gr.Plot(show_label=False)
        asked = [seer, own, moment, unit, schedule, draw]
        changes = [moment.change, unit.change, schedule.change, own.submit, own.blur, seer.change, draw.change]
        gr.on(changes, process, [*asked, lang], [window, holes], api_name="process", trigger_mode="always_last",
              show_progress="hidden", **MODEL)  # fmt: skip
        settle_button.click(settle, [seer, own, draw, lang], [bound_text, bound_plot], api_name="settle", **MODEL)
        look_button.click(look, asked, layers, api_name="look", **MODEL)
        inside_stop.click(halt, queue=False, api_name=False)

        with say(gr.Tab, dict(label="tab_results"), id="results"):
            say(gr.Markdown, dict(value="refresh"))
            runs = say(gr.Dropdown, dict(label="runs"), choices=[str(f) for f in folders], multiselect=True,
                       value=[str(f) for f in folders[:6]])  # fmt: skip
            with gr.Row():
                validation, loss = gr.Plot(show_label=False), gr.Plot(show_label=False)
            tables = gr.HTML(elem_id="tables")
            reporting = say(gr.Button, dict(value="report"), elem_id="report")
            report_file = say(gr.File, dict(label="file"), visible=False)
            framed = gr.HTML(html_template='<iframe sandbox="allow-scripts" title="report" hidden></iframe>',
                             css_template="iframe { width: 100%; height: 80vh; border: 1px solid #8884; }",
                             js_on_load=FRAME, elem_id="framed")  # fmt: skip
        shown_results = [tables, validation, loss, seen]
        gr.Timer(3).tick(results, [runs, seen], shown_results, api_name="results", show_progress="hidden")
        runs.change(results, [runs, seen], shown_results, api_name=False, show_progress="hidden")
        reporting.click(make_report, runs, [report_file, framed], api_name="report")

        def translate(lang):
            check(lang in TEXTS, "there is no such language")
            texts = [gr.update(**speak(lang, keys)) for _, keys in spoken]
            return *texts, *(gr.update(lang=lang) for _ in stages), questions(folders, TEXTS[lang])

        def first_language(request: gr.Request):
            wanted = request.query_params.get("lang") or request.headers.get("accept-language", "")
            return "hi" if wanted.startswith("hi") else "en"

        outputs = [*(c for c, _ in spoken), *stages, quizzed]
        lang.change(translate, lang, outputs, api_name=False, show_progress="hidden", queue=False)
        lang.change(None, lang, js="l => { document.documentElement.lang = l }")
        page.load(first_language, None, lang, api_name=False, queue=False)
        page.load(lambda: questions(folders, TEXTS["en"]), None, quizzed, api_name=False, show_progress="hidden")
        if models:
            page.load(process, [*asked, lang], [window, holes], api_name=False, show_progress="hidden", **MODEL)
    page.queue(max_size=cfg.queue, default_concurrency_limit=4)
    page.saved = saved
    return page


def launch(page, cfg):
    """Start serving; returns the address. Raises RuntimeError if the port is taken."""
    host = cfg.host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, cfg.port))
        except PermissionError:
            raise
        except OSError as e:
            raise RuntimeError(f"cannot listen on {host}:{cfg.port} ({e.strerror}); --port takes another") from e
    fonts = [
        gr.themes.Font(f) for f in ("Noto Sans", "Noto Sans Devanagari", "Lohit Devanagari", "system-ui", "sans-serif")
    ]
    mono = [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]
    theme = gr.themes.Base(primary_hue="blue", font=fonts, font_mono=mono)  # of the system: none is fetched
    _, url, public = page.launch(
        server_name=host, server_port=cfg.port, share=cfg.share, quiet=True, prevent_thread_lock=True, show_error=True,
        theme=theme, css=CSS, js=KEYS, ssr_mode=False, footer_links=[], max_file_size=BODY, state_session_capacity=128,
        app_kwargs=dict(middleware=[Middleware(Guard)]), enable_monitoring=False,
    )  # fmt: skip
    return public or url


def main():
    (cfg,) = parse(__doc__, AppConfig)
    check(gr is not None, f"the app needs gradio and plotly, {missing if gr is None else ''} is missing: "
          "pip install -r requirements-app.txt")  # fmt: skip
    pick_device(cfg.device)
    models = find_models(cfg)
    if cfg.ckpt:  # those asked for by name must be whole
        for path in models.values():
            file = file_of(path)
            read_model(path, cfg.device, file and file.stat().st_mtime_ns)
    page = build(models, cfg)
    print(f"nanoHinDi with {len(models)} models: {launch(page, cfg)}", flush=True)
    if not models:
        print("no model here yet: `make quickstart` trains one in minutes, or name one with --ckpt")
    threading.Event().wait()


if __name__ == "__main__":
    run_main(main)

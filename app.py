"""The web app: see text appear, race two models, look inside one, read the results.

    python app.py                                     # every run under checkpoints/ and models/, on localhost:7860
    python app.py --ckpt checkpoints/mine,checkpoints/twin,hub:gpt2 --port 7861

Four tabs of Gradio around player.html, in Hindi and English; app_work.py does what they ask for. Nothing is fetched
from outside. Limits are checked on the server: one model computes at a time, the others wait or are refused.
"""

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler is to be silent

import traces
from config import AppConfig, check, parse, run_main
from machine import pick_device
from sampling import STRATEGIES

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse

    import app_work
    from app_work import ARRIVED, LETTERS, REPEATS, TEXTS, packed
except ModuleNotFoundError as e:
    gr, missing = None, e.name

BODY = 1 << 20  # bytes of a request
HERE = Path(__file__).parent
MODEL = dict(concurrency_id="model", concurrency_limit=1)  # events that compute, one at a time
FILES = dict(concurrency_id="files", concurrency_limit=1)  # events that write a file for the visitor, likewise
SENTENCE = "पार्वती ने कहा, मैं कल घर जाऊँगी।"
EXAMPLES = ["एक दिन", "पार्वती ने कहा", "देवदास ___ चला गया", "mai kal bazaar gaya tha"]
CSS = """
.stage { display: flex; flex-wrap: wrap; gap: 12px; }
.gradio-container { width: 100%; max-width: min(1180px, 100vw) !important; margin: auto; }
.scroll { overflow: auto; max-width: 100%; }
.scroll table { border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll td, .scroll th { padding: .3rem .7rem !important; border: 0 !important; }
.scroll tr { border-bottom: 1px solid #8884 !important; }
.scroll tr > :first-child { text-align: left !important; font-weight: 600; }
.numbers td, .numbers th { text-align: right !important; white-space: nowrap; }
.words td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; min-width: 7rem; }
.mark { background: #ffb40040; }
.hint { font-size: .85em; opacity: .8; }
#layers { overflow-x: auto !important; } #layers .js-plotly-plot { min-width: 40rem; }
#holes .scroll { max-height: 22rem; }
"""
KEYS = """() => document.addEventListener("keydown", e => {
  const press = id => [...document.querySelectorAll(id)].find(b => b.offsetParent)?.click();
  if (e.key === "Escape") press("button.stop-key");
  if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) press("button.go-key");
})"""

FRAME = """const frame = element.querySelector("iframe");
watch("value", () => { frame.hidden = !props.value; frame.srcdoc = props.value; });"""

# ---------------------------------------------------------------------------------------------------------------------
# the page


def build(models, cfg):
    """The page, a gr.Blocks, for models {name: path}."""
    do, names, spoken = app_work.handlers(models, cfg), list(models), []  # spoken: what has a language

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
        page, script = traces.PLAYER.read_text("utf-8"), HERE.joinpath("app.js").read_text("utf-8")
        labels = {lang: "▶ " + words["replay"] for lang, words in TEXTS.items()}
        props = dict(page=page, panes=panes, edit=edit, labels=labels)
        return gr.HTML(html_template=f'<div class="stage"></div>{replay}', js_on_load=script, **props, **more)

    twins = [n for n in names if do.causal(n)]
    longest = max(map(do.window, names), default=512)  # a slider ends where the model that is chosen does, see do.fit
    denoisers = [n for n in names if n not in twins] or names
    judges = [n for n in twins if do.judges(n)]
    # what is chosen at first, and loaded now: a whole one, and one that writes on before one that was tuned to answer
    first, second, judge_first = (
        next(filter(do.loads, sorted(those, key=lambda n: do.tasks(n) == "chat")), those[0] if those else None)
        for those in (denoisers, twins or names, judges)
    )
    task = do.tasks(first)
    order, _ = do.orders(task)
    with gr.Blocks(title="nanoHinDi", fill_width=True, delete_cache=(600, 3600), analytics_enabled=False) as page:
        kept, points, seen = gr.State(time_to_live=3600), gr.State([], time_to_live=3600), gr.State()
        with gr.Row():
            with gr.Column(scale=3, min_width=240):
                say(gr.Markdown, dict(value="title"))
            with gr.Column(scale=1, min_width=240):
                languages = dict(choices=[("English", "en"), ("हिन्दी", "hi")], value="en", elem_id="lang")
                lang = say(gr.Radio, dict(label="language"), **languages)
        if not models:
            say(gr.Markdown, dict(value="none"))

        with say(gr.Tab, dict(label="tab_generate"), id="generate"):
            with gr.Row():
                model = say(gr.Dropdown, dict(label="model"), choices=names, value=first)
                mode = say(gr.Radio, dict(label="mode", choices="modes"), value=task)
            box = dict(value=EXAMPLES[0], lines=2, max_length=LETTERS, elem_id="prompt")
            prompt = say(gr.Textbox, dict(label="prompt"), **box)
            say(gr.Markdown, dict(value="prompt_hint"), elem_classes="hint")
            gr.Examples(EXAMPLES, prompt, label="उदाहरण · Examples")
            with say(gr.Accordion, dict(label="more"), open=False):
                with gr.Row():
                    length = say(gr.Slider, dict(label="length"), minimum=1, maximum=longest, value=48, step=1)
                    steps = say(gr.Slider, dict(label="steps"), minimum=1, maximum=longest, value=48, step=1)
                    strategy = say(gr.Dropdown, dict(label="strategy"), choices=list(STRATEGIES), value=order)
                    temperature = say(gr.Slider, dict(label="temperature"), minimum=0, maximum=2, value=0.7, step=0.05)
                with gr.Row():
                    top_p = say(gr.Slider, dict(label="top_p"), minimum=0.05, maximum=1, value=1, step=0.05)
                    block = say(gr.Slider, dict(label="block"), minimum=0, maximum=128, value=0, step=8)
                    remask = say(gr.Slider, dict(label="remask"), minimum=0, maximum=0.5, value=0, step=0.01)
                    seed = say(gr.Number, dict(label="seed"), value=1337, precision=0)
            with gr.Row():
                go_button = say(gr.Button, dict(value="go"), variant="primary", elem_classes="go-key", elem_id="go")
                stop = say(gr.Button, dict(value="stop"), elem_classes="stop-key", elem_id="stop")
                forget = say(gr.Button, dict(value="new_chat"), visible=task == "chat")
            board = stage(edit=True, elem_id="board")
            with gr.Row():
                say(gr.Markdown, dict(value="export"))
                buttons = [
                    say(gr.Button, dict(value=f"as_{k}"), size="sm", min_width=60, elem_id=f"as_{k}")
                    for k in ("html", "json", "gif")
                ]
            file = say(gr.File, dict(label="file"), visible=False, elem_id="file")
        asked = [model, mode, prompt, length, steps, strategy, temperature, top_p, block, remask, seed, kept]
        go_button.click(do.generate, asked, [board, kept], api_name="generate", **MODEL)
        board.again(do.again, [kept], [board, kept], api_name=False, **MODEL)
        stop.click(do.halt, queue=False, api_name="stop")
        forget.click(lambda: (None, packed(dict(trace=None))), None, [kept, board], api_name=False)
        mode.input(do.orders, mode, [strategy, forget], api_name=False)
        window = dict(fn=do.fit, inputs=[model, length, steps], outputs=[length, steps], api_name=False)
        mode.input(do.suited, [mode, model], model, api_name=False).then(**window)
        model.input(do.tasks, model, mode, api_name=False).then(do.orders, mode, [strategy, forget], api_name=False)
        gr.on([model.input, page.load], **window)
        for kind, button in zip(("html", "json", "gif"), buttons, strict=True):
            button.click(do.export(kind), [kept], file, api_name=f"export_{kind}", **FILES)

        with say(gr.Tab, dict(label="tab_race"), id="race"):
            say(gr.Markdown, dict(value="race_note"))
            with gr.Row():
                left = say(gr.Dropdown, dict(label="left"), choices=names, value=first)
                right = say(gr.Dropdown, dict(label="right"), choices=names, value=second)
                judge = say(gr.Dropdown, dict(label="judge"), choices=[("–", ""), *((n, n) for n in judges)],
                            value=judge_first or "")  # fmt: skip
            start = say(gr.Textbox, dict(label="prompt"), value=EXAMPLES[1], max_length=LETTERS)
            with gr.Row():
                race_length = say(gr.Slider, dict(label="length"), minimum=1, maximum=longest, value=64, step=1)
                race_steps = say(gr.Slider, dict(label="steps"), minimum=1, maximum=longest, value=16, step=1)
                repeats = say(gr.Slider, dict(label="repeats"), minimum=1, maximum=REPEATS, value=1, step=1)
            with gr.Row():
                race_order = say(gr.Dropdown, dict(label="strategy"), choices=list(STRATEGIES), value="dilated")
                race_heat = say(gr.Slider, dict(label="temperature"), minimum=0, maximum=2, value=0.7, step=0.05)
                race_seed = say(gr.Number, dict(label="seed"), value=1, precision=0)
            with gr.Row():
                racing = say(gr.Button, dict(value="race"), variant="primary", elem_classes="go-key", elem_id="race")
                race_stop = say(gr.Button, dict(value="stop"), elem_classes="stop-key")
            both = stage(2, elem_id="both")
            figures = gr.HTML(elem_id="race_table")
            with gr.Row():
                speed, memory = gr.Plot(show_label=False), gr.Plot(show_label=False)
            with gr.Row():
                front, quizzed = gr.Plot(show_label=False), gr.Plot(show_label=False, visible=False)
            frontier = gr.Plot(show_label=False, visible=False)
        asked = [left, right, start, race_length, race_steps, race_order, race_heat, race_seed, judge, repeats]
        racing.click(
            do.run_race, [*asked, points, lang], [both, figures, speed, memory, front, points], api_name="race", **MODEL
        )
        fitted = dict(inputs=[left, right, race_length, race_steps], outputs=[race_length, race_steps])
        gr.on([left.input, right.input, page.load], do.fit, **fitted, api_name=False)
        race_stop.click(do.halt, queue=False, api_name=False)

        with say(gr.Tab, dict(label="tab_inside"), id="inside"):
            say(gr.Markdown, dict(value="inside_note"))
            with gr.Row():
                seer = say(gr.Dropdown, dict(label="model"), choices=names, value=first)
                own = say(gr.Textbox, dict(label="sentence"), value=SENTENCE, max_length=LETTERS, scale=2)
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
            bound_plot, layers = gr.Plot(show_label=False), gr.Plot(show_label=False, elem_id="layers")
        asked = [seer, own, moment, unit, schedule, draw]
        settings = [moment.change, unit.change, schedule.change, draw.change]
        changes = [*settings, own.submit, own.blur, seer.change, lang.input]
        gr.on(changes, do.process, [*asked, lang], [window, holes], api_name="process", trigger_mode="always_last",
              show_progress="hidden", **MODEL)  # fmt: skip
        settle_button.click(do.settle, [seer, own, draw, lang], [bound_text, bound_plot], api_name="settle", **MODEL)
        look_button.click(do.look, asked, layers, api_name="look", **MODEL)
        inside_stop.click(do.halt, queue=False, api_name=False)

        with say(gr.Tab, dict(label="tab_results"), id="results"):
            say(gr.Markdown, dict(value="refresh"))
            there = list(do.runs_at_hand())
            runs = say(gr.Dropdown, dict(label="runs"), choices=there, multiselect=True, value=there[:6])
            with gr.Row():
                validation, loss = gr.Plot(show_label=False), gr.Plot(show_label=False)
            tables = gr.HTML(elem_id="tables")
            reporting = say(gr.Button, dict(value="report"), elem_id="report")
            report_file = say(gr.File, dict(label="file"), visible=False)
            framed = gr.HTML(html_template='<iframe sandbox="allow-scripts" title="report" hidden></iframe>',
                             css_template="iframe { width: 100%; height: 80vh; border: 1px solid #8884; }",
                             js_on_load=FRAME, elem_id="framed")  # fmt: skip
        shown_results = [runs, tables, validation, loss, seen]
        shown_anew = dict(inputs=[runs, seen, lang], outputs=shown_results, show_progress="hidden")
        gr.Timer(3).tick(do.results, **shown_anew, api_name="results", queue=False)
        gr.on([runs.input, lang.change], do.results, **shown_anew, api_name=False)
        reporting.click(do.make_report, runs, [report_file, framed], api_name="report", **FILES)

        def translate(lang):
            check(lang in TEXTS, "there is no such language")
            texts = [gr.update(**speak(lang, keys)) for _, keys in spoken]
            return *texts, *do.measured(lang)

        def first_language(request: gr.Request):
            wanted = request.query_params.get("lang") or request.headers.get("accept-language", "")
            return "hi" if wanted.startswith("hi") else "en"

        outputs = [*(c for c, _ in spoken), frontier, quizzed]
        lang.change(translate, lang, outputs, api_name=False, show_progress="hidden", queue=False)
        lang.change(do.speaks, lang, api_name=False, show_progress="hidden", queue=False)
        lang.change(None, lang, js="l => { document.documentElement.lang = l }")
        spoke = page.load(first_language, None, lang, api_name=False, queue=False)
        if models:
            spoke.then(do.process, [*asked, lang], [window, holes], api_name=False, show_progress="hidden", **MODEL)
        page.load(do.measured, lang, [frontier, quizzed], api_name="measured", show_progress="hidden")
        page.unload(do.halt)  # who leaves wants no more
    page.queue(max_size=cfg.queue, default_concurrency_limit=4, api_open=False)  # what computes cannot go round it
    return page


# ---------------------------------------------------------------------------------------------------------------------
# serving


class Guard:
    """ASGI: bodies beyond BODY, uploads and named files are refused; a page may fetch from this server alone."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refuse = PlainTextResponse("refused\n", 413)
        sent = [(k, v) for k, v in scope["headers"] if k != ARRIVED.encode()]
        scope["headers"] = [*sent, (ARRIVED.encode(), str(time.monotonic()).encode())]
        size = dict(sent).get(b"content-length", b"0")
        if scope["path"].endswith("/upload") or not size.isdigit() or int(size) > BODY:
            return await refuse(scope, receive, send)
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > BODY:  # a body without a length
                return await refuse(scope, receive, send)
        if names_a_file(body):
            return await refuse(scope, receive, send)
        read = [] if scope["method"] != "POST" else [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return read.pop() if read else await receive()

        async def with_policy(message):
            if message["type"] == "http.response.start":
                policy = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'"
                message["headers"] = [*message["headers"], (b"content-security-policy", policy)]
            await send(message)

        await self.app(scope, again, with_policy)


def names_a_file(body):
    """Whether a JSON has a file in it, which gradio would read or fetch from anywhere. No component here takes one."""

    def inside(value):
        if isinstance(value, dict):
            return {"path", "meta"} <= value.keys() or any(map(inside, value.values()))
        return isinstance(value, list) and any(map(inside, value))

    try:
        return inside(json.loads(body))
    except ValueError:
        return False
    except RecursionError:
        return True


def launch(page, cfg):
    """Start serving; returns the address. RuntimeError: the port is taken; ValueError: no address of this machine."""
    host = (cfg.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1").strip("[]")
    try:
        found = socket.getaddrinfo(host, cfg.port, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda f: f[0] != socket.AF_INET)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except PermissionError:
        raise
    except (OSError, UnicodeError) as e:
        if isinstance(e, (socket.gaierror, UnicodeError)) or e.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"--host {host} is no address of this machine") from e
        raise RuntimeError(f"cannot listen on {host}:{cfg.port} ({e.strerror}); --port takes another") from e
    fonts = [
        gr.themes.Font(f) for f in ("Noto Sans", "Noto Sans Devanagari", "Lohit Devanagari", "system-ui", "sans-serif")
    ]
    mono = [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]
    theme = gr.themes.Base(primary_hue="blue", font=fonts, font_mono=mono)  # of the system: none is fetched
    _, url, public = page.launch(
        server_name=f"[{host}]" if ":" in host else host, server_port=cfg.port, share=cfg.share, quiet=True,
        prevent_thread_lock=True, show_error=True, theme=theme, css=CSS, js=KEYS, ssr_mode=False, footer_links=[],
        max_file_size=BODY, state_session_capacity=16, app_kwargs=dict(middleware=[Middleware(Guard)]),
        enable_monitoring=False,
    )  # fmt: skip
    return public or url


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # in good order: temporary files go
    (cfg,) = parse(__doc__, AppConfig)
    check(gr is not None, f"the app needs gradio and plotly, {missing if gr is None else ''} is missing: "
          "pip install -r requirements-app.txt")  # fmt: skip
    pick_device(cfg.device)
    models = app_work.find_models(cfg)
    if cfg.ckpt:  # those asked for by name must be whole
        for path in models.values():
            file = app_work.file_of(path)
            app_work.read_model(path, cfg.device, file and file.stat().st_mtime_ns)
    page = build(models, cfg)
    print(f"nanoHinDi with {len(models)} models: {launch(page, cfg)}", flush=True)
    if not models:
        print("no model here yet: `make quickstart` trains one in minutes, or name one with --ckpt")
    threading.Event().wait()


if __name__ == "__main__":
    run_main(main)

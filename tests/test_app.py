"""The web app as a visitor, a client and an attacker find it: through a real browser, gradio_client and plain HTTP."""

import concurrent.futures
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_gif
import tiny_hub
import torch
from conftest import ROOT, train

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install -r requirements-app.txt")
import gradio as gr
import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError

import app
import app_work
import checkpoint
import compare
import race
import sample_diffusion
from config import AppConfig, SampleConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = ROOT / "screenshots"
NASTY = "<img src=x onerror=alert(1)><script>alert(2)</script>${alert(3)}{{#if}}&lt;"
SETTINGS = dict(length=12, steps=6, strategy="confidence", temperature=0.7, top_p=1, block=0, remask=0, seed=3)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(models, **cfg):
    cfg = AppConfig(port=free_port(), device="cpu", **cfg)
    page = app.build(models, cfg)
    return page, app.launch(page, cfg).rstrip("/")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """As conftest's, with windows of 128 tokens: room for what the page asks for when nothing is changed."""
    out = tmp_path_factory.mktemp("app") / "denoiser"
    train(data, out, "--seq_len", 128, "--max_steps", 4)
    return out


@pytest.fixture(scope="module")
def twin(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("app") / "twin"
    train(data, out, "--seq_len", 128, "--max_steps", 4, kind="autoregressive")
    return out


@pytest.fixture
def visitor():
    """Stands for gr.Request."""
    return SimpleNamespace(session_hash="one", headers={})


@pytest.fixture(scope="module")
def site(trained, twin):
    """A running app with a denoiser and its twin; a queue of 8."""
    page, url = serve(app_work.labelled([trained, twin]), queue=8)
    yield SimpleNamespace(url=url, denoiser=trained.name, twin=twin.name, page=page)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def client(site):
    return Client(site.url, verbose=False)


def ask(client, site, prompt="राम", mode="continue", model=None, **more):
    """The trace that the app answers with."""
    sent = client.predict(model or site.denoiser, mode, prompt, *(SETTINGS | more).values(), api_name="/generate")
    (message,) = json.loads(sent)
    return message["trace"]


def refused(client, site, *args, **more):
    with pytest.raises(AppError) as e:
        ask(client, site, *args, **more)
    return str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# through gradio_client


def test_what_the_app_writes_is_what_the_sampler_writes(client, site, trained):
    loaded = checkpoint.load(trained)
    how = SampleConfig(max_new_tokens=12, steps=6, temperature=0.7, seed=3)
    for prompt, mode in (("राम", "continue"), ("राम ___3___ था।", "fill"), ("राम ___ था।", "fill")):
        expected = sample_diffusion.generate(loaded, [prompt], how)
        row, length = expected.rows[0]
        trace = ask(client, site, prompt, mode)
        assert trace["steps"][-1]["tokens"] == expected.steps[-1].x[row, :length].tolist()
        assert loaded.denoiser.mask_id in trace["steps"][0]["tokens"]
    causal = ask(client, site, model=site.twin)
    assert [len(s["revealed"]) for s in causal["steps"]] == [0] + [1] * (len(causal["steps"]) - 1)


def test_chat_keeps_the_conversation(client, site):
    first = ask(client, site, "क?", "chat", length=4)
    second = ask(client, site, "ख?", "chat", length=4)
    given = lambda trace: "".join(u[0] for u in trace["steps"][0]["units"] if u[1] == "prompt")  # noqa: E731
    assert given(first).startswith("प्रश्न: क?\nउत्तर:") and "ख?" not in given(first)
    assert given(second).startswith(given(first)) and given(second).endswith("प्रश्न: ख?\nउत्तर:")
    third = ask(Client(site.url, verbose=False), site, "ग?", "chat", length=4)  # another visitor
    assert given(third) == "प्रश्न: ग?\nउत्तर:"


@pytest.mark.parametrize(
    "more, says",
    [
        (dict(length=10**12), "window|maximum"),
        (dict(length=129), "window|maximum"),
        (dict(steps=10**9), "steps|maximum"),
        (dict(temperature="nan"), "temperature|minimum|number"),
        (dict(temperature=[1]), "number|int"),
        (dict(length=None), "number"),
        (dict(strategy="__class__"), "order|choices"),
        (dict(seed=2**70), "seed"),
        (dict(prompt="क" * 9000), "characters"),
        (dict(prompt="___999999999999___", mode="fill"), "window"),
        (dict(prompt="क " * 45 + "___ ख ___", mode="fill"), "So many blanks"),
        (dict(prompt="कोई रिक्त नहीं", mode="fill"), "blank"),
        (dict(prompt="क " * 200, mode="chat"), "question takes"),
        (dict(model="/etc/passwd"), "model|choices"),
        (dict(model="../../secrets.pt"), "model|choices"),
    ],
)
def test_the_server_checks_every_request(client, site, more, says):
    start = time.monotonic()
    assert re.search(says, refused(client, site, **more))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "more",
    [
        dict(steps=0),
        dict(steps=app_work.STEPS + 1),
        dict(temperature=math.nan),
        dict(temperature=-1),
        dict(temperature=math.inf),
    ]
    + [dict(length="many"), dict(length=-1), dict(length=math.inf), dict(strategy="x"), dict(strategy=["random"])]
    + [dict(top_p=0), dict(top_p=math.nan), dict(remask=2), dict(block=-8), dict(seed=2**63), dict(seed=None)],
)
def test_settings_are_checked_even_without_gradio(more):
    assert app_work.settings(**SETTINGS).steps == 6
    with pytest.raises((ValueError, TypeError)):
        app_work.settings(**SETTINGS | more)


def post(site, number, data, session, waits=lambda: None):
    """One event over plain HTTP: how it ended, and its data. waits() is called once it is in the queue."""
    body = json.dumps(dict(data=data, fn_index=number, session_hash=session))  # ASCII: a lone surrogate goes as \\udXXX
    kind = {"content-type": "application/json", app_work.ARRIVED: "1e18"}  # the second is not believed
    joined = httpx.post(f"{site.url}/gradio_api/queue/join", content=body, headers=kind, timeout=120)
    if joined.status_code != 200:
        return "refused", joined.text
    waits()
    where = dict(url=f"{site.url}/gradio_api/queue/data", params=dict(session_hash=session), timeout=120)
    with httpx.stream("GET", **where) as events:
        for line in events.iter_lines():
            if '"process_completed"' in line:
                message = json.loads(line.removeprefix("data:"))
                return "done" if message["success"] else "failed", message["output"]
    return "lost", ""


@pytest.fixture(scope="module")
def number(site):
    """Of the event that writes."""
    config = httpx.get(f"{site.url}/config").json()
    return next(d["id"] for d in config["dependencies"] if d["api_name"] == "generate")


def test_odd_text_comes_out_as_valid_text(client, site, number):
    settings = (SETTINGS | dict(length=3)).values()
    for prompt in ("\ud800क\udfff", "क\0ख", "\u202eक\u2066ख\u200f", NASTY[:20]):
        end, output = post(site, number, [site.denoiser, "continue", prompt, *settings, None], "odd")
        if end == "done":  # else it was refused in good order
            json.dumps(output, ensure_ascii=False).encode()  # a surrogate would raise
        assert end in ("done", "refused", "failed") and (end == "done" or "\ud800" in prompt)
    assert ask(client, site)["text"]


def test_a_failed_request_leaves_the_app_up(client, site, monkeypatch, trained):
    loaded = app_work.read_model(str(trained), "cpu", app_work.file_of(trained).stat().st_mtime_ns)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(loaded.denoiser, "trunk", full)
        assert "out of memory" in refused(client, site)
    assert ask(client, site)["steps"]


def test_race_reports_both(client, site):
    sent, table, speed, memory, front = client.predict(
        site.denoiser, site.twin, "राम", 8, 4, "confidence", 0.7, 1, site.twin, 2, "en", api_name="/race"
    )
    left, right = (m["trace"] for m in json.loads(sent))
    assert left["steps"][-1]["forwards"] == 4 and right["steps"][-1]["forwards"] == len(right["steps"]) - 1
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)][1:]
    assert "n = 2" in table and len(rows) == 2
    for row, trace in zip(rows, (left, right), strict=True):
        seconds, first, tokens, rate, forwards = (float(v.replace(",", "")) for v in row[1:6])
        assert 0 < first <= seconds and forwards <= tokens <= 8 and rate == pytest.approx(tokens / seconds, rel=0.6)
        assert float(row[7]) > 0 and (float(row[8]) > 0) and trace["steps"]
    assert len(json.loads(speed["plot"])["data"][0]["x"]) == len(json.loads(memory["plot"])["data"][0]["x"]) == 2
    assert {d["mode"] for d in json.loads(front["plot"])["data"]} == {"markers"}


def test_each_repeat_has_its_seed_and_half_a_race_does_not_count(trained, visitor, monkeypatch):
    monkeypatch.setattr(app_work, "PACE", 0)
    do = app_work.handlers({"a": str(trained)}, AppConfig(device="cpu"))
    asked = "a", "a", "राम", 8, 4, "confidence", 0.7, 1, "", 3, [], "en", visitor
    ends = [json.loads(message) for message, table, *_ in do.run_race(*asked) if isinstance(table, str)]
    texts = [[side["trace"]["text"] for side in end] for end in ends]
    assert len(set(map(tuple, texts))) == 3 and all(left == right for left, right in texts)
    tables = []
    for _, table, *_ in do.run_race(*asked):
        if isinstance(table, str):
            tables.append(table)
        elif tables:  # the second race has begun
            do.halt(visitor)
    assert len(tables) == 1 and "n = 1" in tables[0]


def test_inside_and_results_through_the_client(client, site, trained):
    inside = [site.denoiser, "राम बाज़ार में गया था।", 0.5, "token", "linear", 0]
    sent, table = client.predict(*inside, "en", api_name="/process")
    trace = json.loads(sent)[0]["trace"]
    mask_id = checkpoint.load(trained).denoiser.mask_id
    assert trace["steps"][0]["tokens"].count(mask_id) == table.count("<tr>") - 1 == -(-trace["length"] // 2)
    text, plot = client.predict(site.denoiser, inside[1], 0, "en", api_name="/settle")
    assert re.match(r"\*\*[\d.]+ ± [\d.]+\*\*", text) and "256" in text
    layers = json.loads(client.predict(*inside, api_name="/look")["plot"])
    assert [d["type"] for d in layers["data"]] == ["heatmap"] * 2
    _, tables, validation, loss = client.predict([site.denoiser], "en", api_name="/results")
    assert "<h2>Runs</h2>" in tables and json.loads(validation["plot"])["data"][0]["y"]
    with pytest.raises(AppError, match="Choose"):
        client.predict([], api_name="/report")


# ---------------------------------------------------------------------------------------------------------------------
# plain HTTP


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "app.py", "."])
def test_no_file_leaves_but_what_was_made_for_it(site, path):
    for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/file/", "/"):
        with httpx.Client() as http:
            request = http.build_request("GET", site.url + route.rstrip("/") + ("/" if route[-1] == "/" else "") + path)
            answer = http.send(request)
        assert answer.status_code >= 300 or "<!doctype html>" in answer.text[:20].lower(), (route, path)
        assert "root:" not in answer.text and "import gradio" not in answer.text


def test_bodies_and_uploads_are_refused(site):
    post = lambda path, **more: httpx.post(site.url + path, timeout=20, **more).status_code  # noqa: E731
    assert post("/gradio_api/queue/join", content=b" " * (app.BODY + 1)) == 413
    assert post("/gradio_api/upload", files=dict(files=("a.txt", b"x"))) == 413
    assert post("/gradio_api/queue/join", content=b"{not json") >= 400
    far = dict(path="http://localhost:1/x", meta=dict(_type="gradio.FileData"))  # gradio would fetch it
    nested = json.dumps(dict(data=[[dict(a=far)]], fn_index=0, session_hash="x")).replace("path", "p\\u0061th")
    assert post("/gradio_api/queue/join", content=nested.encode()) == 413
    assert post("/gradio_api/run/measured", json=dict(data=["en"])) >= 400  # nothing goes round the queue
    pieces = (b" " * (1 << 16) for _ in range(40))  # 2.5 MB without a length
    try:
        assert post("/gradio_api/queue/join", content=pieces) == 413
    except httpx.TransportError:
        pass
    headers = httpx.get(site.url).headers
    assert headers["content-security-policy"].startswith("default-src 'self'")


def test_stop_reaches_what_waits_in_the_queue(site, number, monkeypatch):
    real, began, go = app_work.decoding, threading.Event(), threading.Event()

    def held(*args, **kwargs):
        began.set()
        go.wait(60)
        yield from real(*args, **kwargs)

    monkeypatch.setattr(app_work, "decoding", held)
    data = [site.denoiser, "continue", "राम", *SETTINGS.values(), None]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(post, site, number, data, "runs")]
        assert began.wait(60)
        joined = threading.Event()
        runs.append(pool.submit(post, site, number, data, "waits", joined.set))
        assert joined.wait(60)
        sent = dict(data=[], session_hash="waits")
        assert httpx.post(f"{site.url}/gradio_api/run/stop", json=sent).status_code == 200
        go.set()
        ran, waited = (json.loads(run.result()[1]["data"][0])[0]["trace"]["steps"] for run in runs)
    assert len(ran) == 7 and len(waited) == 1


def memory():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.slow
def test_fifty_at_once_are_queued_or_refused_in_steady_memory(client, site, number):
    data = [site.denoiser, "continue", "राम", *SETTINGS.values(), None]
    visit = lambda n: post(site, number, data, f"visitor{n}")[0]  # noqa: E731
    ask(client, site)
    before = memory()
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        ends = list(pool.map(visit, range(50)))
    assert set(ends) <= {"done", "refused"} and ends.count("done") >= 8 and ends.count("refused") > 0, ends
    assert memory() - before < 150e6
    assert ask(client, site)["steps"]


# ---------------------------------------------------------------------------------------------------------------------
# as a command


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty folder to be in, with no models beside the code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app_work, "HERE", tmp_path)
    return tmp_path


def test_a_taken_port_a_damaged_checkpoint_and_wrong_flags(command, tmp_path, trained):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = command("app", "--ckpt", trained, "--port", port)
        assert result.code == 1 and str(port) in result.error()
    shutil.copytree(trained, tmp_path / "broken")
    path = tmp_path / "broken" / "best.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = command("app", "--ckpt", tmp_path / "broken", "--port", free_port())
    assert result.code == 1 and "damaged" in result.error()
    for wrong in (["--port", "0"], ["--port", "70000"], ["--queue", "0"], ["--ckpt", tmp_path / "none.pt"]):
        assert command("app", *wrong).code == 2, wrong


def test_a_damaged_run_is_not_what_the_page_begins_with(trained, twin, tmp_path):
    for n, run in enumerate((trained, twin)):
        shutil.copytree(run, tmp_path / f"broken{n}")
        (tmp_path / f"broken{n}" / "best.pt").write_bytes(b"torn")
    models = app_work.labelled([tmp_path / "broken0", tmp_path / "broken1", trained, twin])
    page = app.build(models, AppConfig(device="cpu"))
    chosen = [c["props"]["value"] for c in page.config["components"] if c["type"] == "dropdown"]
    assert {v for v in chosen if isinstance(v, str) and v in models} == {trained.name, twin.name}


def test_a_stop_counts_for_what_came_before_it_and_time_ends(visitor, trained, monkeypatch):
    do = app_work.handlers({"a": str(trained)}, AppConfig(device="cpu"))
    asked = "a", "continue", "राम", *SETTINGS.values(), None
    written = lambda do: list(do.generate(*asked, visitor))[-1][1]["trace"].steps  # noqa: E731
    visitor.headers = {app_work.ARRIVED: str(time.monotonic())}  # it waited, and was stopped meanwhile
    do.halt(visitor)
    assert len(written(do)) == 1
    visitor.headers = {app_work.ARRIVED: str(time.monotonic())}
    assert len(written(do)) == 7
    told = []
    monkeypatch.setattr(gr, "Warning", lambda message, **_: told.append(message))
    assert len(written(app_work.handlers({"a": str(trained)}, AppConfig(device="cpu", time_limit=1e-9)))) == 1
    assert told == [app.TEXTS["en"]["late"]]
    recent = app_work.Recent()
    for n in range(1002):
        recent.put(n % 1001, n)
    assert len(recent) == 1000 and recent[0] == 1001 and 1 not in recent


def test_what_stands_from_before_stays_what_the_model_wrote(visitor, trained):
    do = app_work.handlers({"a": str(trained)}, AppConfig(device="cpu"))
    *_, (_, kept) = do.generate("a", "continue", "राम", *SETTINGS.values(), None, visitor)
    first, given = kept["trace"], set(kept["trace"].given)
    opened, sure, tokens = set(range(len(first.age))) - given, first.sure, first.steps[-1]["tokens"]
    assert given and len(opened) == 12
    here = sorted(opened)[5]
    for _ in "ab":  # the second time as the first
        *_, (message, kept) = do.again(kept, visitor, SimpleNamespace(_data=dict(open=[here], pin=[])))
        trace, step = kept["trace"], json.loads(message)[0]["trace"]["steps"][0]
        assert trace.given == given and [i for i in opened if trace.sure[i] != sure[i]] in ([], [here])
        assert {i for _, state, _, where in step["units"] for i in where if state == "prompt"} <= given
        assert step["top"].keys() == {str(i) for i in opened - {here}}
        for i in opened - {here}:  # of the step that decided it
            likeliest = {t: p for t, p in step["top"][str(i)][1]}
            assert likeliest.get(tokens[i], sure[i]) == pytest.approx(sure[i], abs=2e-4)
    *_, (_, kept) = do.again(kept, visitor, SimpleNamespace(_data=dict(open=[], pin=[here])))
    assert set(kept["trace"].steps[0]["tokens"][i] for i in opened - {here}) == {first.mask_id}
    assert kept["trace"].steps[0]["tokens"][here] != first.mask_id


def test_an_answer_that_is_written_again_takes_the_place_of_the_first(visitor, trained):
    do = app_work.handlers({"a": str(trained)}, AppConfig(device="cpu"))
    *_, (_, kept) = do.generate("a", "chat", "क?", *SETTINGS.values(), None, visitor)
    here = range(kept["asked"], len(kept["trace"].age))
    *_, (_, after) = do.again(kept, visitor, SimpleNamespace(_data=dict(open=list(here), pin=[])))
    assert [t["role"] for t in after["turns"]] == ["user", "assistant"]
    assert after["turns"][0] == kept["turns"][0] and after["turns"][1] != kept["turns"][1]


def test_errors_in_the_language_of_the_page(visitor, trained):
    do = app_work.handlers({"a": str(trained)}, AppConfig(device="cpu"))
    ask = lambda mode: list(do.generate("a", mode, "राम", *SETTINGS.values(), None, visitor))  # noqa: E731
    for lang, says in (("en", "no blank"), ("hi", "रिक्त स्थान"), ("xx", "no blank")):
        do.speaks(lang, visitor)
        with pytest.raises(gr.Error, match=says):
            ask("fill")


def test_no_markup_leaves_as_markup():
    sent = app_work.packed(dict(text=NASTY), None)
    assert "<" not in sent and json.loads(sent) == [dict(text=NASTY), None]

    @app_work.guarded
    def fails():
        raise ValueError(NASTY)

    with pytest.raises(gr.Error) as e:
        fails()
    assert "<" not in e.value.message and "&lt;img src=x" in e.value.message


def test_files_of_sessions_do_not_pile_up(visitor, trained, monkeypatch):
    do = app_work.handlers({"a": str(trained)}, AppConfig(device="cpu"))
    *_, (_, kept) = do.generate("a", "continue", "राम", *SETTINGS.values(), None, visitor)
    monkeypatch.setattr(app_work, "FOLDERS", 3)
    made = []
    for n in range(6):
        made.append(do.export("json")(kept, SimpleNamespace(session_hash=f"../{n}", headers={}))["value"])
        os.utime(Path(made[-1]).parent, (n, n))
    assert [Path(p).exists() for p in made] == [False, False, True, True, True, True]


def test_without_a_model_it_says_how_to_get_one(elsewhere):
    assert app_work.find_models(AppConfig()) == {}
    page, url = serve({})
    try:
        assert "make quickstart" in httpx.get(f"{url}/config").text
        with pytest.raises(AppError, match="first line"):
            ask(Client(url, verbose=False), SimpleNamespace(denoiser=None))
    except ValueError:  # a client may refuse a choice that is not there
        pass
    finally:
        page.close(verbose=False)


def test_runs_and_models_of_the_repository_are_found(elsewhere, trained):
    shutil.copytree(trained, elsewhere / "checkpoints" / "a")
    shutil.copytree(trained, elsewhere / "checkpoints" / "suite" / "b")
    assert set(app_work.find_models(AppConfig())) == {"a", "b"}
    assert app_work.find_models(AppConfig(ckpt="x, hub:y")) == {"x": "x", "hub:y": "hub:y"}
    exported = elsewhere / "models" / "diffusion"
    exported.mkdir(parents=True)
    (exported / "model.safetensors").touch()
    told = dict(kind="autoregressive", model_config=dict(max_seq_len=32), run=dict(seq_len=32, chats=True))
    (exported / "config.json").write_text(json.dumps(told))
    found = app_work.find_models(AppConfig())
    assert list(found)[0] == "diffusion" and found["diffusion"] == str(exported) and len(found) == 3
    assert app_work.file_of(found["diffusion"]) == exported / "model.safetensors"
    do = app_work.handlers(found, AppConfig(device="cpu"))
    assert do.causal("diffusion") and do.judges("diffusion") and not do.causal("a")
    assert do.tasks("diffusion") == "chat" and do.tasks("a") == "continue"
    assert [do.suited(mode, "a") for mode in ("chat", "continue", "fill")] == ["diffusion", "a", "a"]
    assert do.suited("continue", "diffusion") == "diffusion"
    assert do.orders("chat")[0] == "left_to_right" and do.orders("fill")[0] == "confidence"
    fitted = do.fit("a", "diffusion", 100, 20)  # windows of 128 and 32 tokens
    assert [(u["maximum"], u["value"]) for u in fitted] == [(32, 32), (32, 20)]
    assert [(u["maximum"], u["value"]) for u in do.fit("a", 100, 20)] == [(128, 100), (128, 20)]


def test_what_was_measured_is_drawn(elsewhere, trained):
    """The frontier of benchmark.py sample and the accuracy of evaluate.py --qa, out of the run folder's files."""
    run = elsewhere / "checkpoints" / "a"
    shutil.copytree(trained, run)
    do = app_work.handlers({"a": str(run)}, AppConfig(device="cpu"))
    assert [u["visible"] for u in do.measured("en")] == [False, False]
    (run / "eval.json").write_text(json.dumps(dict(qa=dict(accuracy=dict(mean=0.5, low=0.4, high=0.7, n=20)))))
    quality = lambda nats: dict(judge_nats_per_token=dict(mean=nats, standard_error=0.1))  # noqa: E731
    rows = [dict(strategy="random", seconds=s, forwards=8, quality=quality(q)) for s, q in ((2.0, 3.5), (1.0, 4.0))]
    (run / "benchmark_sample.json").write_text(json.dumps(dict(rows=rows)))
    front, right = (u["value"] for u in do.measured("hi"))
    assert list(front.data[0].x) == [1.0, 2.0] and list(front.data[0].y) == [4.0, 3.5]
    assert front.layout.xaxis.title.text == "सेकंड" and "गुणवत्ता" in front.layout.title.text
    (bar,) = right.data
    assert bar.x == (0.5,) and bar.y == ("a (n = 20)",)
    assert [bar.error_x.array[0], bar.error_x.arrayminus[0]] == pytest.approx([0.2, 0.1])
    (run / "benchmark_sample.json").write_text("{torn")
    assert [u["visible"] for u in do.measured("en")] == [False, True]


def test_results_in_both_languages_and_runs_that_begin_later(elsewhere, trained, visitor):
    shutil.copytree(trained, elsewhere / "checkpoints" / "a")
    do = app_work.handlers({}, AppConfig(device="cpu"))
    choices, tables, validation, loss, seen = do.results(["a"], None, "en")
    cells = lambda page: re.findall(r"<td>(.*?)</td>", page)  # noqa: E731
    assert "<h2>Runs</h2>" in tables and validation.layout.yaxis.title.text == "bits/byte"
    again = do.results(["a"], seen, "en")
    assert all("__type__" in u and "value" not in u for u in again)  # nothing has changed: nothing is drawn
    _, hindi, validation, _, seen = do.results(["a"], seen, "hi")
    assert "<h2>रन</h2>" in hindi and "<th>पैरामीटर</th>" in hindi and cells(hindi)[:9] == cells(tables)[:9]
    assert validation.layout.yaxis.title.text == "बिट/बाइट"
    late = elsewhere / "checkpoints" / "late"
    late.mkdir()
    shutil.copy(trained / "config.json", late)
    (late / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "bits_per_byte": 4.5}\n')
    choices, *_, seen = do.results(["a"], seen, "hi")
    assert choices["choices"] == ["a", "late"]
    (late / "metrics.jsonl").open("a").write('{"step": 2, "loss": 2.5, "bits_per_byte": 4.0}\n')
    *_, validation, loss, seen = do.results(["late"], seen, "hi")
    assert len(loss.data[0].y) == 2
    _, page = do.make_report(["a", "late"], visitor)
    assert "2 runs" in page and "<h2>Paired differences</h2>" in page
    terms = {t.title for t in compare.tables(*grouped([trained]))} | {*compare.COLUMNS, *compare.NOTES.values()}
    assert terms <= app.TEXTS["hi"]["results"].keys()


def grouped(folders):
    runs = compare.read_runs(folders)
    return runs, compare.group(runs)


@pytest.fixture(scope="module")
def hub_models(tmp_path_factory):
    """Small real ones of transformers: BERT, GPT-2 and T5."""
    pytest.importorskip("transformers")
    folder, families = tmp_path_factory.mktemp("hub"), ("bert", "gpt2", "t5")
    for family in families:
        tiny_hub.make(family, folder / family)
    return {f: f"hub:{folder / f}" for f in families}


def test_models_of_the_hub_write_race_and_are_looked_into(hub_models, visitor):
    do = app_work.handlers(hub_models, AppConfig(device="cpu"))
    assert [do.causal(n) for n in hub_models] == [False, True, True]
    assert [do.judges(n) for n in hub_models] == [False, True, False]
    *_, (message, kept) = do.generate("bert", "fill", "राम ___3___ था।", *SETTINGS.values(), None, visitor)
    trace = json.loads(message)[0]["trace"]
    assert trace["meta"]["model"] == hub_models["bert"] and len(trace["steps"]) > 1 and kept["trace"]
    for left, right in (("bert", "gpt2"), ("t5", "bert")):
        asked = left, right, "राम", 6, 6, "confidence", 0.7, 1, "gpt2", 2, [], "en"
        *_, (message, table, *_) = do.run_race(*asked, visitor)
        traces = [m["trace"] for m in json.loads(message)]
        assert [t["steps"][-1]["forwards"] for t in traces] == [len(t["steps"]) - 1 for t in traces]
        rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)][1:]
        assert len(rows) == 2 and all(float(v.replace(",", "")) > 0 for row in rows for v in row[1:])
    sentence = "राम बाज़ार में गया था।"
    assert len(do.look("bert", sentence, 0.5, "token", "linear", 0, visitor).data) == 2
    assert "exact" in list(do.settle("gpt2", sentence, 0, "en", visitor))[-1][0]
    with pytest.raises(gr.Error, match="likelihood"):
        list(do.settle("t5", sentence, 0, "en", visitor))


def test_slots_are_drawn_without_the_key_that_stands_for_nothing():
    weights = torch.rand(2, 4, 4)  # heads, slots, nothing and three tokens
    (panel,) = app_work.heat([(0, "write", weights), (1, "think", weights)], ["क", "ख", "ग"]).data
    assert panel.z == pytest.approx(weights.mean(0)[:, 1:].numpy()) and list(panel.x) == ["1 क", "2 ख", "3 ग"]


def test_only_this_machine_is_served_unless_asked():
    class Page:
        def launch(self, **asked):
            self.asked = asked
            return None, "http://here", "https://there" if asked["share"] else None

    page = Page()
    assert app.launch(page, AppConfig(port=free_port())) == "http://here"
    assert page.asked["server_name"] == "127.0.0.1" and page.asked["share"] is False
    assert app.launch(page, AppConfig(port=free_port(), share=True)) == "https://there"
    interfaces = Path("/proc/net/if_inet6")
    if interfaces.exists() and "0" * 31 + "1" in interfaces.read_text():
        app.launch(page, AppConfig(port=free_port(), host="::1"))
        assert page.asked["server_name"] == "[::1]"
    for wrong in ("203.0.113.7", "no.such.name.invalid", "a b", "é" * 70):
        with pytest.raises(ValueError, match="no address"):
            app.launch(page, AppConfig(port=free_port(), host=wrong))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "python app.py --share" in readme and "app_file: app.py" in readme


def listening(out, alive):
    end = time.monotonic() + 120
    while "http://127.0.0.1" not in (out.read_text("utf-8") if out.exists() else ""):
        assert alive() and time.monotonic() < end
        time.sleep(0.1)


def test_ctrl_c_ends_it(start, trained):
    child = start("app", "--ckpt", trained, "--port", free_port(), "--device", "cpu")
    listening(child.folder / "std1", child.process.is_alive)
    child.send(signal.SIGINT)
    assert child.wait().code == 130


def test_sigterm_ends_it_and_leaves_no_files(trained, tmp_path):
    argv = [sys.executable, ROOT / "app.py", "--ckpt", trained, "--port", str(free_port()), "--device", "cpu"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(argv, stdout=out, env=os.environ | dict(TMPDIR=str(tmp_path)))
    try:
        listening(tmp_path / "out", lambda: process.poll() is None)
        made = list(tmp_path.glob("nanohindi_*"))
        process.terminate()
        assert process.wait(60) == 143 and len(made) == 1 and not made[0].exists()
    finally:
        process.kill()


def test_both_languages_say_everything():
    english, hindi = app.TEXTS["en"], app.TEXTS["hi"]
    assert english.keys() == hindi.keys()
    source = "".join((ROOT / name).read_text("utf-8") for name in ("app.py", "app_work.py"))
    used = {*re.findall(r"""["'](\w+)["']""", source), *race.FIGURES}
    assert [k for k in english if k not in used and not k.startswith("as_")] == []
    for key, text in hindi.items():
        values = text.values() if isinstance(text, dict) else [text]
        assert all(re.search(r"[\u0900-\u097f]", v) for v in values) or key in ("as_html", "as_json", "as_gif", "top_p")


# ---------------------------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser():
    needed = os.environ.get("CHROMIUM_REQUIRED") == "1"  # .ci/run says so: there these tests always run
    if not CHROMIUM and not needed:
        pytest.skip("no Chromium here: Debian's packages chromium and fonts-lohit-deva let these tests run")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site, request):
    """visit(width=…, path=…, …) → a page. In the end: no console error, and no request went elsewhere."""
    contexts, errors, away = [], [], []

    def visit(path="", width=1280, height=1000, **more):
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), **dict(locale="en-US") | more))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("dialog", lambda d: (errors.append("a script ran"), d.dismiss()))
        page.on("request", lambda r: away.append(r.url) if not r.url.startswith((site.url, "data:", "blob:")) else None)
        page.goto(f"{site.url}/{path}")
        page.wait_for_selector("#go")
        return page

    yield visit
    for context in contexts:
        SHOTS.mkdir(exist_ok=True)
        for page in context.pages:
            page.evaluate("scrollTo(0, 0)")  # a frame that is out of sight is not painted
            page.wait_for_timeout(500)
            page.screenshot(path=SHOTS / f"{request.node.name}.png", full_page=True)
        context.close()
    assert errors == [] and away == []


def player(page, stage):
    return page.wait_for_selector(f"#{stage} iframe").content_frame()


def written(page, frame, before=None):
    """Wait until a run is over in a player; returns its trace."""
    frame.wait_for_function(
        "b => trace && !trace.run && trace.steps.length > 1 && trace.text !== b", arg=before, polling=100
    )
    return frame.evaluate("trace")


def tab(page, n):
    page.get_by_role("tab").nth(n).click()


@pytest.mark.slow
def test_text_appears_and_the_player_plays_it(visit, site, trained):
    page = visit()
    frame = player(page, "board")
    page.fill("#prompt textarea", NASTY)
    page.keyboard.press("Control+Enter")
    trace, mask_id = written(page, frame), checkpoint.load(trained).denoiser.mask_id
    masks = [s["tokens"].count(mask_id) for s in trace["steps"]]
    assert masks[0] > masks[-1] == 0
    for k in (0, 3, len(masks) - 1, 1):
        frame.fill("#scrub", str(k))
        assert int(frame.inner_text("#n-masks")) == masks[k]
        assert frame.locator('#text [data-state="open"], #text [data-state="remasked"]').count() == masks[k]
    assert frame.locator("#text img, #text script").count() == 0 and "<img src=x" in frame.inner_text("#text")
    frame.fill("#scrub", "0")
    frame.hover('#text [data-state="open"] >> nth=0')  # what it believes there: five candidates and an entropy
    at = next(i for i, t in enumerate(trace["steps"][0]["tokens"]) if t == mask_id)
    entropy, top = trace["steps"][1]["top"][str(at)]
    assert frame.locator("#top li").count() == 1 + len(top) == 6
    assert f"{entropy:.2f}" in frame.inner_text("#top li >> nth=0") and f"{top[0][1]:.2f}" in frame.inner_text("#top")
    frame.select_option("#speed", "4")
    frame.click("#play")
    frame.wait_for_function("n => player.step === n", arg=len(masks) - 1, polling=100)
    frame.hover('#text [data-state="kept"] >> nth=0')
    assert "step" in frame.inner_text("#detail")
    page.focus("#prompt textarea")  # the keyboard reaches everything
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"go", "stop", "IFRAME", "as_html"} <= reached, reached


@pytest.mark.slow
def test_words_are_reopened_and_pinned(visit, site):
    page = visit()
    frame = player(page, "board")
    page.fill("#prompt textarea", "राम")
    page.click("#go")
    trace = written(page, frame)
    words = frame.locator('#text [data-state="kept"], #text [data-state="new"]')
    words.nth(3).click()
    marked = frame.evaluate("[...marks].map(([p]) => p)")
    assert marked and frame.locator('#text [data-mark="open"]').count() > 0
    frame.click("#again")
    frame.wait_for_function("n => trace.steps[0].tokens.length && marks.size === 0 && !trace.run && masks(0) === n",
                            arg=len(marked), polling=100)  # fmt: skip
    now = frame.evaluate("trace")
    kept = [i for i in range(trace["length"]) if i not in marked]
    final = trace["steps"][-1]["tokens"]
    assert [now["steps"][-1]["tokens"][i] for i in kept] == [final[i] for i in kept]
    assert 0 <= float(frame.inner_text("#n-rate")) <= len(marked)
    frame.fill("#scrub", "0")
    frame.hover('#text [data-state="kept"] >> nth=0')
    assert "written before" in frame.inner_text("#detail") and frame.locator("#top li").count() == 6
    frame.fill("#scrub", "99")
    kept = [["क", "kept", 0.5, [0]], ["", "kept", 0.5, [1]], ["", "kept", 0.5, [2]]]  # the ends stood there before
    same = dict(remasked=[], tokens=[], confidence=[0.5] * 4)
    steps = [same | dict(units=[*kept, last], revealed=[3] * n, forwards=n, seconds=n)
             for n, last in enumerate((["", "open", None, [3]], ["ख", "new", 0.5, [3]]))]  # fmt: skip
    assert frame.evaluate("s => (playTrace({steps: s, meta: {}}), $('n-rate').textContent)", steps) == "1.00"
    frame.evaluate("t => playTrace(t)", now)
    frame.locator("#text span").last.click()
    frame.locator("#text span").last.click()
    pinned = frame.evaluate("[...marks].map(([p, m]) => (p, m))")
    assert set(pinned) == {"pin"}


@pytest.mark.slow
def test_stop_stops_within_a_step(visit, monkeypatch):
    real, done = app_work.decoding, []

    def slow(*args, **kwargs):
        for step in real(*args, **kwargs):
            time.sleep(0.3)
            done.append(time.monotonic())
            yield step

    monkeypatch.setattr(app_work, "decoding", slow)
    page = visit()
    frame = player(page, "board")
    page.fill("#prompt textarea", "राम")
    page.click("#go")
    frame.wait_for_function("() => trace && trace.run && trace.steps.length > 1", polling=100)  # it appears live
    stopped = time.monotonic()
    page.click("#stop")
    trace = written(page, frame)
    after = len(done)
    assert 0 < trace["steps"][-1]["tokens"].count(max(trace["steps"][0]["tokens"])), "it went on to the end"
    time.sleep(1.0)
    assert len(done) == after and sum(t > stopped + 1.5 for t in done) == 0
    page.click("#go")  # and the next run is not stopped
    frame.wait_for_function("() => trace && trace.run", polling=100)
    page.keyboard.press("Escape")
    written(page, frame)
    page.close()  # who leaves in the middle stops it too
    page = visit()
    page.click("#go")
    player(page, "board").wait_for_function("() => trace && trace.run", polling=100)
    before = len(done)
    page.close()
    known = None
    while known != len(done):
        known = len(done)
        time.sleep(1.5)
    assert len(done) - before < 40, "it went on for nobody"


@pytest.mark.slow
def test_exports(visit, tmp_path):
    page = visit()
    page.fill("#prompt textarea", "राम")
    page.click("#go")
    trace, data = written(page, player(page, "board")), {}
    for kind in ("html", "json", "gif"):
        page.click(f"#as_{kind}")
        page.wait_for_selector(f"#file a[href$='.{kind}']")
        with page.expect_download() as download:
            page.locator("#file a").first.click()
        download.value.save_as(tmp_path / kind)
        data[kind] = (tmp_path / kind).read_bytes()
        if kind == "json" and not test_gif.able():
            break
    assert json.loads(data["json"]) == trace and data["html"].startswith(b"<!doctype html>")
    assert data.get("gif", b"GIF89a").startswith(b"GIF89a")


@pytest.mark.slow
def test_the_race_in_a_browser(visit):
    page = visit()
    tab(page, 1)
    page.click("#race button, button#race")
    page.wait_for_selector("#race_table table")
    left, right = (f.content_frame() for f in page.query_selector_all("#both iframe"))
    ends = [written(page, f)["steps"][-1] for f in (left, right)]
    assert all(e["forwards"] > 1 for e in ends)
    page.click("#both .replay")
    page.wait_for_function("s => document.querySelector('#both .replay').nextElementSibling.textContent === s",
                           arg=f"{max(e['seconds'] for e in ends):.2f} s")  # fmt: skip
    assert [f.inner_text("#n-masks") for f in (left, right)] == ["0", "0"]
    page.wait_for_selector(".js-plotly-plot .bars path")


@pytest.mark.slow
def test_the_inside_in_a_browser(visit, trained):
    page = visit()
    tab(page, 2)
    frame = player(page, "window")
    counts = []
    for t in (0.2, 0.8):
        page.fill("#time input[type=number]", str(t))
        page.keyboard.press("Tab")
        frame.wait_for_function("n => trace && masks(0) > n", arg=counts[-1] if counts else 0, polling=100)
        frame.wait_for_function("t => (trace.meta['mask rate'] + '') === t", arg=str(t), polling=100)
        counts.append(frame.evaluate("masks(0)"))
        assert frame.evaluate("player.step") == 0 and frame.inner_text("#n-masks") == str(counts[-1])
    assert frame.inner_text("h1") == "What is hidden"
    page.wait_for_function("n => document.querySelectorAll('#holes tr').length === n + 1", arg=counts[-1])
    page.click("#settle")
    page.wait_for_function("() => /± /.test(document.querySelector('#bound').textContent)")
    page.click("#look")
    page.wait_for_selector(".heatmaplayer image")


@pytest.mark.slow
def test_the_results_in_a_browser(visit, client, site, trained):
    replay = ask(client, site)
    (trained / "replay.json").write_text(json.dumps(replay))
    page = visit()
    tab(page, 3)
    page.wait_for_selector("#tables table")
    page.wait_for_selector(".js-plotly-plot .scatterlayer .trace", state="attached")
    page.click("#report")
    frame = page.wait_for_selector("#framed iframe:visible").content_frame()
    frame.wait_for_selector("#charts .plot-container")
    assert frame.inner_text("h1") == "2 runs"
    played = frame.wait_for_selector(
        "iframe"
    ).content_frame()  # the report has the same player, in a frame in the frame
    played.wait_for_function("() => trace && trace.steps.length > 1", polling=100)
    assert played.evaluate("trace") == replay and played.inner_text("#n-masks") == "0"
    height = played.evaluate("document.body.offsetHeight")  # it says so, and gets it
    frame.wait_for_function(
        "h => Math.abs(document.querySelector('iframe').clientHeight - h) < 5", arg=height, polling=100
    )


@pytest.mark.slow
def test_hindi_on_a_phone(visit):
    page = visit("?lang=hi", width=380, height=800, color_scheme="dark")
    page.wait_for_function("() => document.documentElement.lang === 'hi'")
    page.wait_for_function("() => document.querySelector('#go').textContent.includes('लिखें')")
    page.fill("#prompt textarea", "राम")
    page.click("#go")
    frame = player(page, "board")
    written(page, frame)
    assert frame.inner_text("h1") == "पाठ कैसे लिखा गया"
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert frame.evaluate("document.documentElement.scrollWidth") <= frame.evaluate("innerWidth")
    background = frame.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60, "not dark"
    for n in range(4):
        tab(page, n)
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
    tab(page, 0)

    # letters are real and joined, no boxes
    picture = """c => {
      const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
      pen.font = `40px ${getComputedStyle(document.body).fontFamily}`;
      pen.fillText(c, 5, 45);
      return pen.getImageData(0, 0, 90, 60).data.join();
    }"""
    box, seen = frame.evaluate(picture, "\U0010fffe"), {frame.evaluate(picture, c) for c in "कञहऱ"}
    assert box not in seen and len(seen) == 4
    width = "s => { const p = document.createElement('canvas').getContext('2d'); p.font = '40px ' + " \
        "getComputedStyle(document.body).fontFamily; return p.measureText(s).width; }"  # fmt: skip
    assert frame.evaluate(width, "क्षि") < 0.8 * sum(frame.evaluate(width, c) for c in "कषि")

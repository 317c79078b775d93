"""compare.py, report.py, intervals.py: run folders made by hand, whose means, errors and intervals are known."""

import json
import math
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT

import compare
import config
import evaluate
import intervals
import report

LN2 = math.log(2)
CONFIG = dict(
    kind="transformer", seed=1, output_dir="x", lr=0.004, dropout=0.0, weight_decay=0.1, seq_len=64, max_steps=100,
    rows_a_step=8, data_sha256="a" * 64, tokenizer_sha256="b" * 64, optimizer="muon", lr_schedule="linear", warmup=0.02,
    decay=0.5, beta2=0.95, grad_clip=1.0, ema=0.999, precision="torch.float32", parameters=1_000_000,
    operations_a_step=3_000_000, train_tokens=12_800, git_commit="c" * 40, torch="2.13.0",
)  # fmt: skip
NASTY = '</script><script>alert(1)</script><b>bold</b> & "quoted" | piped\u2028कहानी'


def metrics(steps=100, bits=0.9, **more):
    """A line every 10 steps, 2 s a step; step 10 is faster than the others. Validation at 45 and at the end."""
    lines = []
    for step in range(10, steps + 1, 10):
        times = dict(training=2.0 * step, tokens_a_second=900.0 if step == 10 else 256.0, peak_bytes=step * 2**20)
        lines.append(dict(step=step, loss=8 - step / 50, lr=0.004, seconds=times))
        if step in (50, steps):
            at = 45 if step == 50 else step
            lines.append(dict(step=at, bits_per_byte=bits + (100 - at) / 1000, seconds={"validation": 1.0}))
    return [*lines, *more.get("more", [])]


def scores(costs, n_bytes=(100, 300), **more):
    """eval.json of windows that cost so many bits a byte."""
    nats = [c * n * LN2 for c, n in zip(costs, n_bytes, strict=True)]
    mean = sum(nats) / LN2 / sum(n_bytes)
    return {
        "checkpoint": "best.pt", "step": 90, "kind": "transformer", "split": "val", "data_sha256": "a" * 64,
        "ema": True, "seed": 0, "batch_size": 4, "likelihood": "bound", "windows": len(nats), "masks": 16,
        "bits_per_byte": {"mean": mean, "standard_error": 0.0123}, "bits_per_character": {"mean": 2.5 * mean},
        "per_window": {"nats": nats, "bytes": list(n_bytes)},
    } | more  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """make("name", {eval.json or None}, records, lr=...) → the folder of a run."""

    def make(name, evaluation=None, records=None, **fields):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"output_dir": name} | fields), "utf-8")
        lines = metrics() if records is None else records
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, "utf-8")
        if evaluation is not None:
            (folder / "eval.json").write_text(json.dumps(evaluation), "utf-8")
        return folder

    return make


class Page(HTMLParser):
    """What a browser would see: the tags, the titles' tables as lists of cells, and the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.scripts, self.title, self.marked, self.inside = [], {}, [], "", [], ""
        self.feed(text)
        self.charts = {}
        for figure in json.loads(next(s for kind, s in self.scripts if kind == "application/json")):
            name = f"{figure['layout']['title']['text']}: {figure['layout']['xaxis']['title']['text']}"
            self.charts[name] = figure

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if tag == "h2":
            self.title = ""
        if tag == "table":
            self.tables[self.title] = []
        if tag == "tr":
            self.tables[self.title].append([])
        if tag in ("td", "th"):
            self.tables[self.title][-1].append("")
            self.mark = dict(attrs).get("class") == "mark"

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "h2":
            self.title += data
        if self.inside in ("td", "th"):
            self.tables[self.title][-1][-1] += data
            if self.mark:
                self.marked.append(data)
        if self.inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


@pytest.fixture(autouse=True)
def plotlyjs(monkeypatch, request):
    """Five megabytes of plotly.js in each page take long to parse; one test looks at them."""
    if "asks_nobody" not in request.node.name:
        monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


@pytest.fixture
def compared(command, tmp_path):
    """compared(folders, flags...) → (its Result, the Page, report.md)."""

    def compared(*argv):
        out = tmp_path / "report"
        result = command("compare", *argv, "--output_dir", out)
        assert result.code in (0, 1), result.err
        return result, Page((out / "report.html").read_text("utf-8")), (out / "report.md").read_text("utf-8")

    return compared


def column(page, table, header):
    """{name of the line: its cell} of a table's column."""
    head, *lines = page.tables[table]
    assert all(len(line) == len(head) for line in lines)
    return {line[0]: line[head.index(header)] for line in lines}


# ---------------------------------------------------------------------------------------------------------------------
# intervals


def test_t95_is_the_quantile_of_students_t():
    """The density's integral from -t to t, by the trapezoid rule, is 0.95."""
    for freedom in (1, 2, 3, 4, 7, 30, 1000):
        t = np.linspace(0, intervals.t95(freedom), 200_001)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        inside = 2 * np.trapezoid(scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t)
        assert inside == pytest.approx(0.95, abs=5e-5)  # t to 0.001


def test_a_difference_by_hand():
    """Three seeds: differences 0.1, 0.2 and 0.6 in both windows: mean 0.3, deviation 0.26458, error 0.15275."""
    theirs = [scores([1.0, 2.0]), scores([1.1, 2.1]), scores([0.9, 1.9])]
    ours = [scores([1.1, 2.1]), scores([1.3, 2.3]), scores([1.5, 2.5])]
    d = intervals.difference(ours, theirs)
    assert (d["mean"], d["seeds"], d["windows"]) == pytest.approx((0.3, 0.0700**0.5 / 3**0.5, 0), abs=1e-9)
    assert d["reach"] == pytest.approx(4.3027 * 0.152753, rel=1e-5) and d["of"] == "3 seeds"
    assert d["relative"] == pytest.approx(0.3 / ((1.0 * 100 + 2.0 * 300) / 400))
    one = intervals.difference([scores([1.1, 2.0])], [scores([1.0, 2.0])])
    # ratio 10 bits / 400 bytes = 0.025; residuals 10 - 2.5 and 0 - 7.5; error sqrt(2 · 112.5) / 400
    assert (one["mean"], one["windows"], one["seeds"]) == pytest.approx((0.025, 15 / 400, None))
    assert one["reach"] == pytest.approx(12.7062 * 15 / 400) and one["of"] == "2 windows"
    assert intervals.difference([scores([1.1], [100])], [scores([1.0], [100])])["reach"] == math.inf


def test_what_cannot_be_averaged_or_paired_says_so():
    a, other = scores([1.0, 2.0]), scores([1.0, 2.0], (100, 301))
    with pytest.raises(ValueError, match="different windows"):
        intervals.difference([a, other], [a, other])
    empty = {k: v for k, v in a.items() if k != "per_window"}
    with pytest.raises(ValueError, match="per_window"):
        intervals.difference([empty], [empty])  # two older eval.json
    assert evaluate.paired is intervals.paired and evaluate.ratio is intervals.ratio  # one copy


def test_the_mean_of_seeds_by_window_differs_from_one_seed():
    """Window errors of the mean over seeds: the seeds' opposite noise cancels in every window."""
    theirs = [scores([1.0, 2.0]), scores([1.0, 2.0])]
    ours = [scores([1.3, 2.0]), scores([0.9, 2.2])]  # mean 1.1, 2.1: 0.1 everywhere
    d = intervals.difference(ours, theirs)
    assert d["mean"] == pytest.approx(0.1) and d["windows"] == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# tables


def test_a_run_in_numbers(make, compared):
    folder = make("one", scores([1.0, 2.0]))
    result, page, text = compared(folder)
    assert result.code == 0 and not result.err and "wrote" in result.out
    head, line = page.tables["Runs"]
    cells = dict(zip(head, line, strict=True))
    assert cells == {
        "run": "one", "kind": "transformer", "parameters": "1,000,000",
        "training tokens": "51,200",  # 100 steps of 8 rows of 64
        "epochs": "4.00", "training FLOPs": "2.7e+08",  # up to the scored step, 90
        "best validation, bits/byte": "0.9000", "bits/byte": "1.7500 ± 0.0123", "likelihood": "bound (16 masks)",
        "scored step": "90", "bits/character": "4.3750", "tokens/s": "256", "training, s": "200",
        "peak memory, GiB": "0.10",
    }  # fmt: skip
    assert list(page.tables) == ["Runs"] and "| one | transformer | 1,000,000 | 51,200 |" in text
    assert "Matched twins" in text


def test_optional_figures_and_columns(make, compared):
    chain = {name: {"windows": 7, "bits_per_byte": {"mean": m, "standard_error": 0.01}}
             for name, m in (("left_to_right", 0.8), ("own_order", 0.7))}  # fmt: skip
    quality = dict(judge="gpt/best.pt", n=5, judge_nats_per_token={"mean": 3.25, "standard_error": 0.125},
                   unigram_entropy=5.5, distinct_1=0.1, distinct_2=0.2, distinct_3=0.3, repeated_4grams=0.4,
                   invalid_aksharas=0.0, invalid_utf8=0)  # fmt: skip
    exact = dict(likelihood="exact", masks=0)
    runs = [make("a", scores([1, 1], chain_rule=chain, samples=quality)), make("b", scores([1, 1], **exact), kind="g")]
    _, page, _ = compared(*runs)
    cells = {h: column(page, "Runs", h) for h in page.tables["Runs"][0]}
    assert cells["likelihood"] == {"a": "bound (16 masks)", "b": "exact"}
    for header, value in {
        "chain rule left to right, bits/byte": "0.8000 ± 0.0100", "windows of the chain rule": "7",
        "chain rule in its own order, bits/byte": "0.7000 ± 0.0100", "judge": "gpt/best.pt",
        "judged, nats/token": "3.250 ± 0.125", "unigram entropy": "5.500", "distinct 1": "0.100",
        "distinct 2": "0.200", "distinct 3": "0.300", "repeated 4-grams": "0.400", "invalid aksharas": "0.0000",
        "invalid UTF-8": "0.0000",
    }.items():  # fmt: skip
        assert cells[header] == {"a": value, "b": "–"}


def test_a_run_that_has_only_begun(make, compared):
    old = {k: v for k, v in CONFIG.items() if k not in ("operations_a_step", "train_tokens")}
    begun, nothing = make("begun", records=[]), make("nothing")
    (nothing / "metrics.jsonl").unlink()
    (begun / "config.json").write_text(json.dumps(old))
    _, page, text = compared(begun, nothing)
    assert page.tables["Runs"] == [
        ["run", "kind", "parameters"], *([n, "transformer", "1,000,000"] for n in ("begun", "nothing"))
    ]  # fmt: skip
    assert not page.charts and "| begun | transformer | 1,000,000 |" in text


def test_what_is_not_finite_or_missing_is_a_dash(make, compared):
    """NaN, null and text in the place of a number break nothing."""
    records = [*metrics(), dict(step=110, loss=None, bits_per_byte=None), dict(step=None, loss=3.0, seconds=None)]
    bad = scores([1.0, 2.0], bits_per_byte={"mean": float("nan"), "standard_error": None}, by_hidden_fraction=None)
    rows = [{"from": 0, "to": 0.1, "n": 0, "nats_per_token": None, "standard_error": None}, None]
    runs = make("bad", bad, records), make("empty", {}), make("good", scores([1, 1], by_hidden_fraction=rows))
    _, page, _ = compared(*runs)
    assert column(page, "Runs", "bits/byte") == {"bad": "–", "empty": "–", "good": "1.0000 ± 0.0123"}
    assert column(page, "Runs", "training tokens")["bad"] == f"{110 * 512:,}"
    assert "NaN" not in page.scripts[1][1] and not any("hidden" in name for name in page.charts)


def test_groups_over_seeds(make, compared):
    """0.8, 0.9 and 1.3: mean 1, deviation 0.26458, error 0.15275; the commit and the machine do not split a group."""
    runs = [make(f"t_s{s}", scores([b, b]), metrics(bits=b), seed=s, git_commit=str(s) * 40, device="cpu", threads=s)
            for s, b in ((1, 0.8), (2, 0.9), (3, 1.3))]  # fmt: skip
    runs += [make("h_s1", scores([0.7, 0.7]), kind="eco"), make("h_s2", None, metrics(bits=0.6), kind="eco", seed=2)]
    _, page, _ = compared(*runs)
    assert column(page, "Groups over seeds", "seeds") == {"t_s{1,2,3}": "1, 2, 3", "h_s{1,2}": "1, 2"}
    assert column(page, "Groups over seeds", "bits/byte") == {"t_s{1,2,3}": "1.0000 ± 0.1528", "h_s{1,2}": "0.7000"}
    best = column(page, "Groups over seeds", "best validation, bits/byte")
    assert best == {"t_s{1,2,3}": "1.0000 ± 0.1528", "h_s{1,2}": "0.7500 ± 0.1500"}
    assert column(page, "Groups over seeds", "parameters")["t_s{1,2,3}"] == "1,000,000"
    _, line = page.tables["Paired differences"]
    assert line[:4] == ["h_s{1,2} − t_s{1,2,3}", "1", "-0.1000", "-12.50%"] and line[-1] == "2 windows"


def test_a_value_that_some_of_a_group_lack_says_of_how_many(make):
    runs = [make(f"s{s}", scores([b, b]) if b else None, seed=s) for s, b in ((1, 0.8), (2, 1.0), (3, 0))]
    (group,) = compare.group(compare.read_runs(runs))
    assert compare.over_seeds(group, "scores bits_per_byte", ".4f") == "0.9000 ± 0.1000 (2 of 3)"


def test_what_differs_is_another_group(make):
    fields = (dict(seed=1), dict(seed=2), dict(seed=3, lr=0.1), dict(seed=1), dict(seed=4, window=0))
    runs = compare.read_runs([make(f"run{i}", **more) for i, more in enumerate(fields)])
    groups = [[run["name"] for run in g.values()] for g in compare.group(runs)]
    assert groups == [["run0", "run1"], ["run2"], ["run3"], ["run4"]]  # run3 is run0 once more
    assert [compare.label(g) for g in compare.group(runs)] == ["run{0,1}", "run2", "run3", "run4"]


def test_paired_differences_in_the_report(make, compared):
    """Seeds 1 and 2: differences -0.1 and -0.3 in every window: mean -0.2, error 0.1, t of one degree of freedom."""
    base = [make(f"a{s}", scores([1.0, 2.0]), seed=s) for s in (1, 2, 3)]
    other = [make(f"b{s}", scores([1.0 - d, 2.0 - d]), kind="eco", seed=s) for s, d in ((2, 0.3), (1, 0.1))]
    apart = make("c", scores([1.0, 2.0], masks=4), kind="g", seed=9)
    exact = make("d", scores([0.5, 1.5], masks=0, likelihood="exact", seed=7), kind="h", seed=8)
    result, page, text = compared(*base, *other, apart, exact)
    lines = {line[0]: line[1:] for line in page.tables["Paired differences"][1:]}
    assert lines["b{2,1} − a{1,2,3}"] == [
        "2, 1", "-0.2000", f"{-0.2 / 1.75:+.2%}", "0.0000", "0.1000", "-1.4706 to +1.0706", "2 seeds"
    ]  # fmt: skip
    assert lines["d − a{1,2,3}"] == ["8 with 1", "-0.5000", "-28.57%", "0.0000", "–", "-0.5000 to -0.5000", "2 windows"]
    assert lines["c − a{1,2,3}"][1:-1] == ["–"] * 5 and "masks 4 and 16" in lines["c − a{1,2,3}"][-1]
    assert len(lines) == 6 and "-0.5000 to -0.5000" in page.marked and "-1.4706 to +1.0706" not in page.marked
    assert "**-0.5000 to -0.5000**" in text and "| -1.4706 to +1.0706 |" in text
    many = [make(f"m{i}", scores([1.0, 2.0]), dropout=i / 10) for i in range(compare.EACH + 1)]
    _, page, _ = compared(*many)
    assert [line[0] for line in page.tables["Paired differences"][1:]] == [
        f"m{i} − m0" for i in range(1, compare.EACH + 1)
    ]


def test_the_report_agrees_with_evaluate(make, compared, capsys):
    g = np.random.default_rng(0)
    n_bytes = g.integers(50, 90, 20).tolist()
    made = {name: [scores(g.uniform(0.5, 1.5, 20), n_bytes) for _ in range(3)] for name in "ab"}
    evaluate.compare(made["a"], made["b"])
    mean, error = re.search(r"mean (\S+) ± (\S+) over 3 pairs", capsys.readouterr().out).groups()
    runs = [make(f"{name}{s}", made[name][s], kind=name, seed=s) for name in "ba" for s in range(3)]
    _, page, _ = compared(*runs)
    assert page.tables["Paired differences"][1][2] == mean and page.tables["Paired differences"][1][5] == error


def test_settings_that_differ(make, compared):
    runs = make("a", grad_clip=1, extra=None), make("b", lr=0.002, git_commit="d" * 40, torch="2.14.0", memory_slots=32)
    result, page, text = compared(*runs)
    head, *lines = page.tables["Settings that differ"]
    assert head == ["setting", "a", "b"] and sorted(lines) == [  # 1 and 1.0 are the same, null and nothing too
        ["git_commit", "c" * 12, "d" * 12], ["lr", "0.004", "0.002"], ["memory_slots", "–", "32"],
        ["torch", "2.13.0", "2.14.0"],
    ]  # fmt: skip
    assert sorted(page.marked) == ["0.002", "2.14.0", "32", "d" * 12] and "| lr | 0.004 | **0.002** |" in text
    assert "lr: 0.004 in a; 0.002 in b\n" in result.out and "output_dir" not in result.out + text


# ---------------------------------------------------------------------------------------------------------------------
# twins


def test_matched_twins(make, compared):
    """What may differ: sizes, masks, machine, and each kind's dropout and weight decay."""
    a = [make(f"a{s}", scores([1, 1]), seed=s) for s in (1, 2)]
    b = [
        make(
            f"b{s}",
            scores([1, 1], masks=0, likelihood="exact"),
            seed=s,
            kind="eco",
            dropout=0.2,
            weight_decay=0.3,
            parameters=1_010_000,
            d_ff=9,
            loss_weight="elbo",
            device="cuda",
            log_interval=3,
            git_commit="",
        )
        for s in (2, 1)
    ]
    result, _, text = compared(*a, *b, "--check_fair")
    assert result.code == 0 and "Matched twins" in text and "Not matched" not in result.out


@pytest.mark.parametrize(
    "field, value",
    [
        *dict(data_sha256="e" * 64, tokenizer_sha256="e" * 64, seq_len=128, rows_a_step=4, max_steps=200, lr=0.1,
              lr_schedule="cosine", warmup=0.1, decay=0.1, optimizer="adamw", beta2=0.9, grad_clip=0.5, ema=0.0,
              precision="torch.bfloat16", parameters=1_010_001, seed=2).items(),
        ("dropout of eco", 0.3),
        ("weight_decay of eco", 0.3),
    ],
)  # fmt: skip
def test_twins_that_are_none(make, compared, field, value):
    name, within = field.split(" ")[0], " of " in field
    runs = [make("a"), make("b", kind="eco", **({} if within else {name: value}))]
    runs += [make("c", kind="eco", **{name: value})] if within else []
    result, _, text = compared(*runs, "--check_fair")
    found = re.findall(r"([a-z]\w+(?: of eco)?) \(", result.error())
    follows = {"rows_a_step": ["tokens_a_step"], "seq_len": ["seq_len", "tokens_a_step"]}
    assert result.code == 1 and found == follows.get(field, [field]) and "Not matched twins: " in text
    assert compared(*runs)[0].code == 0  # without the flag it is only said


@pytest.mark.parametrize("field, value", dict(data_sha256="e" * 64, split="train", windows=1, ema=False).items())
def test_twins_scored_otherwise(make, compared, field, value):
    runs = make("a", scores([1, 1])), make("b", scores([1, 1], **{field: value}), kind="eco"), make("c", kind="g")
    result, _, _ = compared(*runs, "--check_fair")  # c is not scored yet, which is no difference
    assert result.code == 1 and f"not matched twins: {field} in eval.json (" in result.error()


def test_a_stopped_twin_and_missing_seeds_are_named(make, compared):
    runs = make("a_s1"), make("a_s2", seed=2), make("b_s1", records=metrics(60), kind="eco")
    result, _, _ = compared(*runs, "--check_fair")
    assert result.error() == (
        "error: not matched twins: steps_done (100 in a_s1, a_s2; 60 in b_s1); seed (1, 2 in a_s{1,2}; 1 in b_s1); "
        "train and score them alike"
    )


# ---------------------------------------------------------------------------------------------------------------------
# curves


def test_curves_by_hand(make, compared):
    bins = [{"from": 0.0, "to": 0.1, "n": 3, "nats_per_token": 2.0, "standard_error": 0.5},
            {"from": 0.1, "to": 0.2, "n": 1, "nats_per_token": 3.0, "standard_error": None}]  # fmt: skip
    sure = [{"from": 0.0, "to": 0.5, "n": 2, "confidence": 0.25, "accuracy": 0.125}]
    late = [*metrics(), dict(step=150, bits_per_byte=0.5)]
    runs = [make("a", scores([1, 1], by_hidden_fraction=bins, reliability=sure)), make("b", records=late, seed=2),
            make("c", kind="eco", operations_a_step=None)]  # fmt: skip
    _, page, _ = compared(*runs)
    xs = {
        name.split(": ")[1]: [d["x"] for d in figure["data"]] for name, figure in page.charts.items() if "Valid" in name
    }
    assert xs["training tokens"] == [[45 * 512, 100 * 512], [45 * 512, 100 * 512, 150 * 512], [45 * 512, 100 * 512]]
    assert xs["training FLOPs"] == [[135e6, 300e6], [135e6, 300e6, 450e6]]  # c does not know them
    assert xs["seconds of training"] == [[90, 200], [90, 200, 300], [90, 200]]  # between lines, and behind the last
    valid = page.charts["Validation: training tokens"]["data"]
    assert valid[1]["y"] == pytest.approx([0.955, 0.9, 0.5]) and [d["name"] for d in valid] == ["a", "b", "c"]
    lines = [(d["line"]["color"], d["line"]["dash"]) for d in valid]
    assert lines[0][0] == lines[1][0] != lines[2][0] and lines[0][1] != lines[1][1]  # a and b are seeds of one group
    loss = page.charts["Training loss (faint) and its running mean: training tokens"]["data"]
    assert loss[1]["x"] == [512 * s for s in range(10, 101, 10)] and loss[1]["y"][-1] == 6
    hidden = page.charts["Cross-entropy by hidden fraction (± SE): hidden fraction"]["data"][0]
    assert hidden["x"] == pytest.approx([0.05, 0.15]) and hidden["y"] == [2, 3]
    assert hidden["error_y"]["array"] == [0.5, None] and hidden["error_y"]["visible"]
    assert page.charts["Reliability: confidence"]["data"][0]["y"] == [0.125]


def test_the_frontier(make, compared, tmp_path):
    def point(strategy, forwards, nats, **more):
        quality = {"judge_nats_per_token": {"mean": nats, "standard_error": 0.1}}
        return dict(strategy=strategy, forwards=forwards, seconds=(forwards or 0) / 4, quality=quality) | more

    rows = [point("confidence", 32.0, 3.0), point("random", 8.0, 5.0), point("confidence", 8.0, 4.0),
            point("text", None, 2.5, reference=True), dict(strategy="broken", quality=None)]  # fmt: skip
    folder = make("a")
    (folder / "benchmark_sample.json").write_text(json.dumps({"rows": rows}))
    _, page, _ = compared(folder)
    figure = page.charts["Samples: quality against forwards (± SE): forwards"]
    assert [(d["name"], d["x"], d["y"]) for d in figure["data"]] == [
        ("confidence", [8, 32], [4, 3]), ("random", [8], [5])
    ]  # fmt: skip
    assert [s["y0"] for s in figure["layout"]["shapes"]] == [2.5]
    assert page.charts["Samples: quality against seconds (± SE): seconds"]["data"][0]["x"] == [2, 8]
    (tmp_path / "more.json").write_text(json.dumps({"rows": rows[1:2]}))
    _, page, _ = compared(folder, "--benchmark", tmp_path / "more.json")
    names = [d["name"] for d in page.charts["Samples: quality against forwards (± SE): forwards"]["data"]]
    assert names == ["confidence, a", "random, a", f"random, {tmp_path / 'more.json'}"]


def test_every_chart_is_one_of_plotlys(make, compared):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    _, page, _ = compared(make("a", scores([1, 1])), make("b", kind="eco"))
    assert len(page.charts) == 4
    for figure in page.charts.values():
        graph_objects.Figure(figure)  # refuses what is no property of a trace or a layout


# ---------------------------------------------------------------------------------------------------------------------
# the page


def test_answers_to_questions_stand_beside_the_likelihood(make, compared):
    """And a run that was only asked questions has no likelihood that could differ."""
    figures = [dict(n=n, right=k, mean=k / n, low=low, high=high) for n, k, low, high in (
        (40, 10, 0.1419, 0.4019), (40, 1, 0.0044, 0.1288), (40, 20, 0.352, 0.648))]  # fmt: skip
    a = make("a", scores([1, 1], qa=dict(accuracy=figures[0], majority=figures[1])), seed=1)
    b = make("b", dict(step=90, ema=True, qa=dict(accuracy=figures[2], majority=figures[1])), seed=2)
    result, page, _ = compared(a, b)
    assert result.code == 0 and "data_sha256 in eval.json" not in result.out
    for header, cells in {
        "questions": ("40", "40"),
        "questions right": ("0.250", "0.500"),
        "questions right, 95 % interval": ("0.142 to 0.402", "0.352 to 0.648"),
        "one constant answer right": ("0.025", "0.025"),
    }.items():
        assert column(page, "Runs", header) == dict(zip("ab", cells, strict=True))
    assert column(page, "Runs", "bits/byte")["b"] == "–"
    assert [*column(page, "Groups over seeds", "questions right").values()] == ["0.375 ± 0.125"]
    page = compared(a, make("c", dict(qa=dict(accuracy=figures[2])), lr=1.0))[1]
    assert page.tables["Paired differences"][1][-1] == "not evaluated yet"


def test_samples_side_by_side(make, compared):
    first, last = ([f"{p} {word}" for p in config.PROMPTS] for word in ("पहले", "बाद में"))
    a = make("a", records=metrics(more=[dict(step=50, samples=first), dict(step=100, samples=last)]))
    b = make("b", records=metrics(more=[dict(step=90, samples=[NASTY])]), kind="eco")
    _, page, text = compared(a, b, make("c", kind="g"))
    head, *lines = page.tables["Samples"]
    assert head == ["prompt", "a, step 100", "b, step 90"] and [line[0] for line in lines] == list(config.PROMPTS)
    assert [line[1] for line in lines] == last and [line[2] for line in lines] == [NASTY, "–", "–", "–"]
    assert "पहले" not in text and "बाद में" in text


def test_names_and_texts_are_inert(make, compared):
    """No tag, no script, no markup comes from a name, a field or a sample, in the page, in Plotly or in Markdown."""
    folder = make("evil<b>&lt;x|*y*", scores([1, 1]), metrics(more=[dict(step=1, samples=[NASTY])]), kind=NASTY)
    plain = make("plain", scores([1, 1]), metrics(more=[dict(step=1, samples=["x"])]))
    result, page, text = compared(folder, plain)
    name, ordinary = folder.name, compared(plain)[1]
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in ordinary.tags} and not any(
        tag == "b" for tag, _ in page.tags
    )
    assert len(page.scripts) == len(ordinary.scripts) == 3
    assert page.tables["Runs"][1][:2] == [name, NASTY] and page.tables["Samples"][1][1] == NASTY
    assert {d["name"] for f in page.charts.values() for d in f["data"]} >= {"evil&lt;b&gt;&amp;lt;x|*y*"}
    assert "<" not in page.scripts[1][1] and "<" not in text.replace("<br>", "")
    figure = report.chart(NASTY, "x", "y", [("name", report.style(0), [(1, 2)], {})])
    alone = Page(report.to_page("title", "text", [], [figure]))  # the data of a chart cannot end its script
    assert len(alone.scripts) == 3 and alone.charts.popitem()[1]["layout"]["title"]["text"] == NASTY
    rows = [line for line in text.splitlines() if line.startswith("| evil")]
    assert rows and all(re.sub(r"\\.", "", row).count("|") == len(page.tables["Runs"][0]) + 1 for row in rows[:1])


def test_the_page_asks_nobody(make, compared):
    """Nothing in it names another place, and its own policy forbids to ask."""
    _, page, _ = compared(make("a", scores([1, 1])))
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "a", "base") and not attrs.keys() & {
            "src",
            "href",
            "onclick",
        }
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == allowed["form-action"] == "'none'" and "connect-src" not in allowed
    assert 'showSendToCloud: false, plotlyServerURL: ""' in page.scripts[2][1]  # Plotly's button that uploads a chart
    assert not re.search(r"https?:|\*|'self'", policy) and len(page.scripts[0][1]) > 1_000_000  # plotly.js itself
    assert "Plotly.newPlot" in page.scripts[2][1] and "prefers-color-scheme" in page.scripts[2][1]


def test_one_bad_character_does_not_stop_a_report(make, compared):
    half = make("half", records=[])
    (half / "metrics.jsonl").write_text('{"step": 1, "samples": ["\\ud800 half"]}\n')
    _, page, _ = compared(half)
    assert page.tables["Samples"][1] == ["1", "? half"]


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_names_that_are_alike_stay_apart(make):
    runs = [make("x/run"), make("y/run"), make("y/other"), make("run")]
    names = [run["name"] for run in compare.read_runs(runs)]
    assert names == ["x/run", "y/run", "other", f"{runs[3].parent.name}/run"] and len(set(names)) == 4


def test_what_is_missing_is_a_wrong_command(command, make, tmp_path):
    good = make("good")
    (tmp_path / "hollow").mkdir()
    for argv, why in (
        ([], "--help"),
        ([good, "--bogus", "1"], "--help"),
        ([tmp_path / "none"], "there is no run folder"),
        ([tmp_path / "hollow"], "no config.json in it"),
        ([good, good], "is given twice"),
        ([good, f"{good}/../good"], "is given twice"),
        ([good, "--benchmark", tmp_path / "none.json"], "none.json"),
        ([good, "--benchmark", good / "config.json"], "holds no rows"),
        ([good, "--output_dir", good / "config.json"], "exists"),
    ):
        result = command("compare", *argv)
        assert result.code == 2 and why in result.error()
    assert not list(tmp_path.glob("**/report.*"))


@pytest.mark.parametrize("file", ["config.json", "eval.json", "benchmark_sample.json"])
@pytest.mark.parametrize("content", [b'{"lr": 0.1', b"\xff\xfe", b"[1, 2]", b""])
def test_a_damaged_file_is_named(command, make, file, content):
    folder = make("a", scores([1, 1]))
    (folder / file).write_bytes(content)
    result = command("compare", folder, "--output_dir", folder / "out")
    assert result.code == 1 and f"a/{file} is damaged" in result.error() and not (folder / "out").exists()


def test_a_torn_last_line_is_passed_over_another_is_not(command, make, compared):
    folder = make("a")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"step": 110, "lo')
    _, page, _ = compared(folder)
    assert column(page, "Runs", "training tokens") == {"a": "51,200"}
    (folder / "metrics.jsonl").write_text('{"step": 110, "lo\n' + text + '{"st')
    result = command("compare", folder)
    assert result.code == 1 and "metrics.jsonl is damaged" in result.error()


def test_without_plotly_the_install_line(command, make, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = command("compare", make("a"), "--output_dir", tmp_path / "out")
    pinned = re.search(r"^plotly==.*$", (ROOT / "requirements-app.txt").read_text(), re.M)[0]
    assert result.code == 2 and f"pip install {pinned}" in result.error() and not (tmp_path / "out").exists()


def test_it_starts_without_torch(make, tmp_path):
    folder = make("a", scores([1, 1]))
    code = "import sys, config, compare; compare.main(); assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    argv = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(argv, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "report.html").exists() and (tmp_path / "report.md").exists(), (
        done.stderr
    )


def test_a_real_run(trained, compared):
    _, page, _ = compared(trained)
    cells = dict(zip(*page.tables["Runs"], strict=True))
    written = json.loads((trained / "config.json").read_text())
    assert cells["training tokens"] == f"{12 * 8 * 32:,}" and float(cells["epochs"]) > 0
    assert cells["parameters"] == f"{written['parameters']:,}" and len(page.charts) == 4
    rates = [r["seconds"]["tokens_a_second"] for r in compare.read_metrics(trained) if "loss" in r]
    assert cells["tokens/s"] == f"{statistics.median(rates):,.0f}"
    assert report.COLORS and set(compare.ASIDE) - {"device"} <= written.keys()

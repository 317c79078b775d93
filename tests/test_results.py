"""results.py: the page says what the files say, with means and intervals computed here by hand."""

import json
import re

import pytest

import results

SIZES = [100, 300]  # bytes of two windows


def make_run(root, kind, epochs, seed, bits):
    """A finished run of 10 · epochs steps; half of its tokens were guessed right if it is a denoiser, else a fifth."""
    folder = root / f"{kind}_{epochs}_{seed}"
    folder.mkdir(parents=True)
    config = dict(kind=kind, seed=seed, parameters=1000, rows_a_step=2, seq_len=8, train_tokens=160, torch="2.13.0",
                  device="cpu", precision="torch.float32", operations_a_step=5.0)  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    clock = {"training": 10.0 * epochs, "tokens_a_second": 16.0 + seed, "peak_bytes": 2**30}
    lines = [dict(step=10 * epochs, loss=1.0, seconds=clock), dict(step=10 * epochs, bits_per_byte=bits)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    right = 0.5 if kind == "transformer" else 0.2
    curve = [dict(n=30, accuracy=right + 0.1, confidence=0.9), dict(n=10, accuracy=right - 0.3, confidence=0.1)]
    scores = dict(bits_per_byte=dict(mean=bits, standard_error=0.01), step=10 * epochs, masks=4, likelihood="bound",
                  reliability=curve, calibration_error=0.05)  # fmt: skip
    if kind == "transformer":
        exact = dict(windows=2, bits_per_byte=dict(mean=bits - 0.02, standard_error=0.01))
        scores["chain_rule"] = dict(left_to_right=exact)
    (folder / "eval.json").write_text(json.dumps(scores))
    return dict(kind=kind, seed=seed, output_dir=str(folder), status="done", max_steps=10 * epochs,
                varied=dict(epochs=epochs, dropout=0.1, weight_decay=0.3), flags=dict(data_dir="data/x"))  # fmt: skip


def budget(epochs, each):
    mean = sum(each) / len(each)
    return dict(epochs=epochs, steps=10 * epochs, seeds=[1, 2], bits_per_byte=mean, standard_error=0.004, each=each,
                best_step=5 * epochs, operations=50.0 * epochs, operations_to_best=25.0 * epochs)  # fmt: skip


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "crossover"
    bits = {("transformer", 2): (1.0, 1.2), ("transformer", 4): (0.9, 0.7), ("autoregressive", 2): (0.85, 0.95),
            ("autoregressive", 4): (0.99, 0.97)}  # fmt: skip
    runs = [make_run(root, k, e, s, b) for (k, e), each in bits.items() for s, b in zip((1, 2), each, strict=True)]
    budgets = {k: [budget(e, list(bits[k, e])) for e in (2, 4)] for k in ("transformer", "autoregressive")}
    so_far = [dict(epochs=2, each=[0.15, 0.25]), dict(epochs=4, each=[0.05, -0.25])]
    found = dict(verdict="diffusion overtakes its twin at 4 epochs", budgets=budgets, best_so_far=so_far)
    (root / "crossover.json").write_text(json.dumps(found))
    (root / "experiment_plan.json").write_text(json.dumps(dict(runs=runs)))
    (root / "crossover.png").write_bytes(b"png")
    return root


def way(strategy, seconds, nats, **more):
    quality = dict(judge_nats_per_token=dict(mean=nats, standard_error=0.1), unigram_entropy=5.0, distinct_2=0.9,
                   repeated_4grams=0.01, invalid_aksharas=0.002)  # fmt: skip
    return (
        dict(strategy=strategy, label="8 steps", forwards=8, seconds=seconds, quality=quality, reference=False) | more
    )


@pytest.fixture
def frontier(tmp_path):
    rows = [way("twin, KV cache", 0.6, 4.0, reference=True), way("random", 2.0, 5.0, reference=True),
            way("dilated", 0.25, 5.1)]  # fmt: skip
    best = dict(strategy="dilated", label="8 steps", times_the_reference=8.0, times_the_twin=2.4, goal=8.0)
    config = dict(samples=2, prompt_tokens=4, new_tokens=8, temperature=1.0, block=4)
    figures = dict(rows=rows, real_text=way("", 0, 3.5)["quality"], verdict=best, drift=dict(mean=0.001, most=0.02),
                   config=config, machine=dict(device="cpu (AVX2)", threads=1))  # fmt: skip
    path = tmp_path / "benchmark_sample.json"
    path.write_text(json.dumps(figures))
    return path


def cells(page, start):
    """The cells of the table row that begins with `start`."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page(command, root, frontier, tmp_path):
    commands = tmp_path / "commands.txt"
    commands.write_text("make results\n")
    out = tmp_path / "docs" / "results.md"
    out.parent.mkdir()
    result = command("results", "--crossover", root, "--frontier", frontier, "--commands", commands, "--output", out)
    assert result.code == 0, result.err
    page = out.read_text("utf-8")
    assert "    make results\n" in page and (out.parent / "crossover.png").read_bytes() == b"png"
    # the budgets: the difference's 95 % interval of two seeds reaches 12.706 standard errors
    assert cells(page, "2")[1:5] == ["100", "1.1000 ± 0.0040", "0.9000 ± 0.0040", "50%"]
    assert cells(page, "2")[-1] == "+0.2000 (-0.4353 to +0.8353)"
    assert cells(page, "4")[-1] == "-0.1000 (-2.0059 to +1.8059)"
    assert "**Diffusion overtakes its twin at 4 epochs.**" in page
    assert page.count("dropout 0.1, weight_decay 0.3") == 2
    # the twins at their best: diffusion 4 epochs, 0.9 and 0.7, the twin 2 epochs
    assert "| diffusion, 4 epochs | twin, 2 epochs |" in page
    assert cells(page, "bits/byte of the validation text")[1:] == ["0.8000 ± 0.1000", "0.9000 ± 0.0500"]
    assert cells(page, "exact, chain rule from left to right")[1:] == ["0.7800 ± 0.1000", results.DASH]
    assert cells(page, "tokens guessed right")[1:] == ["0.500", "0.200"]  # (30 · 0.6 + 10 · 0.2) / 40
    assert cells(page, "training of the whole budget, s")[1:] == ["40", "20"]
    assert cells(page, "tokens/s in training")[1:] == ["18 ± 0", "18 ± 0"]
    # ways of writing, claims
    assert cells(page, "dilated")[2:5] == ["8", "0.250", "5.100 ± 0.100"]
    assert "8.0 times its speed (asked: 8), 2.40 times that of the twin" in page
    assert cells(page, "accuracy: 75 % against 25 %")[-1] == "confirmed"
    assert cells(page, "faster in total time")[-1] == cells(page, "less memory")[-1] == "level"
    assert re.search(r"\| 0\.25 \(one token a forward: 2\.00\) \| 0\.60 \| confirmed for dilated", page)


def test_without_a_frontier(command, root, tmp_path):
    out = tmp_path / "results.md"
    assert command("results", "--crossover", root, "--output", out).code == 0
    page = out.read_text("utf-8")
    assert "## 3. What earlier projects claimed" in page and "Ways of writing" not in page


def test_wrong_commands(command, root, tmp_path):
    result = command("results", "--crossover", tmp_path / "none")
    assert result.code == 2 and "crossover.json" in result.error()
    result = command("results", "--crossover", root, "--frontier", tmp_path / "none.json", "--output", tmp_path / "x")
    assert result.code == 2 and not (tmp_path / "x").exists()
    (root / "crossover.json").write_text("{")
    result = command("results", "--crossover", root, "--output", tmp_path / "x")
    assert result.code == 1 and "damaged" in result.error()

"""speedrun.py: when the clock stops, what stays fixed, and a race of two steps."""

import json

import pytest

import benchmark
import speedrun
from config import EcoHybridConfig, MaskConfig, TrainConfig, TransformerConfig, VariantConfig, parse
from machine import script_argv

LINES = [
    dict(step=1, loss=6.0, seconds=dict(training=1.5)),
    dict(step=2, loss=5.0, seconds=dict(training=2.5)),
    dict(step=2, bits_per_byte=0.981, seconds=dict(validation=40.0)),
    dict(step=3, loss=4.0, seconds=dict(training=3.25)),
    dict(step=3, bits_per_byte=0.98, seconds=dict(validation=40.0)),
    dict(step=4, loss=4.0, seconds=dict(training=9.0)),
    dict(step=4, bits_per_byte=0.97, seconds=dict(validation=40.0)),
]


def test_the_clock_stops_at_the_first_validation_within_the_goal():
    assert speedrun.reached(LINES) == (3.25, 3, 0.98)  # without the 80 seconds of validation
    below = [
        *LINES[:4],
        LINES[4] | dict(bits_per_byte=0.978),
    ]  # two thirds of the way from 0.981 to 0.978 were too much
    assert speedrun.reached(below) == (pytest.approx(2.5 + 0.75 / 3), 3, 0.978)
    assert speedrun.reached(LINES[:4]) is None
    assert speedrun.reached([LINES[0], dict(step=1, bits_per_byte=0.9, seconds=dict(validation=1.0))]) == (1.5, 1, 0.9)
    assert speedrun.reached([dict(step=1, bits_per_byte=None, seconds=dict(validation=1.0))]) is None


@pytest.mark.parametrize("name", speedrun.RECORDS)
def test_a_record_s_flags_exist_and_leave_the_evaluation_alone(name):
    script, of_data, of_run = speedrun.RECORDS[name]
    assert not set(of_run) & set(speedrun.FIXED) and set(of_data) <= {"tokenizer", "vocab_size"}
    argv = script_argv(script, speedrun.FIXED | of_run)[2:]
    sizes = {"variants.py": VariantConfig, "train_eco_hybrid.py": EcoHybridConfig}.get(script, TransformerConfig)
    _, _, run = parse("", MaskConfig, sizes, TrainConfig, argv=argv)
    assert (run.seq_len, run.eval_masks, run.eval_windows) == (128, 16, 0)
    assert 0 < run.eval_interval <= run.max_steps  # the trainer validates at its end too


def test_a_race_of_two_steps(monkeypatch, tmp_path, capsys):
    record = ("train_diffusion.py", dict(vocab_size=400), dict(max_steps=2, eval_interval=1, d_model=32, n_layers=1))
    monkeypatch.setitem(speedrun.RECORDS, "short", record)
    monkeypatch.setattr(speedrun, "GOAL", 99.0)
    monkeypatch.setitem(speedrun.FIXED, "eval_masks", 1)
    argv = ["benchmark.py", "speedrun", "--seeds", "2", "--seed", "3", "--threads", "1", "--root", str(tmp_path),
            "--output", str(tmp_path / "figures.json")]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    benchmark.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["record"] == "short" and [(r["seed"], r["step"]) for r in figures["runs"]] == [(3, 1), (4, 1)]
    for row in figures["runs"]:
        lines = [json.loads(s) for s in open(tmp_path / f"short_seed{row['seed']}" / "metrics.jsonl")]
        assert row["seconds"] == lines[0]["seconds"]["training"] and row["bits_per_byte"] == lines[1]["bits_per_byte"]
    assert figures["seconds"] == pytest.approx(sum(row["seconds"] for row in figures["runs"]) / 2)
    assert "seed 4" in capsys.readouterr().out
    monkeypatch.setattr(speedrun, "GOAL", 0.5)
    with pytest.raises(RuntimeError, match="short, seed 3, ends above 0.5"):
        benchmark.main()
    monkeypatch.setattr("sys.argv", [*argv, "--record", "none"])
    with pytest.raises(ValueError, match="no record 'none'"):
        benchmark.main()

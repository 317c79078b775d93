"""benchmark.py: its figures, each computed another way. Sizes are tiny; what is checked is arithmetic, not speed."""

import functools
import importlib.resources
import json
import statistics
import sys
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import checkpoint
import dataset
import diffusion
import tokenizer as tokenizers
from config import EcoHybridConfig, InferenceConfig, MaskConfig, TrainConfig, TransformerConfig, run_main

SIZES = (
    "--d_model 32 --n_layers 2 --n_heads 2 --d_ff 64 --vocab_size 300 --seq_len 16 --batch_size 4 --grad_accum 2 "
    "--device cpu"
).split()


def make_model(kind="transformer", T=16, V=300):
    torch.manual_seed(0)
    config_class, model_class = checkpoint.MODELS[kind]
    return model_class(config_class(vocab_size=V, max_seq_len=T, d_model=32, n_layers=2, n_heads=2, d_ff=64))


def command(capsys, monkeypatch, *argv):
    """The command line in this process: its exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, argv)])
    with pytest.raises(SystemExit) as e:
        run_main(benchmark.main)
    return e.value.code, *capsys.readouterr()


def test_needed_operations_are_those_pytorch_counts():
    """PyTorch's own counter over forward and backward of one step's real loss, attention as plain products."""
    run = TrainConfig(seq_len=64, batch_size=16, grad_accum=4)
    model, generator = make_model(T=64), torch.Generator()
    x0 = torch.randint(300, (16, 64))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for i in range(4):  # stratified over the step: hidden tokens are (T + 1) / 2 a row but for a percent
            model.loss(x0, MaskConfig(), generator.manual_seed(0), part=(i, 4)).backward()
    assert benchmark.needed_operations(model, run) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_plain_loop_minimises_the_same_loss():
    """Under the same masks it equals the bound, which takes the other path: the head at hidden places alone."""
    model, x0 = make_model(), torch.randint(300, (8, 16))
    plain = benchmark.plain_loss(model, x0, torch.Generator().manual_seed(3))
    assert plain.item() == pytest.approx(diffusion.bound(model, x0, torch.Generator().manual_seed(3)).mean().item())


@pytest.mark.parametrize("V", [260, 300, 70_000])
def test_random_data_is_a_prepared_folder_of_exactly_V_ids(tmp_path, V):
    benchmark.random_data(tmp_path, V, 5000)
    data = dataset.load(tmp_path)  # checks hashes, lengths and the largest id
    assert tokenizers.load(tmp_path / "tokenizer.model").vocab_size == V == data.meta["vocab_size"]
    assert len(data.train) == 5000 and data.train.max() > 0.99 * (V - 1)


def test_the_rate_of_a_product_is_two_n_cubed_over_its_time(monkeypatch):
    clock = iter(range(0, 10_000))  # every look at the clock is a second later: each product takes one
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    assert benchmark.matrix_rate(torch.float32, torch.device("cpu")) == (2 * 64**3, 64)  # a second is long: no larger
    rate, size = benchmark.matrix_rate(torch.float32, torch.device("cpu"), largest=256, patience=100)
    assert (rate, size) == (2 * 256**3, 256)


def test_train_writes_figures_that_follow_from_its_seconds(tmp_path, capsys, monkeypatch):
    rates = {torch.float32: 8e9, torch.bfloat16: 2e9}
    monkeypatch.setattr(benchmark, "matrix_rate", lambda dtype, device: (rates[dtype], 512))
    code, out, err = command(
        capsys, monkeypatch, "train", *SIZES, "--repeats", 3, "--output", tmp_path / "a" / "b.json"
    )
    assert (code, err) == (0, "")
    figures = json.loads((tmp_path / "a" / "b.json").read_text("utf-8"))
    ours, plain = (statistics.median(figures["seconds_a_step"][name]) for name in ("ours", "plain"))
    assert [len(times) for times in figures["seconds_a_step"].values()] == [3, 3] and min(ours, plain) > 0
    assert figures["tokens_a_second"] == pytest.approx({"ours": 2 * 4 * 16 / ours, "plain": 2 * 4 * 16 / plain})
    assert figures["ratio"] == pytest.approx(plain / ours)
    # by hand: a block's matrices 4 C² + 3 C F, scores and values 2 T C; the head at (T + 1) / 2 places
    a_window = 6 * (2 * 16 * (4 * 32**2 + 3 * 32 * 64 + 2 * 16 * 32) + 8.5 * 32 * 300)
    assert figures["needed_operations_a_step"] == 8 * a_window
    assert figures["share"] == pytest.approx(
        {"float32": 8 * a_window / ours / 8e9, "bfloat16": 8 * a_window / ours / 2e9}
    )
    assert figures["precision"] == "float32" and not figures["bf16_share_means_something"]
    assert "means nothing" in out and "float32" in out
    parts = figures["parts_seconds"]
    assert set(parts) == {*benchmark.PARTS, "rest"} and min(parts.values()) > 0
    assert max(parts, key=parts.get) in ("forward", "backward", "optimizer")


def test_timing_the_parts_leaves_the_loop_as_it_was(tmp_path):
    before = [getattr(owner, name) for functions in benchmark.PARTS.values() for owner, name in functions]
    benchmark.random_data(tmp_path, 300, 1000)
    run = TrainConfig(data_dir=str(tmp_path), seq_len=16, batch_size=2, grad_accum=1, max_steps=1, log_interval=1,
                      eval_interval=0, eval_windows=1, amp="off", device="cpu")  # fmt: skip
    sizes = TransformerConfig(d_model=32, n_layers=1, n_heads=2, d_ff=64)
    benchmark.parts_of_a_step("transformer", MaskConfig(), sizes, run, torch.device("cpu"))
    assert before == [getattr(owner, name) for functions in benchmark.PARTS.values() for owner, name in functions]


def test_repeated_documents_are_all_different(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LINES", 2)
    (tmp_path / "a.txt").write_text("एक\n\nएक\nदो\n", "utf-8")
    (tmp_path / "b.txt").write_text("एक", "utf-8")
    size = benchmark.repeat_text([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out.txt", 200)
    text = (tmp_path / "out.txt").read_text("utf-8")
    documents = text.strip().split("\n\n")
    assert documents[:3] == ["0 एक\nएक", "1 दो\nएक", "2 एक\nएक"] and len(set(documents)) == len(documents)
    assert 200 <= size == len(text.encode()) < 220


def test_peak_memory_includes_children():
    """A child that holds 100 MB beside a parent that holds 60 MB: both count, at the same time."""
    hold = "import time; x = bytearray(b'1') * %d; time.sleep(0.7)"
    small = benchmark.run_and_watch([sys.executable, "-c", hold % 1])[1]
    child = f"subprocess.run([sys.executable, '-c', {hold % 10**8!r}])"
    parent = f"import subprocess, sys; x = bytearray(b'1') * 60_000_000; {child}"
    seconds, peak = benchmark.run_and_watch([sys.executable, "-c", parent])
    assert 2 * small + 150e6 < peak < 2 * small + 180e6 and seconds > 0.7
    with pytest.raises(RuntimeError, match="ended with 3: .*no text"):
        benchmark.run_and_watch([sys.executable, "-c", "print('no text'); raise SystemExit(3)"])


@pytest.mark.parametrize("peaks, code", [((400e6, 500e6), 0), ((400e6, 501e6), 1)])
def test_prepare_refuses_memory_that_grows(tmp_path, capsys, monkeypatch, peaks, code):
    left = list(peaks)
    monkeypatch.setattr(benchmark, "run_and_watch", lambda command: (2.0, left.pop(0)))
    flags = ("--megabytes", 0.1, "--growth", 10, "--output", tmp_path / "p.json")
    got, out, err = command(capsys, monkeypatch, "prepare", *flags)
    assert got == code and ("memory grows" in err) == (code == 1)
    figures = json.loads((tmp_path / "p.json").read_text("utf-8"))  # written either way
    assert figures["memory_ratio"] == peaks[1] / peaks[0] and figures["margin"] == 1.25
    assert [row["peak_bytes"] for row in figures["rows"]] == list(peaks)
    small, large = (row["bytes"] for row in figures["rows"])
    assert 1e5 <= small < 1e5 + 8000 and 1e6 <= large < 1e6 + 8000  # to the next end of a document
    assert figures["rows"][1]["megabytes_a_second"] == pytest.approx(large / 2e6)


def test_prepare_measures_the_real_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "in.txt").write_text("\n".join(f"राम {i} घर गया और पानी लाया।" for i in range(50)), "utf-8")
    flags = ("--input", tmp_path / "in.txt", "--megabytes", 0.03, "--vocab_size", 400, "--growth", 3)
    code, out, err = command(capsys, monkeypatch, "prepare", *flags, "--output", tmp_path / "p.json")
    assert (code, err) == (0, "")
    figures = json.loads((tmp_path / "p.json").read_text("utf-8"))
    assert 0.9 < figures["memory_ratio"] < 1.25 and f"{figures['memory_ratio']:.2f} times" in out
    assert all(20e6 < row["peak_bytes"] < 2e9 for row in figures["rows"])


def test_rivals_differ_in_what_is_compared_alone():
    sizes = EcoHybridConfig(vocab_size=300, max_seq_len=400, d_model=32, n_layers=6, n_heads=2, d_ff=96, attn_every=3)
    rivals = benchmark.rivals(sizes)
    assert list(rivals) == ["transformer", "local", "eco", "hybrid"]
    models = {name: model_class(config) for name, (model_class, config) in rivals.items()}
    for name, model in models.items():
        assert (model.config.d_model, model.config.d_ff, model.config.max_seq_len) == (32, 96, 400), name
    assert [b.attention.reach for b in models["transformer"].blocks] == [0] * 6
    assert [b.attention.reach for b in models["local"].blocks] == [64, 64, 0, 64, 64, 0]
    assert [models[name].config.attn_every for name in ("eco", "hybrid")] == [0, 3]
    # by hand, T = 200: a full layer has 200² pairs; a band 129 keys a query less the 64 · 65 beyond the two ends
    pairs = 2 * 200**2 + 4 * (200 * 129 - 64 * 65)
    by_hand = 2 * (6 * 200 * (4 * 32**2 + 3 * 32 * 96) + 2 * 32 * pairs + 7 * 32 * 300)
    assert models["local"].flops(200, 7) == by_hand


def test_half_of_every_row_is_hidden_and_always_the_same():
    x0, x_t, masked = benchmark.half_hidden(50, 3, 17)
    assert x0.shape == (3, 17) and x0.max() < 50 and masked.sum(1).tolist() == [8, 8, 8]
    assert torch.equal(x_t == 50, masked) and torch.equal(x_t[~masked], x0[~masked])
    assert torch.equal(x_t, benchmark.half_hidden(50, 3, 17)[1])


def test_derived_crossover_of_made_up_costs():
    """T² + 3 T against 10 T + 60: T² - 7 T - 60 = (T - 12) (T + 5), equal at 12."""
    assert benchmark.derived_crossover(lambda T: T * T + 3 * T, lambda T: 10 * T + 60) == 12
    assert benchmark.derived_crossover(lambda T: T * T + 3 * T, lambda T: 10 * T + 61) == 13
    assert benchmark.derived_crossover(lambda T: T, lambda T: T + 1, limit=100) is None


@pytest.mark.parametrize(
    "speedups, T",
    [
        ((0.5, 1.5, 2.0), 200 * 2**0.5),  # half of the way in log T
        ((0.8, 0.9, 1.3), 400 * 2**0.25),  # a quarter
        ((0.8, 1.0, 1.2), 400),
        ((1.1, 0.9, 1.1), 400 * 2**0.5),  # the last crossing counts
        ((1.0, 1.1, 1.2), 200),
        ((0.7, 1.1, 0.9), None),
    ],
)
def test_measured_crossover_by_hand(speedups, T):
    found = benchmark.measured_crossover([200, 400, 800], speedups)
    assert found == (T and pytest.approx(T))


def test_agreement_by_hand():
    rows = [
        dict(T=T, models={"eco": dict(train_speedup=measured, derived_speedup=derived, train_rate=rate)})
        for T, measured, derived, rate in ((1, 0.5, 0.4, 80.0), (2, 3.0, 4.0, 100.0), (4, 8.0, 8.0, 50.0))
    ]
    assert benchmark.agreement(rows, "eco", 2) == dict(speedup=(0.75, 1.25), growth=(1.0, 2.0))


def peak_beside_80_million_bytes():
    before = bytearray(b"1") * 80_000_000

    def call():
        for size in (60_000_000, 30_000_000):
            bytearray(b"1") * size

    return benchmark.peak_of(call, torch.device("cpu")) if before else 0


def test_peak_of_a_call_leaves_out_what_was_there():
    with benchmark.young_process() as pool:  # here other tests' threads may give memory back meanwhile
        assert 58e6 < pool.submit(peak_beside_80_million_bytes).result() < 64e6  # the kernel counts roughly


def test_memory_of_a_training_pass_grows_with_the_batch():
    config = TransformerConfig(vocab_size=300, max_seq_len=64, d_model=64, n_layers=2, n_heads=2, d_ff=128)
    with benchmark.young_process() as pool:
        measure = functools.partial(pool.submit, benchmark.training_peak, benchmark.Transformer, config, dtype=None)
        peaks = [measure(B=B).result() for B in (64, 256)]
    # at least what backward reads in fp32: a layer's two norms, q, k, v and their norms, gate, up and their product
    assert peaks[1] > 256 * 64 * 4 * 2 * (2 * 64 + 5 * 64 + 3 * 128)
    assert 2.5 < peaks[1] / peaks[0] < 5


def test_length_writes_figures_that_follow_from_its_seconds(tmp_path, capsys, monkeypatch):
    """With a made-up cost of EcoHybrid: the Transformer's with 24 keys a query, whatever the length."""

    def cost(T, keys, hidden):  # two layers and the head, by hand
        return 2 * 2 * (T * (4 * 32**2 + 3 * 32 * 64) + 2 * T * keys * 32) + 2 * hidden * 32 * 300

    monkeypatch.setattr(benchmark.EcoHybrid, "flops", lambda self, T, hidden: cost(T, 24, hidden))
    sizes = "--d_model 32 --n_layers 2 --n_heads 2 --d_ff 64 --vocab_size 300 --device cpu --amp off".split()
    flags = (*sizes, "--lengths", "32, 16", "--repeats", 2, "--seq_len", 32, "--attn_every", 2)
    code, out, err = command(capsys, monkeypatch, "length", *flags, "--output", tmp_path / "l.json")
    assert (code, err) == (0, "")
    figures = json.loads((tmp_path / "l.json").read_text("utf-8"))
    assert (tmp_path / "l.png").read_bytes()[:4] == b"\x89PNG"
    rows = figures["rows"]
    assert [(row["T"], row["B"]) for row in rows] == [(16, 2), (32, 1)] and figures["reference_length"] == 32
    assert figures["crossover"]["eco"]["derived"] == figures["crossover"]["hybrid"]["derived"] == 24
    assert figures["precision"] == "float32" and figures["targets"] == [] and "missed" not in out
    for row in rows:
        T, cells = row["T"], row["models"]
        assert list(cells) == ["transformer", "local", "eco", "hybrid"]
        for name, c in cells.items():
            assert len(c["all_train"]) == len(c["all_sample"]) == 2 and min(*c["all_train"], *c["all_sample"]) > 0
            assert c["train"] == statistics.median(c["all_train"]) and c["sample"] == statistics.median(c["all_sample"])
            assert c["operations"] == cost(T, 24 if name in ("eco", "hybrid") else T, T // 2)
            assert c["train_rate"] == pytest.approx(3 * row["B"] * c["operations"] / c["train"])
            for of in ("train", "sample"):
                assert c[f"{of}_speedup"] == pytest.approx(cells["transformer"][of] / c[of])
            assert c["derived_speedup"] == pytest.approx(cells["transformer"]["operations"] / c["operations"])
            assert c["peak_bytes"] >= 0 and c["parameters"] > 300 * 32
    for name in ("eco", "hybrid"):
        for of in ("train", "sample"):
            speedups = [row["models"][name][f"{of}_speedup"] for row in rows]
            assert figures["crossover"][name][of] == benchmark.measured_crossover([16, 32], speedups)


def test_targets_are_told_at_the_default_sizes_on_a_cpu(tmp_path, capsys, monkeypatch):
    def measured(sizes, T, run, repeats, device, dtype):
        times = {"transformer": 3.0, "local": 2.0, "eco": 1.0, "hybrid": 1.5}  # eco: 3 times as fast
        cells = {
            name: dict(train=t, sample=t, all_train=[t], all_sample=[t], train_rate=1.0, peak_bytes=0)
            | dict(derived_speedup=1.0, train_speedup=3 / t, sample_speedup=3 / t)
            for name, t in times.items()
        }
        return dict(T=T, B=1, models=cells)

    monkeypatch.setattr(benchmark, "measure_length", measured)
    monkeypatch.setattr(benchmark, "derived_crossover", lambda plain, other: 227)
    small = (lambda config: make_model(), None)
    names = ("transformer", "local", "eco", "hybrid")
    monkeypatch.setattr(benchmark, "rivals", lambda sizes: dict.fromkeys(names, small))
    flags = ("length", "--amp", "off", "--device", "cpu", "--output", tmp_path / "l.json")
    code, out, _ = command(capsys, monkeypatch, *flags)
    figures = json.loads((tmp_path / "l.json").read_text("utf-8"))
    assert code == 0 and [(t["T"], t["met"]) for t in figures["targets"]] == [(1024, True), (2048, True), (4096, False)]
    assert out.count(", met") == 2 and out.count(", missed") == 1 and "at or below 128 (training)" in out
    assert [row["T"] for row in figures["rows"]] == [128 * 2**i for i in range(7)]
    assert command(capsys, monkeypatch, *flags, "--d_ff", 512)[1].count(", met") == 0


def test_flags_of_length_that_are_refused(capsys, monkeypatch):
    for flags in (("--lengths", "16,a"), ("--lengths", "1"), ("--lengths", ""), ("--attn_every", 0)):
        code, _, err = command(capsys, monkeypatch, "length", *flags)
        assert code == 2 and flags[0] in err and err.count("\n") == 1


def test_scaling_runs_the_same_steps_in_each_way(tmp_path, capsys, monkeypatch):
    real, commands = benchmark.script_argv, []
    keep = lambda *args, **more: commands.append(real(*args, **more)) or commands[-1]  # noqa: E731
    monkeypatch.setattr(benchmark, "script_argv", keep)
    out = tmp_path / "figures.json"
    flags = "--d_model 32 --n_layers 1 --n_heads 2 --seq_len 16 --batch_size 2 --vocab_size 300 --repeats 1".split()
    flags += ["--grad_accum", "4"]  # this one is ours
    monkeypatch.setattr("sys.argv", ["benchmark.py", "scaling", *flags, "--output", str(out)])
    benchmark.main()
    figures = json.loads(out.read_text())
    last = lambda c: c[len(c) - c[::-1].index("--grad_accum")]  # noqa: E731  the one that counts
    assert [("torch.distributed.run" in c, last(c)) for c in commands] == [(False, "2"), (False, "2"), (True, "1")]
    rate = {}
    for way, times in figures["seconds_a_step"].items():  # the first of four steps warms up; 4 rows of 16 tokens each
        assert len(times) == 3
        rate[way] = 64 / statistics.median(times)
    assert figures["tokens_a_second"] == pytest.approx(rate)
    assert figures["of_threads"] == pytest.approx(rate["2 × 1"] / rate["1 × 2"])
    assert figures["of_one_times_processes"] == pytest.approx(rate["2 × 1"] / rate["1 × 1"] / 2)
    assert f"{figures['of_threads']:.1%} of one process of 2 threads" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmark.py", "scaling", "--no_such_flag", "--repeats", "1"])
    with pytest.raises(ValueError, match="unrecognized arguments"):
        benchmark.main()


def test_an_unknown_benchmark_is_a_wrong_command(capsys, monkeypatch):
    code, _, err = command(capsys, monkeypatch, "nonsense")
    assert code == 2 and "train, prepare, length" in err and err.count("\n") == 1
    assert command(capsys, monkeypatch, "train", "--unknown", 1)[0] == 2
    assert command(capsys, monkeypatch, "--help")[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# inference


def test_inference_states_what_each_form_costs(trained, command, monkeypatch, tmp_path):
    """KL and bound computed another way; the seconds are medians of what was measured; a start is what is left over."""
    pytest.importorskip("onnxruntime")
    start = dict(seconds=1.5, cpu=2.5, peak_bytes=3 << 20)
    monkeypatch.setattr(benchmark, "starting", lambda *args: start)
    argv = ["--ckpt", trained, "--tokens", 16, "--steps", 4, "--windows", 6, "--repeats", 2, "--batches", "1,3"]
    result = command("benchmark", "inference", *argv, "--output", tmp_path / "x.json")
    assert result.code == 0 and "1.50 s; 2.50 CPU s with one sample; 3 MiB" in result.out, result.err
    figures = json.loads((tmp_path / "x.json").read_text("utf-8"))
    rows = {(row["name"], row["batch"]): row for row in figures["rows"]}
    assert [row["batch"] for row in figures["rows"]] == 4 * [1, 3] and figures["start"] == start

    loaded = checkpoint.load(trained)
    denoiser, weights = loaded.denoiser, sum(p.numel() for p in loaded.denoiser.parameters())
    val = torch.from_numpy(dataset.load(loaded.config["data_dir"]).val.astype("int64"))
    x0 = val[: 6 * 16].view(6, 16)
    nats = diffusion.bound(denoiser, x0, torch.Generator().manual_seed(0)).mean().item()
    plain, rounded = rows["fp32", 1], rows["bf16, computed in fp32", 1]
    assert plain["bound"] == pytest.approx(nats, rel=1e-5) and plain["kl"] == plain["change"] == 0
    assert (plain["bytes"], rounded["bytes"]) == (4 * weights, 2 * weights)
    x_t, masked = diffusion.corrupt(x0, denoiser.mask_id, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = denoiser(x_t)[masked].log_softmax(1)
        for parameter in denoiser.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        q = denoiser(x_t)[masked].log_softmax(1)
    kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).item()
    assert rounded["kl"] == pytest.approx(kl, rel=0.1) and kl > 0  # differences of numbers near each other
    assert abs(rows["ONNX fp32", 1]["kl"]) < rows["ONNX int8", 3]["kl"] < 1
    for row in figures["rows"]:
        assert len(row["all"]["sample"]) == 2 and row["sample"] == statistics.median(row["all"]["sample"])
        assert row["bound"] - plain["bound"] == pytest.approx(row["change"], abs=1e-5)


def test_a_model_whose_data_is_elsewhere_reads_devdas(trained, tmp_path):
    loaded = checkpoint.load(trained)
    assert (benchmark.text_for(InferenceConfig(), loaded)[0] == dataset.load(loaded.config["data_dir"]).val).all()
    loaded.config["data_dir"] = str(tmp_path / "nowhere")
    ids, what = benchmark.text_for(InferenceConfig(), loaded)
    text = loaded.tokenizer.decode(ids.tolist())
    assert what == "windows of Devdas" and 10_000 < len(text) < 20_000
    novel = (importlib.resources.files("idatasets") / "datasets/devdas.txt").read_text("utf-8")
    assert text.split()[-20:] == novel.split()[-20:]  # the tenth that is held out, not another
    with pytest.raises(FileNotFoundError):
        benchmark.text_for(InferenceConfig(data_dir=str(tmp_path / "nowhere")), loaded)


def test_a_start_is_what_is_left_of_a_command(trained, monkeypatch):
    clock, calls = iter([0.0, 4.0, 10.0, 13.0, 20.0, 25.0]), []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))

    def run(command, **kwargs):
        calls.append(command)
        return mock.Mock(
            stdout="text\n\n64 tokens in 16 forwards, 4.0 tokens a forward, 320 tokens/s (0.50 s; x, step 1)"
        )

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    cfg = InferenceConfig(tokens=8, steps=2)
    monkeypatch.setattr(benchmark, "run_and_watch", lambda command: (9.0, 1234))
    start = benchmark.starting(checkpoint.load(trained), cfg)
    assert start["seconds"] == pytest.approx(3.5) and start["peak_bytes"] == 1234  # the median of 3.5, 2.5, 4.5
    assert start["cpu"] == pytest.approx(0, abs=1e-6)  # of no process at all
    assert len(calls) == 3 and calls[0][1].endswith("sample_diffusion.py") and "--no_live" in calls[0]


def test_inference_is_for_denoisers(twin, command):
    result = command("benchmark", "inference", "--ckpt", twin)
    assert result.code == 2 and "no denoiser" in result.error()

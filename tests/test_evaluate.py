"""evaluate.py and ngram.py: units from the text itself, errors by bootstrap, counts by dictionaries."""

import collections
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import contents, make_data, train
from toys import MARKOV, STRINGS, Toy, V, build, code, fixed, oracle, seeded

import checkpoint
import dataset
import diffusion
import evaluate
import intervals
import ngram
import quality
import tokenizer as tokenizers

Letters = collections.namedtuple("Letters", "vocab_size token_bytes")(V, [b"ab", b"c", "म".encode()].__getitem__)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, data):
    return tokenizers.Bytes() if request.param == "bytes" else tokenizers.load(data / "tokenizer.model")


def scored(tokenizer, T=7):
    """Documents with hard bytes, an EOS behind each, in windows that cut characters."""
    ids = []
    for text in ("मैं कल बाज़ार गया था।", "é👩‍👩‍👧 \n\n x", "राम खेत में गया था।" * 5):
        ids += [*tokenizer.encode(text), tokenizer.eos_id]
    return dataset.windows(np.array(ids), T)


# ---------------------------------------------------------------------------------------------------------------------
# units


def test_bytes_and_characters_are_those_of_the_decoded_text(tokenizer):
    windows = scored(tokenizer)
    text = tokenizer.decode(torch.cat(windows).tolist())
    tokens, n_bytes, n_chars = evaluate.text_sizes(windows, tokenizer)
    assert (tokens.sum(), n_bytes.sum(), n_chars.sum()) == (len(torch.cat(windows)), len(text.encode()), len(text))
    assert tokens.tolist() == [len(w) for w in windows] and n_chars.sum() < n_bytes.sum()
    for window, size in zip(windows, n_bytes, strict=True):
        assert size == sum(len(tokenizer.token_bytes(int(i))) for i in window)


def test_a_uniform_model_costs_log_V_a_token(tokenizer):
    windows, V = scored(tokenizer), tokenizer.vocab_size
    result = evaluate.evaluate(fixed(*[0.0] * V), tokenizer, windows, masks=3)
    text, tokens = tokenizer.decode(torch.cat(windows).tolist()), sum(map(len, windows))
    bits = tokens * math.log2(V)
    found = [result[name]["mean"] for name in ("nats_per_token", "bits_per_byte", "bits_per_character")]
    assert found == pytest.approx([math.log(V), bits / len(text.encode()), bits / len(text)])
    assert result["nats_per_token"]["standard_error"] < 1e-6  # the same in every window
    assert result["tokens"] == tokens and result["windows"] == len(windows) and result["masks"] == 3


def test_a_large_vocabulary_takes_smaller_batches(tokenizer, monkeypatch):
    """Two windows' logits fit: no forward sees more rows, and every window is scored."""
    windows, V, model = scored(tokenizer), tokenizer.vocab_size, fixed(*[0.0] * tokenizer.vocab_size)
    monkeypatch.setattr(evaluate, "MOST_LOGITS", 3 * V * len(windows[0]) - 1)
    result = evaluate.evaluate(model, tokenizer, windows, masks=1)
    assert {len(x) for x in model.seen} <= {1, 2} and sum(map(len, model.seen)) == len(windows)
    assert result["nats_per_token"]["mean"] == pytest.approx(math.log(V))


def test_error_of_a_ratio_is_that_of_the_bootstrap():
    g = np.random.default_rng(0)
    size = g.uniform(20, 60, 400)
    cost = size * g.normal(2, 0.3, 400) + g.normal(0, 10, 400)
    mean, error = intervals.ratio(torch.tensor(cost), torch.tensor(size))
    draws = g.integers(0, 400, (4000, 400))
    again = cost[draws].sum(1) / size[draws].sum(1)
    assert mean == pytest.approx(cost.sum() / size.sum()) and error == pytest.approx(again.std(), rel=0.06)
    assert intervals.ratio(torch.ones(1), torch.ones(1)) == (1.0, 0.0)


@pytest.mark.parametrize("T", [10, 30, 64, 130, 500])
def test_cost_by_hidden_fraction(T):
    """A model whose cost is a function of the count alone: every bin holds the counts in (b/10, (b+1)/10] · T."""
    cost = lambda k: 0.1 + 2 * k / T  # noqa: E731  nats

    def logits(x_t):
        p = torch.exp(-cost((x_t == 2).sum(1).double()))
        return torch.stack([p, 1 - p], 1).log()[:, None].expand(*x_t.shape, 2)

    two = collections.namedtuple("Two", "vocab_size token_bytes")(2, lambda i: b"a")
    result = evaluate.evaluate(Toy(logits, V=2), two, [torch.zeros(T).long()] * 100, masks=40)
    assert sum(b["n"] for b in result["by_hidden_fraction"]) == 4000
    for i, b in enumerate(result["by_hidden_fraction"]):
        ks = [k for k in range(1, T + 1) if i * T < 10 * k <= (i + 1) * T]
        assert abs(b["n"] - 4000 * len(ks) / T) < 4 * 4000**0.5 * (len(ks) / T) ** 0.5
        spread = np.std([cost(k) for k in ks])
        assert abs(b["nats_per_token"] - np.mean([cost(k) for k in ks])) < 4 * spread / b["n"] ** 0.5 + 1e-5
        assert len(ks) > 1 or b["standard_error"] < 1e-5
    assert result["nats_per_token"]["mean"] == pytest.approx(np.mean([cost(k) for k in range(1, T + 1)]), abs=0.01)
    assert all(b["n"] or b["nats_per_token"] is None for b in evaluate.evaluate(
        Toy(logits, V=2), two, [torch.zeros(T).long()], masks=1)["by_hidden_fraction"])  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_an_exact_likelihood_is_scored_once_without_masks(tokenizer, batch_size):
    """Each window against the sum of its tokens' log p; the same keys and units as a bound, and no mask anywhere."""
    model, windows = build("autoregressive", vocab_size=tokenizer.vocab_size).eval(), scored(tokenizer)
    result = evaluate.evaluate(model, tokenizer, windows, masks=3, seed=1, batch_size=batch_size)
    nats = []
    for w in windows:
        log_p = model(w[None])[0].double().log_softmax(1)  # (T_w, V)
        nats.append(-log_p[torch.arange(len(w)), w].sum().item())
    assert len({len(w) for w in windows}) == 2 and result["per_window"]["nats"] == pytest.approx(nats, abs=1e-3)
    tokens, n_bytes, n_chars = (v.numpy() for v in evaluate.text_sizes(windows, tokenizer))
    for name, value in (
        ("nats_per_token", sum(nats) / tokens.sum()),
        ("bits_per_byte", sum(nats) / math.log(2) / n_bytes.sum()),
        ("bits_per_character", sum(nats) / math.log(2) / n_chars.sum()),
    ):
        assert result[name]["mean"] == pytest.approx(value, rel=1e-5)
    residual = np.array(nats) - sum(nats) / tokens.sum() * tokens
    error = (residual**2).sum() * len(nats) / (len(nats) - 1)
    assert result["nats_per_token"]["standard_error"] == pytest.approx(error**0.5 / tokens.sum(), rel=1e-4)
    bound = evaluate.evaluate(fixed(*[0.0] * tokenizer.vocab_size), tokenizer, windows, masks=1)
    assert list(result) == list(bound) and (result["likelihood"], bound["likelihood"]) == ("exact", "bound")
    assert result["masks"] == 0 and result["by_hidden_fraction"] == [] and bound["masks"] == 1


def test_main_writes_what_evaluate_returns(command, trained, data, tmp_path):
    out = tmp_path / "eval.json"
    result = command("evaluate", "--ckpt", trained, "--masks", 4, "--output", out, "--device", "cpu", "--seed", 5)
    assert result.code == 0, result.err
    written, loaded, prepared = json.loads(out.read_text("utf-8")), checkpoint.load(trained), dataset.load(data)
    windows = dataset.windows(prepared.val, 32)
    again = evaluate.evaluate(loaded.denoiser, loaded.tokenizer, windows, masks=4, seed=5)
    assert {k: written[k] for k in again} == again and f"{again['bits_per_byte']['mean']:.4f}" in result.out
    for split, key in (("val", "bytes"), ("val", "characters"), ("val", "tokens")):
        assert written[key] == prepared.meta["splits"][split][key]  # all that prepare.py counted, and no byte twice
    V, bits = loaded.tokenizer.vocab_size, written["bytes"] * math.log(2)
    counted = {name: getattr(ngram, name)(prepared.train, prepared.val, V) / bits for name in ("unigram", "bigram")}
    assert written["baselines_bits_per_byte"] == pytest.approx(counted)
    assert counted["bigram"] < counted["unigram"] < math.log2(V) * written["tokens"] / written["bytes"]


# ---------------------------------------------------------------------------------------------------------------------
# pairs


def scores(nats, n_bytes, **others):
    bits = sum(nats) / math.log(2) / sum(n_bytes)
    keys = dict.fromkeys((*intervals.SAME, *intervals.SAME_MASKS), 0) | {
        "checkpoint": "runs/a/best.pt",
        "bits_per_byte": {"mean": bits},
    }
    return keys | {"per_window": {"nats": nats, "bytes": n_bytes}} | others


def test_a_paired_difference_forgets_what_both_share():
    g = np.random.default_rng(0)
    n_bytes = g.integers(500, 900, 300)
    hard = n_bytes * g.normal(0.7, 0.2, 300)  # windows differ much more than the models do
    theirs = hard + g.normal(0, 3, 300)
    ours = hard + 0.01 * n_bytes + g.normal(0, 3, 300)
    mean, error = intervals.paired(scores(ours.tolist(), n_bytes.tolist()), scores(theirs.tolist(), n_bytes.tolist()))
    assert mean == pytest.approx((ours.sum() - theirs.sum()) / math.log(2) / n_bytes.sum())
    draws = g.integers(0, 300, (4000, 300))
    again = (ours - theirs)[draws].sum(1) / math.log(2) / n_bytes[draws].sum(1)
    assert error == pytest.approx(again.std(), rel=0.06) and abs(mean - 0.01 / math.log(2)) < 4 * error
    alone = intervals.ratio(torch.tensor(ours / math.log(2)), torch.tensor(n_bytes).double())[1]
    assert error < alone / 10


def test_pairs_of_several_seeds(capsys):
    n_bytes = [1000, 1000]
    ours = [scores([a * math.log(2) * 1000] * 2, n_bytes) for a in (0.9, 1.0, 1.1)]
    theirs = [scores([a * math.log(2) * 1000] * 2, n_bytes) for a in (1.0, 1.02, 1.07)]
    evaluate.compare(ours, theirs)  # -0.1, -0.02, +0.03: mean -0.03, deviation 0.06557, error 0.03786
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "mean -0.0300 ± 0.0379 over 3 pairs, -2.91%"
    evaluate.compare(ours[:1], theirs[:1])
    assert capsys.readouterr().out.splitlines()[-1] == "mean -0.1000, -10.00%"


def test_what_was_scored_otherwise_is_not_paired():
    a = scores([1.0, 2.0], [3, 4])
    same = (*intervals.SAME, *intervals.SAME_MASKS)
    for other in (*({key: 1} for key in same), {"per_window": {"nats": [1.0, 2.0], "bytes": [3, 5]}}):
        with pytest.raises(ValueError, match="not scored alike: " + next(iter(other))):
            intervals.paired(a, a | other)
    with pytest.raises(ValueError, match="not scored alike"):
        intervals.paired(a, {k: v for k, v in a.items() if k != "per_window"})  # an older eval.json


def test_an_exact_likelihood_pairs_with_any_masks():
    """Masks, their seed and the batches are a bound's own affair; windows and data are not."""
    bound = scores([7.0, 9.0], [10, 20], likelihood="bound", masks=16, seed=0, batch_size=32)
    exact = scores([6.0, 9.5], [10, 20], likelihood="exact", masks=0, seed=3, batch_size=1)
    difference = intervals.paired(exact, bound)
    assert difference[0] == pytest.approx(-0.5 / 30 / math.log(2)) and difference[1] > 0
    assert intervals.paired(bound, exact) == pytest.approx((-difference[0], difference[1]))
    assert intervals.paired(exact, exact | {"batch_size": 9}) == (0, 0)
    for key in intervals.SAME:
        with pytest.raises(ValueError, match=f"not scored alike: {key}"):
            intervals.paired(exact, bound | {key: 1})
    with pytest.raises(ValueError, match="not scored alike: per_window"):
        intervals.paired(exact, bound | {"per_window": {"nats": [7.0, 9.0], "bytes": [10, 21]}})


def test_against_by_command(command, trained, data, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(trained, out)
    (out / "eval.json").unlink(missing_ok=True)
    argv = ["--masks", 2, "--device", "cpu", "--data_dir", data]
    refused = command("evaluate", "--ckpt", trained, "--against", out, *argv)
    assert refused.code == 2 and "no eval.json" in refused.error()
    assert command("evaluate", "--ckpt", out, *argv).code == 0
    result = command("evaluate", "--ckpt", f"{out / 'latest.pt'},{out}", "--against", f"{out},{out}", *argv)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "mean +0.0000 ± 0.0000 over 2 pairs, +0.00%"
    for wrong, why in (
        (("--against", f"{out},{out}"), "cannot be paired"),
        (("--output", "x.json"), "--output is for"),
    ):
        refused = command("evaluate", "--ckpt", f"{out},{out},{out}", *wrong, *argv)
        assert refused.code == 2 and why in refused.error()
    other = command(
        "evaluate", "--ckpt", out, "--against", out, "--seed", 3, *argv
    )  # eval.json is read before it is written
    assert other.code == 2 and "not scored alike: seed" in other.error()


# ---------------------------------------------------------------------------------------------------------------------
# counting


def slow_bigram(train, V):
    """p(b | a) by dictionaries, as the formula in ngram.bigram says."""
    pairs, singles = collections.Counter(zip(train, train[1:], strict=False)), collections.Counter(train)
    p = {b: (singles[b] + 0.5) / (len(train) + 0.5 * V) for b in range(V)}
    n1, n2 = (sum(c == n for c in pairs.values()) for n in (1, 2))
    d = n1 / (n1 + 2 * n2)

    def prob(b, a=None):
        after = {y: c for (x, y), c in pairs.items() if x == a}
        if not after:
            return p[b]
        total = sum(after.values())
        return max(after.get(b, 0) - d, 0) / total + d * len(after) / total * p[b]

    return prob


def test_unigram_and_bigram_against_dictionaries():
    V = 12
    train = (torch.multinomial(torch.arange(10.0), 60, True, generator=seeded()) + 1).tolist() + [0, 5]  # 11 never
    val = [11, 0, 3, 3, 11, 2, *train[:20]]
    prob = slow_bigram(train, V)
    a, b = np.array(train, np.uint16), np.array(val, np.uint16)
    assert ngram.unigram(a, b, V) == pytest.approx(-sum(math.log(prob(x)) for x in val))
    slow = -math.log(prob(val[0])) - sum(math.log(prob(y, x)) for x, y in zip(val, val[1:], strict=False))
    assert ngram.bigram(a, b, V) == pytest.approx(slow)
    for context in range(V):  # the fast code's own probabilities, one pair at a time
        pairs = [np.array([context, y], np.uint16) for y in range(V)]
        given = [math.exp(ngram.unigram(a, pair[:1], V) - ngram.bigram(a, pair, V)) for pair in pairs]
        assert sum(given) == pytest.approx(1) and min(given) > 0
    assert sum(ngram.unigram_probs(a, V)) == pytest.approx(1)


@pytest.mark.parametrize("train", [[1, 2, 1, 2, 1, 2, 1], [3, 3, 3], [0, 1, 2, 3, 4]])
def test_bigram_where_no_pair_or_every_pair_is_single(train):
    for context in range(5):
        pairs = [np.array([context, y]) for y in range(5)]
        train_ids = np.array(train, np.uint16)
        given = [math.exp(ngram.unigram(train_ids, p[:1], 5) - ngram.bigram(train_ids, p, 5)) for p in pairs]
        assert sum(given) == pytest.approx(1) and min(given) > 0


# ---------------------------------------------------------------------------------------------------------------------
# reliability


def curve_by_hand(probs, targets):
    """Ten bins of (tokens, confidence, right) from rows of probabilities, in plain Python."""
    bins = [[0, 0.0, 0] for _ in range(10)]
    for p, target in zip(probs, targets, strict=True):
        b = bins[min(9, max(0, math.ceil(max(p) * 10) - 1))]
        b[0], b[1], b[2] = b[0] + 1, b[1] + max(p), b[2] + (p.index(max(p)) == target)
    return bins


def check_curve(figures, bins):
    n = sum(b[0] for b in bins)
    assert len(figures["reliability"]) == 10 and sum(b["n"] for b in figures["reliability"]) == n
    for i, (row, (count, sure, right)) in enumerate(zip(figures["reliability"], bins, strict=True)):
        assert (row["from"], row["to"], row["n"]) == (i / 10, (i + 1) / 10, count)
        means = (sure / count, right / count) if count else (None, None)
        assert (row["confidence"], row["accuracy"]) == (pytest.approx(means[0]), pytest.approx(means[1])) or not count
        assert count or row["confidence"] is row["accuracy"] is None
    error = sum(count / n * abs(right / count - sure / count) for count, sure, right in bins if count)
    assert figures["calibration_error"] == pytest.approx(error)


def test_reliability_against_the_same_masks_by_hand():
    """From the canvases that the bound showed, with no forward of its own; the bound's bits stay."""
    toy, tokenizer = Toy(oracle(MARKOV, tilt=1.5).f), Letters
    x0 = STRINGS[torch.multinomial(MARKOV, 60, True, generator=seeded())]
    plain = evaluate.evaluate(toy, tokenizer, list(x0), masks=5)
    forwards, toy.seen, curve = len(toy.seen), [], evaluate.Reliability()
    assert evaluate.evaluate(toy, tokenizer, list(x0), masks=5, observe=curve) == plain
    assert len(toy.seen) == forwards == 10  # batches of 32 and 28
    probs, targets = [], []
    for i, x_t in enumerate(toy.seen):
        rows = x0[:32] if i < 5 else x0[32:]
        p = toy.f(x_t).softmax(2)
        probs += p[x_t == V].tolist()
        targets += rows[x_t == V].tolist()
    check_curve(curve.figures(), curve_by_hand(probs, targets))
    assert curve.figures()["calibration_error"] > 0.03


def test_reliability_of_an_exact_denoiser_is_the_diagonal():
    """And one that says 0.6 while it is right in 0.5 of all cases has an error of 0.1."""
    x0 = list(STRINGS[torch.multinomial(MARKOV, 4000, True, generator=seeded())])
    curve = evaluate.Reliability()
    evaluate.evaluate(oracle(MARKOV), Letters, x0, masks=4, batch_size=1000, observe=curve)
    for b in curve.figures()["reliability"]:
        if b["n"]:
            p = b["confidence"]
            error = 2 * (p * (1 - p) / b["n"]) ** 0.5  # of four masks that share a window, at most
            assert abs(p - b["accuracy"]) < 4 * error + 1e-5
    assert curve.figures()["calibration_error"] < 0.01
    overconfident, curve = fixed(*torch.tensor([0.6, 0.2, 0.2]).log().tolist()), evaluate.Reliability()
    evaluate.evaluate(overconfident, Letters, [torch.tensor([0, 1, 0, 2] * 5)] * 100, observe=curve, masks=4)
    (only,) = (b for b in curve.figures()["reliability"] if b["n"])
    assert only["confidence"] == pytest.approx(0.6) and only["accuracy"] == pytest.approx(0.5, abs=0.02)
    assert curve.figures()["calibration_error"] == pytest.approx(only["confidence"] - only["accuracy"])


def test_reliability_of_the_twin_is_of_its_next_tokens():
    model, windows = build("autoregressive", noise=0.6).eval(), list(torch.randint(11, (9, 16), generator=seeded()))
    windows.append(windows[0][:5])
    curve, tokenizer = evaluate.Reliability(), collections.namedtuple("T", "vocab_size token_bytes")(11, lambda i: b"a")
    result = evaluate.evaluate(model, tokenizer, windows, batch_size=4, observe=curve)
    assert result == evaluate.evaluate(model, tokenizer, windows, batch_size=4)
    probs = [p for w in windows for p in model(w[None])[0].softmax(1).tolist()]
    check_curve(curve.figures(), curve_by_hand(probs, torch.cat(windows).tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# the chain rule


def test_evenly_spread_windows_are_full():
    windows = [torch.zeros(n) for n in [8] * 10 + [3]]
    assert evaluate.evenly(windows, 5) == [0, 2, 4, 6, 8] and evaluate.evenly(windows, 3) == [0, 3, 6]
    assert evaluate.evenly(windows, 10) == evaluate.evenly(windows, 11) == evaluate.evenly(windows, 99) == [*range(10)]
    assert evaluate.evenly(windows[-1:], 2) == [0]  # a text shorter than a window


def test_chain_rule_of_windows_by_enumeration():
    """Exact denoiser: both orders cost -log p. Wrong one: from left to right by the product of its conditionals."""
    x0 = STRINGS[torch.multinomial(MARKOV, 50, True, generator=seeded())]
    n_bytes = torch.tensor([[2, 1, 3][c] for w in x0[::5] for c in w]).view(10, 4).sum(1).double()
    bound = torch.linspace(1, 9, 50, dtype=torch.float64).tolist()
    for tilt in (0.0, 1.0):
        toy = oracle(MARKOV, tilt)
        result = evaluate.chain_rule(toy, Letters, list(x0), bound, 10, batch_size=4)
        logp = torch.zeros(10, dtype=torch.float64)
        for t in range(4):
            x_t = x0[::5].clone()
            x_t[:, t:] = V
            logp += toy.f(x_t)[:, t].log_softmax(1).gather(1, x0[::5, t : t + 1]).squeeze(1)
        if tilt == 0:
            torch.testing.assert_close(logp, MARKOV[code(x0[::5])].log())
            assert result["own_order"]["bits_per_byte"] == pytest.approx(result["left_to_right"]["bits_per_byte"])
        else:
            assert result["own_order"]["bits_per_byte"]["mean"] != result["left_to_right"]["bits_per_byte"]["mean"]
        assert list(result) == ["left_to_right", "own_order", "bound"]
        ours, theirs = result["left_to_right"], result["bound"]
        assert ours["bits_per_byte"]["mean"] == pytest.approx(float(-logp.sum() / math.log(2) / n_bytes.sum()))
        assert ours["nats_per_token"]["mean"] == pytest.approx(float(-logp.mean() / 4))
        assert ours["nats_per_token"]["standard_error"] == pytest.approx(float(logp.std() / 4 / 10**0.5))
        assert theirs["nats_per_token"]["mean"] == pytest.approx(sum(bound[::5]) / 40)
        found = ours["bits_per_byte_less_bound"]  # paired, as two runs are
        assert found["mean"] == pytest.approx(float((-logp.sum() - sum(bound[::5])) / math.log(2) / n_bytes.sum()))
        pair = evaluate.paired(*(scores(nats, n_bytes.tolist()) for nats in ((-logp).tolist(), bound[::5])))
        assert (found["mean"], found["standard_error"]) == pytest.approx(pair)
        assert {part["windows"] for part in result.values()} == {10}
        assert ours["per_window"]["window"] == [*range(0, 50, 5)]
        assert ours["per_window"]["nats"] == pytest.approx((-logp).tolist(), abs=6e-4)


# ---------------------------------------------------------------------------------------------------------------------
# by command


@pytest.fixture(scope="module")
def twin(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "twin"
    train(data, out, "--seq_len", 24, kind="autoregressive")
    return out


def test_chain_rule_judge_and_samples_by_command(command, trained, twin, data, tmp_path):
    out, argv = tmp_path / "eval.json", ("--masks", 2, "--device", "cpu", "--max_windows", 40)
    plain = command("evaluate", "--ckpt", trained, *argv, "--output", out)
    assert plain.code == 0, plain.err
    before = json.loads(out.read_text("utf-8"))
    assert not {"chain_rule", "samples", "real_text"} & before.keys() and "less bound" not in plain.out
    more = ("--chain_rule", 7, "--judge", twin, "--samples", 5, "--sample_steps", 6, "--batch_size", 3)
    result = command("evaluate", "--ckpt", trained, *argv, *more, "--output", out)
    assert result.code == 0, result.err
    after = json.loads(out.read_text("utf-8"))
    loaded, judge = checkpoint.load(trained), checkpoint.load(twin)
    windows = dataset.windows(dataset.load(data).val, 32, 40)
    assert sum(b["n"] for b in before["reliability"]) > 40 * 2 * 10

    some = [windows[i * 40 // 7] for i in range(7)]
    sizes = evaluate.text_sizes(some, loaded.tokenizer)[1]
    for name, order in evaluate.ORDERS.items():
        bits = diffusion.chain_rule(loaded.denoiser, torch.stack(some), order) * 32 / math.log(2)
        found = after["chain_rule"][name]["bits_per_byte"]
        assert found["mean"] == pytest.approx(float(bits.sum() / sizes.sum()), rel=1e-5)
        assert f"{found['mean']:.4f} ± {found['standard_error']:.4f}" in result.out
    nats = [after["per_window"]["nats"][i * 40 // 7] for i in range(7)]
    found = after["chain_rule"]["bound"]["bits_per_byte"]["mean"]
    assert found == pytest.approx(sum(nats) / math.log(2) / float(sizes.sum()))
    assert f"{after['chain_rule']['own_order']['bits_per_byte_less_bound']['mean']:.4f}" in result.out

    real = torch.stack([windows[i * 40 // 5][:24] for i in range(5)])  # the judge's window is the shorter one
    texts, how = quality.continued(loaded, real, 6, 6, batch_size=3)
    assert how == dict(strategy="confidence", steps=6, temperature=1.0, given=6)
    assert after["samples"] == quality.measure(texts, loaded.tokenizer, judge, 6) | {
        "judge": str(twin / "best.pt"), **how}  # fmt: skip
    nll = judge.denoiser.token_nll(real)[:, 6:].detach()
    assert after["real_text"]["judge_nats_per_token"]["mean"] == pytest.approx(float(nll.mean()), rel=1e-5)
    assert after["real_text"] == quality.measure(real.tolist(), loaded.tokenizer, judge, 6)
    assert after["real_text"]["invalid_utf8"] == 0 and after["real_text"]["tokens"] == 90 == after["samples"]["tokens"]
    for name in after["real_text"]:
        line = next(x for x in result.out.splitlines() if x.strip().startswith(name.replace("_", " ") + " "))
        for figure in (after["samples"][name], after["real_text"][name]):
            assert evaluate.show(figure) in line

    own = command("evaluate", "--ckpt", twin, *argv, "--judge", twin, "--samples", 2, "--output", out)
    assert own.code == 0, own.err
    after = json.loads(out.read_text("utf-8"))
    assert (after["samples"]["strategy"], after["samples"]["steps"]) == ("left_to_right", 18)
    assert sum(b["n"] for b in after["reliability"]) == after["tokens"]


def test_wrong_commands(command, trained, twin, tmp_path):
    other = tmp_path / "other"
    train(make_data(tmp_path / "data", seed=1), other, "--max_steps", 1, kind="autoregressive")
    before = {run: contents(run) for run in (trained, twin)}
    for ckpt, flags, why in (
        (trained, ("--judge", trained), "cannot judge: it is a transformer"),
        (trained, ("--judge", other), "cannot judge: it has another tokenizer"),
        (trained, ("--judge", tmp_path / "nothing"), "nothing"),
        (twin, ("--chain_rule", 1), "its likelihood is exact already; leave --chain_rule out"),
        (trained, ("--chain_rule", -1), "--chain_rule is -1"),
        (trained, ("--samples", 0), "--samples is 0"),
        (trained, ("--sample_steps", -2), "--sample_steps is -2"),
    ):
        refused = command("evaluate", "--ckpt", ckpt, "--device", "cpu", *flags)
        assert refused.code == 2 and why in refused.error() and not refused.out
    assert before == {run: contents(run) for run in (trained, twin)}

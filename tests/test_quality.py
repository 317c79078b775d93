"""quality.py: figures by hand, what the judge says token by token, aksharas that can and cannot be."""

import collections
import itertools
import math
import types
import unicodedata

import numpy as np
import pytest
import torch
from conftest import hindi
from toys import Toy, build, seeded

import quality
import tokenizer as tokenizers

BYTES = tokenizers.Bytes()


def loaded(kind="autoregressive", **sizes):
    model = build(kind, vocab_size=BYTES.vocab_size, **sizes).eval()
    return types.SimpleNamespace(denoiser=model, tokenizer=BYTES, kind=kind, path=f"runs/{kind}/best.pt")


# ---------------------------------------------------------------------------------------------------------------------
# variety


def test_variety_is_counted_over_what_was_written():
    texts = [[9, 9, 1, 2, 1, 2, 1, 2], [9, 1, 2, 3]]  # behind 2 and 1 given: 1 2 1 2 1 2 and 1 2 3
    figures = quality.measure(texts, BYTES, given=[2, 1])
    assert (figures["samples"], figures["tokens"]) == (2, 9) and "judge_nats_per_token" not in figures
    shares = [4 / 9, 4 / 9, 1 / 9]
    assert figures["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert figures["distinct_1"] == 3 / 9
    assert figures["distinct_2"] == 3 / 7  # 12 21 12 21 12, 12 23
    assert figures["distinct_3"] == 3 / 5  # 121 212 121 212, 123
    assert figures["repeated_4grams"] == pytest.approx(1 / 3)  # 1212 2121 1212
    assert quality.spread([[1, 2, 1, 2, 1, 2], [1, 2, 3]]) == pytest.approx((3 / 7, 1 / 3))


def test_nothing_written_is_the_worst():
    for texts, given in (([], 0), ([[5, 6]], 2), ([[]], 0)):
        figures = quality.measure(texts, BYTES, given=given)
        assert figures["tokens"] == figures["distinct_1"] == figures["unigram_entropy"] == 0
        assert figures["repeated_4grams"] == 1
    assert quality.measure([[5, 6]], BYTES, loaded(), 2)["judge_nats_per_token"]["mean"] is None
    for given in (3, -1, [0, 3], [0]):
        with pytest.raises(ValueError):
            quality.measure([[5, 6], [5, 6]], BYTES, given=given)


# ---------------------------------------------------------------------------------------------------------------------
# the judge


def test_the_judge_scores_what_was_written_and_reads_what_was_given():
    """Token by token, each from a pass over its own past; the error is that of the bootstrap over samples."""
    judge, g = loaded(noise=0.5), np.random.default_rng(0)
    sizes = [(int(n), int(g.integers(0, n + 1))) for n in g.integers(1, 17, 60)]  # tokens, of which were given
    sizes[0] = (16, 0)
    texts = [g.integers(4, 40, n).tolist() for n, _ in sizes]
    nats = []
    for text, (n, given) in zip(texts, sizes, strict=True):
        log_p = 0.0
        for t in range(given, n):
            x = torch.tensor([text[:t] + [0]])
            log_p += judge.denoiser(x)[0, t].double().log_softmax(0)[text[t]].item()
        nats.append(-log_p)
    given = [g for _, g in sizes]
    figures = quality.measure(texts, BYTES, judge, given)
    nats, tokens = np.array(nats), np.array([n - g for n, g in sizes])
    found = figures["judge_nats_per_token"]
    assert figures["tokens"] == tokens.sum() and found["mean"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    draws = g.integers(0, 60, (4000, 60))
    again = nats[draws].sum(1) / tokens[draws].sum(1)
    assert found["standard_error"] == pytest.approx(again.std(), rel=0.1)
    assert quality.measure(texts[:3], BYTES, judge)["judge_nats_per_token"]["mean"] == pytest.approx(
        float(judge.denoiser.nll(torch.tensor([texts[0]])) * 16 + sum(
            judge.denoiser.nll(torch.tensor([t])) * len(t) for t in texts[1:3])) / sum(map(len, texts[:3])), rel=1e-5
    )  # fmt: skip


def test_who_may_judge(data):
    other, twin = tokenizers.load(data / "tokenizer.model"), loaded()
    for judge, tokenizer, texts, why in (
        (twin, other, [[5]], "another tokenizer"),
        (loaded("transformer"), BYTES, [[5]], "it is a transformer"),
        (twin, BYTES, [[5], [5] * 17], "a text has 17 tokens.* 16"),
    ):
        with pytest.raises(ValueError, match=why):
            quality.measure(texts, tokenizer, judge)


# ---------------------------------------------------------------------------------------------------------------------
# spelling

GOOD = (
    "मैं कल बाज़ार गया था। क्ष त्र ज्ञ श्री स्त्री संस्कृत श्रीमान् हूँ आँख ईंट दुःख अः अंतः क़िला क्ख़ पढ़ा ज़्यादा बड़ी "
    "निर्ऋति ऋषि कॄ ऑफ़िस डॉक्टर ऍ ॲप ॐ ऽ "
    "राष्ट्र कार्य र्‍य क्‌ष क्‍ष हिन्‍दी नहीं १९४७ ॥ ॰ ◌ा ◌ि ◌् ◌़ \u00a0ी अग्नि॒मी॑ळे क॑ अ़ ऩ ऴ कॕ ॻ कॖ तत्त्वम् a é 1 नेपाल\u200dको "
    "x́ ê"
)
BAD = [" ा", " ँ", " ्", " ़", "aा", "ñ्", "१ा", "।ि", "काी", "कोे", "ाे", "का्", "कं्", "क्ा", "क््", "क्ं", "क्ः", "अा", "अ्", "एे",
       "ऽा", "का़", "कं़", "क़़", "कंं", "कँं", "कःं", "कःः", "ंक", "\ufffdा", "◌्ा", "텍्", "अि", "क्ॕ"]  # fmt: skip


def shares(text, given=0):
    figures = quality.measure([BYTES.encode(text)], BYTES, given=given)
    return figures["invalid_aksharas"], figures["invalid_utf8"]


def test_what_is_written_in_hindi_can_be():
    wrong = [word for word in GOOD.split(" ") if shares(word) != (0, 0)]
    assert not wrong and shares(GOOD) == (0, 0) and shares(hindi(20)) == (0, 0)
    assert shares("no Hindi, été, 한국어") == (0, 0)


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be(bad):
    """Among 19 aksharas that can be; the bad piece has one that cannot, and perhaps one that can."""
    good = "क" * 9 + "कि" * 10 + " "
    wrong, broken = shares(good + bad)
    assert wrong in (1 / 20, pytest.approx(1 / 21)) and broken == 0
    assert shares(good + "\n" + bad)[0] == wrong


def by_names(cluster):
    """The rules once more, character by character, from Unicode's names: what may follow what."""
    may = "start"
    for c in unicodedata.normalize("NFC", cluster):
        name = unicodedata.name(c, "")
        is_vowel = name.startswith("DEVANAGARI LETTER ") and name.split()[2][0] in "AEIOU"
        kind = next(k for k, found in (
            ("joiner", "JOINER" in name), ("virama", name.endswith("VIRAMA")), ("nukta", name.endswith("NUKTA")),
            ("matra", "VOWEL SIGN" in name), ("bindu", name.endswith(("CANDRABINDU", "ANUSVARA"))),
            ("visarga", name.endswith("VISARGA")), ("vowel", is_vowel), ("consonant", "LETTER" in name),
            ("other", True)) if found)  # fmt: skip
        if kind == "joiner":
            continue
        table = {
            "start": {"consonant": "consonant", "vowel": "vowel"},
            "consonant": {"nukta": "dotted", "virama": "dead", "matra": "done", "bindu": "bound", "visarga": "end"},
            "dotted": {"virama": "dead", "matra": "done", "bindu": "bound", "visarga": "end"},
            "dead": {"consonant": "consonant", "vowel": "vowel"},
            "vowel": {"nukta": "done", "bindu": "bound", "visarga": "end"},
            "done": {"bindu": "bound", "visarga": "end"},
            "bound": {"visarga": "end"},
        }
        may = table.get(may, {}).get(kind)
    return may not in (None, "start")


def test_every_short_string_against_unicodes_names():
    alphabet, seen = "कअाि़्ंः\u200d", collections.Counter()
    strings = ("".join(chars) for n in range(1, 5) for chars in itertools.product(alphabet, repeat=n))
    for cluster in {c for s in strings for c in quality.CLUSTER.findall(s) if quality.DEVANAGARI.search(c)}:
        assert quality.possible(cluster) == by_names(cluster), ascii(cluster)
        seen[by_names(cluster)] += 1
    assert min(seen[True], seen[False]) > 100, seen
    text = [c for c in hindi(20) if c not in " \n।"]
    shuffled = "".join(np.random.default_rng(0).permutation(text))
    wrong = [not by_names(c) for c in quality.CLUSTER.findall(shuffled)]
    assert shares(shuffled)[0] == np.mean(wrong) > 0.15 and shares("".join(text)) == (0, 0)


def test_a_mark_may_stand_behind_what_was_given():
    """One text, cut at every byte: an akshara counts if its last byte was written, a character too."""
    text = "कि ी रा"  # three bytes each, but the spaces; the second one cannot be
    ids = BYTES.encode(text)
    assert len(ids) == 17
    for given in range(18):
        wrong, broken = shares(text, given)
        ends = [(6, 0), (10, 1), (17, 0)]
        kept = [bad for end, bad in ends if end > given]
        assert broken == 0 and wrong == (sum(kept) / len(kept) if kept else 0)
    parted = [*BYTES.encode("क"), BYTES.eos_id, *BYTES.encode("ा")]  # EOS ends a document: the matra has no consonant
    for given, expected in ((0, 1 / 2), (3, 1), (4, 1)):
        assert quality.measure([parted], BYTES, given=given)["invalid_aksharas"] == expected


def test_broken_characters_against_pythons_own_decoder():
    g = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray("मैं a é 👩 \ufffd।".encode() * 2)
        for _ in range(g.integers(0, 4)):
            data[g.integers(len(data))] = g.integers(256)
        data = bytes(data) + b"."
        given = int(g.integers(0, 6))
        whole = data.decode("utf-8", "replace")
        genuine = data.count("\ufffd".encode())
        figures = quality.measure([[4 + b for b in data]], BYTES)
        assert figures["invalid_utf8"] == pytest.approx((whole.count("\ufffd") - genuine) / len(whole))
        first = [4 + b for b in b"x" * given]
        behind = quality.measure([first + [4 + b for b in data]], BYTES, given=given)
        assert behind["invalid_utf8"] == figures["invalid_utf8"]


def test_a_character_that_the_end_cuts_is_not_broken():
    ids = BYTES.encode("कख")
    for n, broken in ((6, 0), (5, 0), (4, 0), (3, 0), (2, 0)):
        assert quality.measure([ids[:n]], BYTES)["invalid_utf8"] == broken
    assert quality.measure([ids[:5] + [BYTES.eos_id]], BYTES)["invalid_utf8"] == 1 / 2  # ended, not cut
    assert quality.measure([ids[:5] + BYTES.encode("a")], BYTES)["invalid_utf8"] == 1 / 3
    assert quality.measure([ids[1:]], BYTES)["invalid_utf8"] == 2 / 3  # two bytes that begin nothing, and ख
    assert quality.measure([ids], BYTES, given=1)["invalid_utf8"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize("kind", ["transformer", "autoregressive"])
def test_continued_keeps_what_was_given_and_is_seeded(kind):
    model = loaded(kind, noise=0.5)
    rows = torch.randint(4, 260, (5, 16), generator=seeded())
    texts, how = quality.continued(model, rows, 4, seed=1)
    assert [t[:4] for t in texts] == rows[:, :4].tolist() and [len(t) for t in texts] == [16] * 5
    written = collections.Counter(i for t in texts for i in t[4:])
    assert not {0, 1, 3, model.denoiser.mask_id} & written.keys()
    assert quality.continued(model, rows, 4, seed=1)[0] == texts != quality.continued(model, rows, 4, seed=2)[0]
    strategy = "confidence" if kind == "transformer" else "left_to_right"
    assert how == dict(strategy=strategy, steps=12, temperature=1.0, given=4)
    other = rows.clone()
    other[:, 4:] = 7  # the real text behind what was given is not read
    assert quality.continued(model, other, 4, seed=1)[0] == texts
    ends = loaded(kind)
    with torch.no_grad():
        ends.denoiser.embed.weight[BYTES.eos_id] *= 100
    assert len(quality.continued(ends, rows, 4)[0][0]) == 16  # EOS ends a document, not the window


@pytest.mark.parametrize("steps, forwards", [(0, 12), (3, 3), (12, 12), (50, 12)])
def test_continued_takes_as_many_forwards_as_asked(steps, forwards):
    V = BYTES.vocab_size
    toy = Toy(lambda x_t: torch.zeros(*x_t.shape, V), V=V)
    model = types.SimpleNamespace(denoiser=toy, tokenizer=BYTES)
    _, how = quality.continued(model, torch.full((5, 16), 9), 4, steps, batch_size=2)
    assert how["steps"] == forwards and len(toy.seen) == 3 * forwards  # batches of 2, 2 and 1
    assert [len(x) for x in toy.seen[::forwards]] == [2, 2, 1]

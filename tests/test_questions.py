"""questions.py: answers that are right and wrong by hand, models that know or echo, intervals solved another way."""

import json
import math
import shutil
import types

import pytest
import torch
from conftest import contents, train
from toys import Toy, build

import chat
import checkpoint
import intervals
import prepare
import questions
import tokenizer as tokenizers
from config import PrepareConfig

BYTES = tokenizers.Bytes()
CAPITALS = "पटना लखनऊ जयपुर भोपाल रांची रायपुर शिमला देहरादून गांधीनगर मुंबई".split()
STATES = "बिहार उत्तरप्रदेश राजस्थान मध्यप्रदेश झारखंड छत्तीसगढ़ हिमाचल उत्तराखंड गुजरात महाराष्ट्र".split()


def item(id, question, answers, subject, **more):
    base = dict(form="cloze" if "___" in question else "question", language="hi", level="easy", source="by hand")
    return dict(id=id, question=question, answers=answers, subject=subject, **base) | more


ITEMS = [
    item(f"capital{i}", f"{state} की राजधानी क्या है?", [capital], state)
    for i, (state, capital) in enumerate(zip(STATES, CAPITALS, strict=True))
] + [
    item("sum", "दो और तीन का जोड़ ___ है।", ["5", "पाँच", "paanch"], "जोड़", level="medium"),
    item("author", "Who wrote Godan?", ["Premchand", "Munshi Premchand"], "Godan", language="en", level="hard"),
]


def write(path, items):
    lines = (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in items)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# what is right


PATNA = ("बिहार की राजधानी क्या है?", ["पटना", "Patna"])
JK = ("श्रीनगर कहाँ है?", ["जम्मू और कश्मीर"])
PI = ("पाई का मान दो स्थान तक?", ["3.14"])
THREE = ("त्रिभुज में कितनी भुजाएँ?", ["3", "तीन"])
SUN = ("सूर्य ग्रह नहीं, एक ___ है।", ["तारा"])
AMBEDKAR = ("संविधान किसने लिखा?", ["डॉ. बी. आर. अंबेडकर", "B. R. Ambedkar"])


@pytest.mark.parametrize(("output", "asked"), [
    ("पटना", PATNA), ("  पटना।\n", PATNA), ("PATNA!", PATNA), ("«पटना»", PATNA), ("पट\u200dना", PATNA),
    ("बिहार की राजधानी पटना है।", PATNA), ("बिहार की राजधानी पटना है, जो गंगा नदी के किनारे बसा पुराना शहर है।", PATNA),
    ("उत्तर: पटना", PATNA), ("Patna. It lies on the Ganges.", PATNA), ("\n\nपटना\nUser: और?", PATNA),
    ("पटना, लखनऊ", PATNA), ("जम्मू और कश्मीर में", JK), ("श्रीनगर जम्मू और कश्मीर में है।", JK), ("3.14", PI), ("३.१४ है", PI),
    ("सूर्य ग्रह नहीं, एक तारा है।", SUN), ("एक तारा", SUN),
    ("३", THREE), ("तीन भुजाएं", THREE),
    ("B. R. Ambedkar", AMBEDKAR), ("डॉ. बी. आर. अम्बेडकर ने", AMBEDKAR), ("It was B. R. Ambedkar.", AMBEDKAR),
])  # fmt: skip
def test_right(output, asked):
    assert questions.right(output, *asked)


@pytest.mark.parametrize(("output", "asked"), [
    ("", PATNA), (" \n ", PATNA), ("।", PATNA), ("!?", PATNA), (PATNA[0], PATNA), ("बिहार", PATNA),
    (" ".join(CAPITALS), PATNA), (", ".join(CAPITALS[::-1]), PATNA), (" ".join(CAPITALS[::-1]), PATNA),
    (" और ".join(CAPITALS), PATNA), ("लखनऊ, पटना", PATNA), ("लखनऊ / पटना", PATNA), ("पटनायक", PATNA), ("पटनामें", PATNA),
    ("लखनऊ। पटना।", PATNA), ("लखनऊ\nपटना", PATNA), ("Lucknow. Patna.", PATNA), ("लखनऊ नहीं पटना", PATNA),
    ("पटना नहीं है", PATNA), ("It is not Patna.", PATNA), ("पटना या लखनऊ", PATNA), ("Lucknow or Patna", PATNA),
    ("लखनऊ और पटना", PATNA), ("नहीं, पटना", PATNA), ("बिहार की राजधानी क्या है? पटना", PATNA), ("पट ना", PATNA),
    ("जम्मू", JK), ("कश्मीर और जम्मू", JK), ("जम्मू, श्रीनगर और कश्मीर", JK),
    ("3", PI), ("13.14", PI), ("3.141", PI), ("314", PI),
    ("3.14", THREE), ("13", THREE), ("३०", THREE), ("1 2 3 4 5 6 7 8 9", THREE),
    ("1,2,3", THREE),
    ("Ambedkar", AMBEDKAR), ("सूर्य ग्रह है, एक तारा", SUN), ("सूर्य, तारा", SUN), ("एक ग्रह, तारा", SUN),
])  # fmt: skip
def test_wrong(output, asked):
    assert not questions.right(output, *asked)


def test_an_answer_may_hold_so_many_other_words_and_no_more():
    for n in range(10):
        said = " ".join([*"abcdefghi"[:n], "पटना"])
        assert questions.right(said, *PATNA) == (n <= questions.OTHERS)
        assert questions.right(f"बिहार की राजधानी {said} क्या", *PATNA) == (n <= questions.OTHERS)  # asked: free


@pytest.mark.parametrize(("a", "b"), [
    ("क़लम", "\u0958लम"), ("क़लम", "कलम"), ("बाज़ार", "बाजार"), ("पढ़ाई", "पढाई"), ("हिन्दी", "हिंदी"),
    ("मुम्बई", "मुंबई"), ("चण्डीगढ़", "चंडीगढ"),
    ("गङ्गा", "गंगा"), ("पञ्जाब", "पंजाब"), ("चाँद", "चांद"), ("क्\u200dष", "क्ष"), ("क्\u200cष", "क्ष"), ("१९४७", "1947"),
    ("1,00,000", "100000"), ("São Tomé", "sao tome"), ("STRASSE", "straße"), ("जल-प्रपात", "जल प्रपात"),
    ("‘Rupee’ (₹)!", "rupee"), ("a_b", "A B"),
])  # fmt: skip
def test_spellings_of_one_word(a, b):
    assert questions.words(a) == questions.words(b) != []


@pytest.mark.parametrize(("a", "b"), [
    ("दिन", "दीन"), ("कल", "काल"), ("मैं", "में"), ("कम", "कर्म"), ("सन", "संन"), ("1.5", "15"), ("अन्य", "अंय"), ("जन्म", "जंम"),
])  # fmt: skip
def test_different_words(a, b):
    assert questions.words(a) != questions.words(b)


# ---------------------------------------------------------------------------------------------------------------------
# figures


def test_wilson_solves_its_equation():
    """Its ends are where (k/n - p)² = z² p (1 - p) / n, found here by bisection; and three values of the literature."""
    z = 1.959963985
    for n in (1, 7, 10, 168):
        for k in range(n + 1):
            outside = lambda p: (k / n - p) ** 2 - z * z * p * (1 - p) / n > 0  # noqa: B023, E731
            found = []
            for far, near in ((0.0, k / n), (1.0, k / n)):
                for _ in range(60):
                    middle = (far + near) / 2
                    far, near = (middle, near) if outside(middle) else (far, middle)
                found.append(near)
            assert intervals.wilson(k, n) == pytest.approx(found, abs=1e-6)
    assert intervals.wilson(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)
    assert intervals.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert intervals.wilson(10, 10) == pytest.approx((0.7225, 1), abs=5e-5)
    assert intervals.wilson(0, 0) == (0, 1) and intervals.wilson(0, 3)[0] == 0 and intervals.wilson(3, 3)[1] == 1
    with pytest.raises(ValueError):
        intervals.wilson(4, 3)


def test_the_majority_baseline_is_the_best_constant():
    answers = ["गङ्गा", "Ganges"], ["यमुना", "गंगा नदी"], ["ganges"], ["नदी"]
    more = [item(f"m{i}", f"{i}?", some, "x") for i, some in enumerate(answers)]
    answer, marks = questions.majority(ITEMS + more)
    assert answer == "गंगा नदी" and marks == [False] * 12 + [True, True, False, True]  # गंगा नदी, and नदी, and गंगा
    by_hand = {a: [questions.right(a, i["question"], i["answers"]) for i in ITEMS + more]
               for i in ITEMS + more for a in i["answers"]}  # fmt: skip
    assert sum(by_hand[answer]) == max(map(sum, by_hand.values()))
    assert questions.majority(ITEMS)[1].count(True) == 1


# ---------------------------------------------------------------------------------------------------------------------
# models that know, models that echo


def knowing(answers, V=BYTES.vocab_size, sure=9.0):
    """A denoiser that fills the places behind each prompt with its answer's ids, then EOS; the surest from the right,
    so that another order than from left to right shows."""
    table = {  # asked in so many ids: answered by these
        tuple(chat.prompt([{"role": "user", "content": q}], BYTES)): BYTES.encode(a) + [BYTES.eos_id]
        for q, a in answers.items()
    }

    def logits(x_t):
        out = torch.zeros(*x_t.shape, V)
        for row, ids in enumerate(x_t.tolist()):
            prompt = next(p for p in table if all(a in (b, V) for a, b in zip(ids, p, strict=False)))
            answer = table[prompt]
            for at in (i for i in range(len(prompt), len(ids)) if ids[i] == V):
                out[row, at, answer[min(at - len(prompt), len(answer) - 1)]] = sure + at
                out[row, at, [BYTES.pad_id, BYTES.unk_id]] = 99.0  # never drawn
        return out

    toy = Toy(logits, V=V)
    toy.config, toy.block_length = types.SimpleNamespace(max_seq_len=400), 0
    return toy


class KnowingTwin(torch.nn.Module):
    """The same knowledge from left to right: its cache is what it was shown."""

    def __init__(self, toy):
        super().__init__()
        self.toy, self.mask_id, self.config, self.anchor = toy, toy.mask_id, toy.config, toy.anchor

    def cache(self, B, T):
        return torch.full((B, T + 1), -1)

    def extend(self, x, cache, start):
        cache[:, start : start + x.shape[1]] = x
        end = start + x.shape[1]
        shown = torch.where(cache[:, 1:end] == -1, 0, cache[:, 1:end])
        return self.toy.f(torch.nn.functional.pad(shown, (0, 1), value=self.mask_id))[:, -1]


def loaded(model, config=None):
    return types.SimpleNamespace(denoiser=model, tokenizer=BYTES, config=config or {}, path="runs/a/best.pt", step=7)


KNOWN = {i["question"]: i["answers"][-1] for i in ITEMS}


@pytest.mark.parametrize("kind", ["denoiser", "twin"])
def test_a_model_that_knows_is_right_and_one_that_echoes_is_wrong(kind):
    wrap = KnowingTwin if kind == "twin" else lambda toy: toy
    n = 1 + max(len(BYTES.encode(a)) for a in KNOWN.values())
    for answers, share in (
        (KNOWN, 1.0),
        ({q: q for q in KNOWN}, 0.0),
        (dict.fromkeys(KNOWN, ""), 0.0),
        (dict.fromkeys(KNOWN, ", ".join(CAPITALS)), 1 / 12),  # the first entry of a list
        (KNOWN | {ITEMS[0]["question"]: "लखनऊ", ITEMS[-1]["question"]: "Tagore"}, 10 / 12),
    ):
        result = questions.evaluate(loaded(wrap(knowing(answers))), ITEMS, n=n if share == 1 else 40, batch_size=5)
        figure = result["accuracy"]
        assert (figure["n"], figure["mean"], figure["right"]) == (12, share, round(12 * share))
        assert (figure["low"], figure["high"]) == intervals.wilson(figure["right"], 12)
        for row, i in zip(result["items"], ITEMS, strict=True):  # in the file's order
            assert row["id"] == i["id"] and answers[i["question"]].startswith(row["output"].rstrip("\ufffd"))
            assert row["right"] == questions.right(row["output"], i["question"], i["answers"])
        for values in result["by"].values():
            assert sum(f["n"] for f in values.values()) == 12
            assert sum(f["right"] for f in values.values()) == figure["right"]
        sizes = {k: {v: f["n"] for v, f in values.items()} for k, values in result["by"].items()}
        assert sizes == {
            "form": {"question": 11, "cloze": 1}, "language": {"hi": 11, "en": 1},
            "level": {"easy": 10, "medium": 1, "hard": 1}}  # fmt: skip
        assert result["majority"]["right"] == 1


def test_an_answer_is_cut_at_its_tokens_and_takes_a_forward_each():
    toy = knowing(dict.fromkeys(KNOWN, "Premchand"))
    assert questions.ask(loaded(toy), ITEMS, 4) == ["Prem"] * 12
    assert len(toy.seen) == 4  # one batch
    for before, after in zip(toy.seen, [*toy.seen[1:], None], strict=True):
        if after is not None:
            changed = before != after
            place = torch.arange(before.shape[1])
            assert (changed.sum(1) == 1).all()  # one token a row
            first_open = torch.where(before == toy.mask_id, place, 999).amin(1)
            assert torch.equal(torch.where(changed, place, 999).amin(1), first_open)  # the leftmost
    toy = knowing(dict.fromkeys(KNOWN, "Premchand"))
    toy.block_length = 8  # rows whose open places lie in different blocks share no step too few
    assert questions.ask(loaded(toy), ITEMS, 9) == ["Premchand"] * 12
    for before, after in zip(toy.seen, toy.seen[1:], strict=False):
        assert ((before != after[:, : before.shape[1]]).sum(1) <= 1).all()
    for asked, n in (("Who wrote Godan?", 380), ("x" * 500, 1)):
        with pytest.raises(ValueError, match=r"question a takes \d+ tokens .* the window of .* holds 400"):
            questions.ask(loaded(toy), [item("a", asked, ["b"], "c")], n)


@pytest.mark.parametrize("kind", ["transformer", "blocks", "eco_hybrid", "autoregressive"])
def test_real_models_answer_alike_in_any_batch(kind):
    """Rows of other lengths beside it change no answer, which is the argmax, one token after the other."""
    sizes = dict(vocab_size=BYTES.vocab_size, max_seq_len=160, noise=0.5)
    model = build("transformer", block_length=8, **sizes) if kind == "blocks" else build(kind, **sizes)
    one, alone, n = loaded(model.eval()), [], 12
    for i in ITEMS[-3:]:
        ids = chat.prompt([{"role": "user", "content": i["question"]}], BYTES)
        out = []
        for _ in range(n):
            if kind == "autoregressive":
                logits = model(torch.tensor([ids + out + [0]]))[0, -1]
            else:
                end = len(ids) + n
                if kind == "blocks":  # nothing behind a block is seen
                    end = min(end, (len(ids + out) // 8 + 1) * 8)
                row = ids + out + [model.mask_id] * (end - len(ids + out))
                logits = model(torch.tensor([row]))[0, len(ids + out)]
            logits[[BYTES.pad_id, BYTES.bos_id, BYTES.unk_id]] = -math.inf
            out.append(int(logits.argmax()))
            if out[-1] == BYTES.eos_id:
                break
        alone.append(chat.answer(out, BYTES))
    for batch_size in (1, 2, 32):
        assert questions.ask(one, ITEMS[-3:], n, batch_size) == alone


# ---------------------------------------------------------------------------------------------------------------------
# the file of questions


def test_a_wrong_file_is_named_with_its_line(tmp_path):
    good = ITEMS[0] | {"id": "new"}
    cases = [
        ("{", "line 3"), ("[1]", "no JSON object"), (good | {"id": "capital0"}, "'capital0' came before"),
        (good | {"id": ""}, "its id is ''"), (good | {"id": 7}, "its id is 7"), (good | {"subject": "?"}, "subject"),
        ({k: v for k, v in good.items() if k != "question"}, "its question is None"),
        (good | {"form": "riddle"}, "not one of question, cloze"), (good | {"language": "fr"}, "not one of hi, en"),
        (good | {"level": 1}, "not one of easy"), (good | {"answers": "पटना"}, "list"),
        (good | {"answers": []}, "list"),
        (good | {"answers": [7]}, "no word"), (good | {"answers": ["।"]}, "no word"),
        (good | {"question": "___ है?"}, "a question has no ___"), (good | {"form": "cloze"}, "a cloze needs ___"),
        (good | {"question": "पटना किस राज्य में है?"}, "'पटना' stands in its question"),
        (good | {"answers": ["पटना", "बिहार"]}, "'बिहार' stands in its question"),
    ]  # fmt: skip
    good = good | {"id": "capital0"}
    for wrong, why in cases:
        path = write(tmp_path / "qa.jsonl", [good, "", wrong])
        with pytest.raises(ValueError, match="line 3") as e:
            questions.load(path)
        assert why in str(e.value) and str(path) in str(e.value)
    path.write_bytes(json.dumps(good).encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match="line 2"):
        questions.load(path)
    for empty in ("", "\n \n"):
        path.write_text(empty)
        with pytest.raises(ValueError, match="no questions"):
            questions.load(path)
    assert questions.load(write(path, [*ITEMS, ""])) == ITEMS


# ---------------------------------------------------------------------------------------------------------------------
# what the training text held


def test_a_fact_is_met_where_subject_and_answer_stand_together():
    far = " ".join(["शब्द"] * (questions.NEAR + 1))
    near = " ".join(["शब्द"] * (questions.NEAR - 1))
    for text, found in (
        ("बिहार की राजधानी पटना है।", {"capital0"}),
        ("पटना, बिहार", {"capital0"}),
        ("बिहारी पटनायक", set()),
        (f"बिहार {far} पटना", set()),
        (f"पटना {far} बिहार", set()),
        (f"बिहार {near} पटना", {"capital0"}),
        (f"बिहार {far} बिहार {near} पटना", {"capital0"}),
        ("GODAN is a novel by Munshi premchand", {"author"}),
        ("जोड़ paanch, राजस्थान जयपुर", {"sum", "capital2"}),
        ("लखनऊ बिहार", set()),
        ("", set()),
    ):
        assert questions.met(ITEMS, [text]) == found, text
    assert questions.met(ITEMS, ["बिहार", "पटना"]) == set()  # two documents
    assert questions.met([item("delhi", "भारत?", ["नई दिल्ली"], "दिल्ली")], ["नई दिल्ली"]) == set()  # one mention of both
    assert questions.met([item("delhi", "भारत?", ["नई दिल्ली"], "दिल्ली")], ["दिल्ली नई दिल्ली"]) == {"delhi"}
    english = item("oz", "Which city is the capital of Australia?", ["Canberra"], "Australia")
    english |= dict(hindi=dict(subject="ऑस्ट्रेलिया", answers=["कैनबरा"]))  # and what Hindi text says of it
    assert questions.met([english], ["ऑस्ट्रेलिया की राजधानी कैनबरा है।"]) == {"oz"}
    assert questions.met([english], ["कैनबरा", "ऑस्ट्रेलिया", "Australia is large"]) == set()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A prepared folder whose training text holds three of the facts, and runs of both kinds on it."""
    root = tmp_path_factory.mktemp("taught")
    facts = [f"{s} की राजधानी {c} है।" for s, c in zip(STATES[:3], CAPITALS[:3], strict=True)]
    other = [f"राम खेत में पानी लाता है। यह पाठ संख्या {i} है।" for i in range(400)]
    (root / "text.txt").write_text("\n\n".join(facts + other), encoding="utf-8")
    folder = root / "data"
    cfg = PrepareConfig(input=str(root / "text.txt"), output_dir=str(folder), tokenizer="bytes", val_fraction=0.2)
    prepare.prepare(cfg)
    for kind in ("transformer", "autoregressive"):
        train(folder, root / kind, "--seq_len", 160, "--max_steps", 2, "--eval_windows", 2, kind=kind)
    return root


def test_a_row_of_chats_is_one_text(tmp_path, command, taught):
    """Whatever stands between question and answer; and what a run began from is searched too."""
    chats = [(f"{s} की राजधानी?", c) for s, c in zip(STATES, CAPITALS, strict=True)]
    rows = [{"messages": [dict(role="user", content=q), dict(role="assistant", content=a)]} for q, a in chats]
    path, out = write(tmp_path / "chats.jsonl", rows), tmp_path / "chat"
    argv = ("--data", path, "--val_fraction", 0.3, "--device", "cpu", "--amp", "off", "--eval_windows", 1)
    more = ("--max_steps", 1, "--batch_size", 2, "--grad_accum", 1, "--seq_len", 160, "--output_dir", out)
    done = command("train_instruct", "--init", taught / "transformer", *argv, *more)
    assert done.code == 0, done.err
    texts = list(questions.documents(out / "data"))
    assert set(texts) == {f"प्रश्न: {q}\nउत्तर: {a}" for q, a in chats if any(q in t for t in texts)}
    tuned = {f"capital{i}" for i in range(10) if any(chats[i][0] in t for t in texts)}
    result = questions.contamination(ITEMS, checkpoint.load(out))
    assert 0 < len(tuned) < 10 and set(result["found"]) == tuned | set(truly_met(taught / "data"))
    assert result["searched"] == [str(out / "data"), str(taught / "data")] and not result["unknown"]


def truly_met(folder):
    text = "\n".join(questions.documents(folder))
    return sorted(f"capital{i}" for i in range(10) if f"{STATES[i]} की राजधानी {CAPITALS[i]}" in text)


def test_the_training_text_of_a_run_and_of_what_it_began_from(taught, tmp_path):
    folder, run = taught / "data", taught / "transformer"
    found, one = truly_met(folder), checkpoint.load(run)
    assert len(list(questions.documents(folder))) > 300 and found  # by hash, one of the three may be held out
    result = questions.contamination(ITEMS, one)
    assert result == {"near": questions.NEAR, "searched": [str(folder)], "unknown": [], "found": found}
    one.config |= {"data_dir": str(tmp_path / "gone"), "init": str(run / "best.pt")}  # tuned on what is gone
    result = questions.contamination(ITEMS, one)
    assert result["found"] == found and result["searched"] == [str(folder)] and "gone" in result["unknown"][0]
    one.config |= {"data_dir": str(folder), "data_sha256": "0" * 64, "init": "hub:google/muril"}
    result = questions.contamination(ITEMS, one)
    assert not result["found"] and not result["searched"]
    assert "prepared again since" in result["unknown"][0] and "hub:google/muril" in result["unknown"][1]
    assert questions.contamination(ITEMS, one, folder) == questions.contamination(ITEMS, checkpoint.load(run))
    with pytest.raises(FileNotFoundError):
        questions.contamination(ITEMS, one, tmp_path / "gone")
    knows = loaded(knowing({q: a if "राजस्थान" not in q else "x" for q, a in KNOWN.items()}), {"data_dir": str(folder)})
    result, held = questions.evaluate(knows, ITEMS, n=40), "capital2" in found
    within, without = (result["contamination"][f"accuracy_{name}"] for name in ("of_found", "without"))
    assert (within["n"], within["right"]) == (len(found), len(found) - held)
    assert (without["n"], without["right"]) == (12 - len(found), 12 - len(found) - (not held))
    assert [row["id"] for row in result["items"] if row["in_training_text"]] == found


# ---------------------------------------------------------------------------------------------------------------------
# by command


def test_the_command_adds_to_eval_json_and_scores_no_text(command, taught, tmp_path, monkeypatch):
    path = write(tmp_path / "mine.jsonl", ITEMS)
    for kind in ("transformer", "autoregressive"):
        run = tmp_path / kind
        shutil.copytree(taught / kind, run)
        out, argv = run / "eval.json", ("--ckpt", run, "--device", "cpu", "--masks", 1, "--max_windows", 2)
        out.unlink(missing_ok=True)
        short = ("--qa", path, "--answer_tokens", 5)
        asked = command("evaluate", *argv, *short)
        assert asked.code == 0, asked.err
        first = json.loads(out.read_text("utf-8"))
        assert list(first) == ["checkpoint", "step", "kind", "ema", "qa"] and "bits/byte" not in asked.out
        assert "12 questions of" in asked.out and ITEMS[0]["question"] in out.read_text("utf-8")
        one = checkpoint.load(run)
        again = questions.evaluate(one, ITEMS, 5)
        assert {k: first["qa"][k] for k in again} == again
        assert f"{again['accuracy']['right']} of 12; 95 % interval 0.0% to 24.2%" in asked.out  # 1 / (1 + 12 / 1.96²)
        assert first["qa"]["sha256"] == checkpoint.sha256(path) and first["qa"]["contamination"]["searched"]

        scored = command("evaluate", *argv)  # a likelihood joins it
        assert scored.code == 0, scored.err
        second = json.loads(out.read_text("utf-8"))
        assert second["qa"] == first["qa"] and second["bits_per_byte"]["mean"] > 0
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir(exist_ok=True)
        write(tmp_path / "data" / "qa.jsonl", ITEMS[:4])
        assert command("evaluate", *argv, "--qa", "--answer_tokens", 5).code == 0  # and questions join a likelihood
        third = json.loads(out.read_text("utf-8"))
        assert third["qa"]["accuracy"]["n"] == 4 and third["qa"]["file"] == "data/qa.jsonl"
        assert {k: v for k, v in third.items() if k != "qa"} == {k: v for k, v in second.items() if k != "qa"}

        before = contents(run)  # figures of another checkpoint do not mix
        refused = command("evaluate", "--ckpt", run / "latest.pt", "--no_ema", *argv[2:], *short)
        assert refused.code == 2 and "is of another checkpoint" in refused.error() and contents(run) == before
        elsewhere = tmp_path / f"{kind}.json"
        assert command("evaluate", *argv, *short, "--no_ema", "--output", elsewhere).code == 0
        assert command("evaluate", *argv, "--output", elsewhere).code == 0
        assert "qa" not in json.loads(elsewhere.read_text("utf-8"))  # of other weights
        moved = tmp_path / f"moved_{kind}"
        shutil.copytree(run, moved)
        assert command("evaluate", "--ckpt", moved, *argv[2:], *short).code == 0  # a run folder may move
        assert json.loads((moved / "eval.json").read_text("utf-8"))["bits_per_byte"] == second["bits_per_byte"]


def test_wrong_commands(command, taught, tmp_path):
    run, path = taught / "transformer", write(tmp_path / "qa.jsonl", ITEMS)
    wrong = write(tmp_path / "wrong.jsonl", [ITEMS[0], "{}"])
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    (alone / "eval.json").write_text('{"qa": {}}')
    before = contents(run)
    for argv, why in (
        (("--qa", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--qa", wrong), "wrong.jsonl, line 2: its id is None"),
        (("--qa", path, "--answer_tokens", 0), "--answer_tokens is 0"),
        (("--qa", path, "--answer_tokens", 150), "takes"),
        (("--qa", path, "--chain_rule", 2), "--chain_rule needs; run both in turn"),
        (("--qa", path, "--judge", run), "--judge needs"),
        (("--qa", path, "--check"), "--check needs"),
        (("--qa", path, "--against", run), "--against needs"),
        (("--qa", path, "--data_dir", tmp_path / "gone"), "gone"),
        (("--qa", path, "--output", tmp_path / "no" / "eval.json"), "there is no folder"),
        (("--against", alone), "holds no likelihood"),
    ):
        refused = command("evaluate", "--ckpt", run, "--device", "cpu", *argv)
        assert refused.code == 2 and why in refused.error(), refused.err
    assert contents(run) == before
    (alone / "eval.json").write_text("{")
    refused = command("evaluate", "--ckpt", alone, "--device", "cpu", "--qa", path, "--answer_tokens", 3)
    assert refused.code == 1 and "is damaged" in refused.error() and (alone / "eval.json").read_text() == "{"

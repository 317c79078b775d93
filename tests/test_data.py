"""data/: what is written is well-formed and right where it can be recomputed; the questions are apart from it."""

import calendar
import collections
import functools
import itertools
import json
import re
import unicodedata
from fractions import Fraction

import pytest
import regex
from conftest import ROOT

import facts
import quality
import romanize

INSTRUCT = facts.read_jsonl(ROOT / "data/instruct.jsonl")
QA = facts.read_jsonl(ROOT / "data/qa.jsonl")
FACTS = json.loads((ROOT / "data/facts.json").read_text("utf-8"))
TABLES = FACTS["tables"]
HELD_OUT = [item["fact"] for item in QA]
PAIRS = facts.generate(FACTS, HELD_OUT, seed=0, romanized=0.2)
LATIN = re.compile("[A-Za-z]")


def contents(pair):
    return [turn["content"] for turn in pair["messages"]]


def words(text):
    """Lower-case words without punctuation."""
    return regex.findall(r"[\p{L}\p{M}\p{N}]+", unicodedata.normalize("NFC", text).lower())


@functools.cache
def possible(cluster):
    return not quality.DEVANAGARI.search(cluster) or quality.possible(cluster)


def faults(text):
    """What is wrong with the writing of a text: an empty list where nothing is."""
    found = [] if text == unicodedata.normalize("NFC", text) else ["not NFC"]
    found += [f"character {c!r}" for c in regex.findall(r"[\p{C}--\n]", text, regex.V1)]
    found += [f"akshara {c!r}" for c in set(regex.findall(r"\X", text)) if not possible(c)]
    if text != text.strip() or "  " in text or re.search(r"[\u0900-\u097f] [।?!,]", text):
        found.append("spaces")
    if text.count('"') % 2 or text.count("(") != text.count(")"):
        found.append("pairs of quotes or brackets")
    return found


def test_faults_are_found():
    assert faults("\u0958लम\n") == ["not NFC", "spaces"]
    for wrong in ("कााम", "ा", "क\u200bम", "कम\tहै", "राम ।", '"राम', "राम  है"):
        assert len(faults(wrong)) == 1, wrong
    assert not faults("विद्या + आलय = विद्यालय।\nक्षत्रिय, ज्ञान, हूँ; 3 × 4 (दो बार)")


# ---------------------------------------------------------------------------------------------------------------------
# the pairs written one by one


def test_written_pairs_are_many_and_well_formed():
    for pair in INSTRUCT:
        assert set(pair) == {"kind", "messages"} and re.fullmatch("[a-z_]+", pair["kind"])
        assert all(set(turn) == {"role", "content"} for turn in pair["messages"])
        roles = [turn["role"] for turn in pair["messages"]]
        assert len(roles) >= 2 and roles == ["user", "assistant"] * (len(roles) // 2)
        for text in contents(pair):
            assert text and not faults(text), (text, faults(text))
        assert sum(len(text.split()) for text in contents(pair)) <= 110, contents(pair)
    assert len(INSTRUCT) >= 420
    kinds = collections.Counter(pair["kind"] for pair in INSTRUCT)
    wanted = "explain list rewrite translate small_talk arithmetic story advice refusal summarize classify poem letter"
    assert min(kinds[kind] for kind in wanted.split()) >= 10 and len(kinds) >= 20
    assert max(kinds.values()) < len(INSTRUCT) / 8
    assert sum(len(pair["messages"]) > 2 for pair in INSTRUCT) >= 30
    hindi = [facts.DEVANAGARI.search(contents(pair)[0]) for pair in INSTRUCT]
    assert sum(h is None for h in hindi) >= 60
    assert (
        sum(h is not None and LATIN.search(contents(p)[0]) is not None for h, p in zip(hindi, INSTRUCT, strict=True))
        >= 15
    )
    short = [len(text.split()) <= 60 for pair in INSTRUCT for text in contents(pair)[1::2]]
    assert sum(short) / len(short) > 0.99


def test_no_written_pair_repeats_another():
    asked = [words(" ".join(contents(pair)[:-1])) for pair in INSTRUCT]
    assert len({tuple(a) for a in asked}) == len(asked)
    answered = collections.Counter(tuple(words(contents(pair)[-1])) for pair in INSTRUCT)
    assert all(n == 1 for answer, n in answered.items() if len(answer) > 3)
    for (i, a), (j, b) in itertools.combinations(enumerate(map(set, asked)), 2):  # most words shared
        assert min(len(a), len(b)) < 5 or len(a & b) / len(a | b) < 0.75, (INSTRUCT[i], INSTRUCT[j])


SUM = re.compile(r"([(\d][\d\s+×÷()-]*?)\s*=\s*(\d+)(?![\d\s]*[+×÷-])")


def sums(text):
    """The (computed, stated) results of all sums in a text, by exact fractions."""
    for left, stated in SUM.findall(text):
        left = re.sub(r"\d+", r"Fraction(\g<0>)", left.translate(str.maketrans("×÷", "*/")))
        yield eval(left, {"Fraction": Fraction}), int(stated)  # the pattern lets nothing but numbers and signs through


def test_arithmetic_is_right():
    assert [*sums("2 × (10 + 4) = 28, 7 ÷ 2 = 3, यानी 40 - 13 + 9 = 36")] == [(28, 28), (Fraction(7, 2), 3), (36, 36)]
    written = [s for pair in INSTRUCT for text in contents(pair) for s in sums(text)]
    made = [s for pair in PAIRS for s in sums(contents(pair)[1])]
    assert len(written) >= 40 and len(made) >= 450
    assert all(computed == stated for computed, stated in written + made)
    counting = [pair for pair in INSTRUCT if pair["kind"] == "arithmetic"]
    assert sum(any(True for text in contents(pair) for _ in sums(text)) for pair in counting) >= 0.9 * len(counting)


# ---------------------------------------------------------------------------------------------------------------------
# the tables


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_well_formed(name):
    rows, patterns = TABLES[name]["rows"], TABLES[name]["patterns"]
    assert len({len(row) for row in rows}) == 1
    keys = [row[0] for row in rows]
    assert len(set(keys)) == len(keys) and all(cell and not faults(cell) for row in rows for cell in row)
    for pattern in patterns:
        for template in [*pattern["ask"], *pattern["say"], pattern["short"]]:
            assert not faults(template) and template.format(*rows[0]) != template
        assert all(ask[-1] in "?।." for ask in pattern["ask"]) and all(say[-1] in "।." for say in pattern["say"])


def test_names_are_those_of_the_tables():
    """Latin spellings stand for something that is written in some table."""
    text = json.dumps(TABLES, ensure_ascii=False)
    assert [name for name in FACTS["names"] if name not in text] == []
    assert all(re.fullmatch(r"[a-z .-]+", latin) for latin in FACTS["names"].values())


METRES = {"मिलीमीटर": 1, "सेंटीमीटर": 10, "इंच": Fraction(254, 10), "मीटर": 1000, "किलोमीटर": 10**6}
METRES |= {"फ़ुट": 12 * METRES["इंच"], "गज": 36 * METRES["इंच"]}
SCALES = [  # each in its smallest unit
    METRES,
    {"मिलीग्राम": 1, "ग्राम": 10**3, "किलोग्राम": 10**6, "क्विंटल": 10**8, "टन": 10**9},
    {"मिलीलीटर": 1, "लीटर": 1000},
    {"सेकंड": 1, "मिनट": 60, "घंटा": 3600, "दिन": 86400, "सप्ताह": 604800, "पखवाड़ा": 15 * 86400},
    {"महीना": 1, "वर्ष": 12, "दशक": 120, "सदी": 1200, "शताब्दी": 1200, "सहस्राब्दी": 12000},
    {"पैसा": 1, "रुपया": 100},
    {"इकाई": 1, "दर्जन": 12, "ग्रोस": 144, "कोड़ी": 20},
    {"हज़ार": 10**3, "लाख": 10**5, "करोड़": 10**7, "अरब": 10**9},
    {"बिट": 1, "बाइट": 8},
    {"वर्ग मीटर": 1, "हेक्टेयर": 100 * 100},
]


def test_units_are_right():
    scale = {unicodedata.normalize("NFC", unit): (i, size) for i, s in enumerate(SCALES) for unit, size in s.items()}
    for key, _, part, _, n in TABLES["unit"]["rows"]:
        (i, whole), (j, small) = scale[key], scale[part]
        assert i == j and whole == small * int(n), key
    many = {row[1]: (row[3], int(row[4])) for row in TABLES["unit"]["rows"]}
    seen = 0
    for pair in PAIRS:
        said = re.fullmatch(r"(\d+) (\S+) में (\d+) (.+) होते हैं।", contents(pair)[1])
        if said and pair["fact"].startswith("unit:"):
            seen += 1
            assert int(said[3]) == int(said[1]) * many[said[2]][1] and said[4] == many[said[2]][0]
    assert seen > 100


def test_the_calendar_is_right():
    months = TABLES["next_month"]["rows"]
    for i, (month, after, before, days) in enumerate(months):
        assert (after, before) == (months[(i + 1) % 12][0], months[i - 1][0]), month
        lengths = {calendar.monthrange(year, i + 1)[1] for year in (2023, 2024)}
        assert days == " या ".join(map(str, sorted(lengths)))
    week = TABLES["next_day"]["rows"]
    assert len(week) == 7 and all(after == week[(i + 1) % 7][0] for i, (_, after, _) in enumerate(week))
    assert all(before == week[i - 1][0] for i, (_, _, before) in enumerate(week))
    hindu = TABLES["hindu_month"]["rows"]
    assert len(hindu) == 12 and all(after == hindu[(i + 1) % 12][0] for i, (_, after) in enumerate(hindu))


def test_number_words_follow_the_system():
    """Words differ; n9 counts down from the next ten (but 89 and 99); the words of a ten end alike."""
    rows = TABLES["number_word"]["rows"]
    assert [int(n) for n, *_ in rows] == [*range(101)] and len({word for _, word, _ in rows}) == 101
    assert all(int(devanagari) == int(n) for n, _, devanagari in rows)  # int() reads any decimal digits
    word = [word for _, word, _ in rows]
    assert all(word[n].startswith("उन") for n in range(19, 80, 10)) and word[89][0] == "न" and word[99][:3] == "निन"
    ends = {20: "स", 30: "तीस", 40: "लीस", 50: "न", 60: "सठ", 70: "त्तर", 80: "सी", 90: "नवे"}
    for ten, end in ends.items():
        for n in range(ten + 1, ten + 9):
            assert word[n].endswith(end) or (ten == 70 and word[n].endswith("हत्तर")) or n in (77, 78), word[n]
    assert (word[77], word[78]) == ("सतहत्तर", "अठहत्तर") and all(word[n].endswith("ह") for n in range(11, 19))


# ---------------------------------------------------------------------------------------------------------------------
# the generator

CAPITALS = {"ask": ["{0} की राजधानी क्या है?"], "say": ["{0} की राजधानी {1} है।"], "short": "{1}"}
BACK = {"ask": ["{1} किस राज्य की राजधानी है?"], "say": ["{1} {0} की राजधानी है।"], "short": "{0}"}
SMALL = {
    "names": {"पंजाब": "punjab", "बिहार": "bihar"},
    "tables": {
        "capital": {
            "rows": [["पंजाब", "चंडीगढ़"], ["हरियाणा", "चंडीगढ़"], ["बिहार", "पटना"], ["असम", "दिसपुर"]],
            "patterns": [CAPITALS, BACK],
            "check": "क्या {0} की राजधानी {1} है?",
        },
        "unit": {"rows": [["मीटर", "मीटर", "सेंटीमीटर", "सेंटीमीटर", "100"]], "patterns": []},
    },
}


def plain(question):
    """A question without what asks for a short answer or announces a blank."""
    for some in facts.BRIEF:
        question = question.removesuffix(some).strip()
    for some in filter(None, facts.BLANK):
        question = question.removeprefix(some)
    return question


def test_a_row_is_asked_in_every_direction_and_a_held_out_one_in_none():
    made = facts.generate(SMALL, ["capital:असम"], seed=1, romanized=0)
    pairs = {plain(contents(p)[0]): (p["fact"], contents(p)[1]) for p in made}
    assert not any("असम" in text or "दिसपुर" in text for p in made for text in contents(p))
    assert pairs["बिहार की राजधानी क्या है?"][1] in ("पटना", "बिहार की राजधानी पटना है।")
    assert pairs["पटना किस राज्य की राजधानी है?"][1] in ("बिहार", "पटना बिहार की राजधानी है।")
    assert pairs["बिहार की राजधानी ___ है।"] == ("capital:बिहार", "पटना")
    assert pairs["पटना ___ की राजधानी है।"] == ("capital:बिहार", "बिहार")
    assert pairs["हरियाणा की राजधानी ___ है।"] == ("capital:हरियाणा", "चंडीगढ़")
    assert "चंडीगढ़ किस राज्य की राजधानी है?" not in pairs  # two rows answer it
    assert "चंडीगढ़ ___ की राजधानी है।" not in pairs
    for question, (fact, answer) in pairs.items():
        if question.startswith("क्या "):
            row = next(row for row in SMALL["tables"]["capital"]["rows"] if fact == f"capital:{row[0]}")
            yes = question == "क्या {} की राजधानी {} है?".format(*row)
            assert answer == "{}, {} की राजधानी {} है।".format("हाँ" if yes else "नहीं", *row)
    everything = facts.generate(SMALL, [], seed=1, romanized=0)
    assert any("दिसपुर" in text for p in everything for text in contents(p))


def test_short_answers_come_where_they_are_asked_for():
    for pair in PAIRS:
        question, answer = contents(pair)
        if facts.DEVANAGARI.search(question) and pair["fact"].split(":")[0] in TABLES:
            brief = question.endswith(facts.BRIEF) or "___" in question
            assert answer.endswith("।") != brief or not facts.DEVANAGARI.search(answer), pair


def test_romanised_pairs_are_spelt_by_the_names():
    made = facts.generate(SMALL, [], seed=1, romanized=1.0)
    latin = {contents(p)[0]: contents(p)[1] for p in made if not facts.DEVANAGARI.search(contents(p)[0])}
    assert "patna ___ ki rajdhani hai." in [re.sub("^.*: ", "", q) for q in latin]
    assert any("punjab" in q for q in latin) and not any("panjab" in q or "panjaab" in q for q in latin)
    assert not any(facts.DEVANAGARI.search(a) for a in latin.values())
    hindi = [p for p in made if facts.DEVANAGARI.search(contents(p)[0])]
    assert len(hindi) <= len(latin)  # all of them once more; sums in bare numbers are in no script
    names = {"मेक्सिको": "mexico", "मेक्सिको सिटी": "mexico city"}
    assert facts.typed("मेक्सिको: मेक्सिको सिटी।", names, None) == "mexico: mexico city."
    assert facts.typed("प्राचीन चीन", {"चीन": "china"}, None) == f"{romanize.romanize('प्राचीन')} china"


def test_the_pairs_are_many_varied_and_the_same_for_the_same_seed():
    assert len(PAIRS) >= 5000 and len({p["fact"] for p in PAIRS}) >= 1200
    questions = [contents(p)[0] for p in PAIRS]
    assert len(set(questions)) == len(questions)
    assert len({" ".join(words(q)) for q in questions}) > 0.99 * len(questions)
    latin = [q for q in questions if not facts.DEVANAGARI.search(q)]
    assert 1000 < len(latin) < 0.3 * len(questions)
    assert PAIRS == facts.generate(FACTS, HELD_OUT, seed=0, romanized=0.2)
    other = facts.generate(FACTS, HELD_OUT, seed=1, romanized=0.2)
    assert sum(p in other for p in PAIRS[:50]) < 45 and abs(len(other) - len(PAIRS)) < 0.05 * len(PAIRS)
    counted = {f"{name}:{row[0]}" for name, table in TABLES.items() for row in table["rows"]}
    computed = {"sum", "difference", "product", "quotient"}
    for pair in PAIRS:
        assert set(pair) == {"fact", "messages"} and [t["role"] for t in pair["messages"]] == ["user", "assistant"]
        assert pair["fact"] in counted or pair["fact"].split(":")[0] in computed
        assert not [fault for text in contents(pair) for fault in faults(text)], pair


# ---------------------------------------------------------------------------------------------------------------------
# the questions


def latin(text):
    """Words in Latin letters between spaces, so that a text in either script is searched."""
    return f" {' '.join(re.findall('[a-z0-9]+', romanize.romanize(text).lower()))} "


def test_questions_are_well_formed():
    assert len(QA) >= 160 and len({item["id"] for item in QA}) == len({item["fact"] for item in QA}) == len(QA)
    for item in QA:
        fields = {"id", "fact", "subject", "question", "answers", "form", "language", "level", "source"}
        assert set(item) == fields | ({"hindi"} if item["language"] == "en" else set())
        assert item["form"] in ("question", "cloze") and item["level"] in ("easy", "medium", "hard")
        assert item["question"].count("___") == (item["form"] == "cloze")
        texts = [item[f] for f in ("subject", "question", "source")] + item["answers"]
        assert not [fault for text in texts for fault in faults(text)] and item["source"], item
        assert re.fullmatch("[a-z_]+:.+", item["fact"])
        hindi = facts.DEVANAGARI.search(item["question"])
        assert (hindi is None) == (item["language"] == "en")
        if item["language"] == "hi":  # in both scripts, but for numbers, symbols and the English words that are asked
            both = [any(map(p.search, item["answers"])) for p in (facts.DEVANAGARI, LATIN)]
            assert all(both) or item["answers"][0].isascii() or item["answers"][0][0].isdecimal(), item
        assert len({a.lower() for a in item["answers"]}) == len(item["answers"])
        assert not [a for a in item["answers"] if latin(a).strip() and latin(a) in latin(item["question"])], item
    for field, least in (("form", 40), ("language", 45), ("level", 50)):
        assert min(collections.Counter(item[field] for item in QA).values()) >= least


def test_no_answer_is_right_too_often():
    often = collections.Counter(answer for item in QA for answer in {latin(a) for a in item["answers"]})
    often.update(answer for item in QA for answer in {a for a in item["answers"] if not latin(a).strip()})
    assert max(often.values()) / len(QA) <= 0.05


def test_about_half_of_the_questions_share_a_relation_with_the_tables():
    shared = [item for item in QA if item["fact"].split(":")[0] in TABLES]
    assert 0.4 < len(shared) / len(QA) < 0.6
    rows = {f"{name}:{row[0]}" for name, table in TABLES.items() for row in table["rows"]}
    assert [item["fact"] for item in shared if item["fact"] not in rows] == ["special_day:गांधी जयंती"]  # in no table


def given_away(item, texts):
    """Of texts as `latin` makes them, those that hold the subject of a question and an accepted answer."""
    more = item.get("hindi", {"subject": item["subject"], "answers": []})
    subjects = {latin(item["subject"]), latin(more["subject"])}
    answers = {latin(a) for a in item["answers"] + more["answers"] if latin(a).strip()}
    about = [text for subject in subjects for text in texts if subject in text]
    return [text for text in about if any(answer in text for answer in answers)]


def test_no_pair_gives_a_question_away():
    """By fact, and by its words in either script. The same search finds the rows that are held out."""
    assert not {pair["fact"] for pair in PAIRS} & set(HELD_OUT)
    texts = [latin(" . ".join(contents(pair))) for pair in PAIRS + INSTRUCT]
    found = {item["id"]: given_away(item, texts) for item in QA}
    assert {id: some for id, some in found.items() if some} == {}
    known = facts.generate(FACTS, [], seed=0, romanized=0)
    stated = collections.defaultdict(list)
    for pair in known:
        stated[pair["fact"]].append(latin(" . ".join(contents(pair))))
    shared = [item for item in QA if item["fact"] in stated]
    assert len(shared) > 100 and sum(bool(given_away(item, stated[item["fact"]])) for item in shared) > 0.95 * len(
        shared
    )


def test_the_readme_states_the_numbers():
    text = (ROOT / "data/README.md").read_text("utf-8")
    shared = sum(item["fact"].split(":")[0] in TABLES for item in QA)
    often = collections.Counter(answer for item in QA for answer in {latin(a) for a in item["answers"]})
    for said in (
        f"{len(INSTRUCT)} pairs of an instruction",
        f"{len({pair['kind'] for pair in INSTRUCT})} kinds",
        f"{sum(len(pair['messages']) > 2 for pair in INSTRUCT)} have several turns",
        f"{sum(not facts.DEVANAGARI.search(contents(pair)[0]) for pair in INSTRUCT)} are asked in Latin letters",
        f"{len(TABLES)} tables, {sum(len(table['rows']) for table in TABLES.values()):,} rows",
        f"{len(PAIRS):,} pairs",
        f"{len(QA)} questions",
        f"{shared} of the questions share",
        f"{len(QA) - shared} ask what no table holds",
        f"more than {max(often.values())} of the {len(QA)}",
    ):
        assert said in text, said


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_writes_what_generate_makes(command, tmp_path):
    held_out = ROOT / "data/qa.jsonl"
    flags = ["--tables", ROOT / "data/facts.json", "--held_out", held_out, "--output", tmp_path / "new/train.jsonl"]
    result = command("facts", *flags)
    assert result.code == 0 and f"{len(PAIRS):,} pairs" in result.out and not result.err
    assert facts.read_jsonl(tmp_path / "new/train.jsonl") == PAIRS
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["train.jsonl"]


def test_wrong_flags_and_files_are_refused(command, tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"fact": "a:b"}\n{"fact"\n', "utf-8")
    (tmp_path / "list.jsonl").write_text('{"fact": "a:b"}\n["fact"]\n', "utf-8")
    (tmp_path / "nofact.jsonl").write_text('{"id": 1}\n', "utf-8")
    (tmp_path / "facts.json").write_text('{"rows": 1}', "utf-8")
    good = ["--tables", ROOT / "data/facts.json", "--output", tmp_path / "out.jsonl"]
    for flags, said in (
        (["--romanized", 1.5], "--romanized is 1.5"),
        ([*good, "--held_out", tmp_path / "qa.jsonl"], "line 2"),
        ([*good, "--held_out", tmp_path / "list.jsonl"], "line 2"),
        ([*good, "--held_out", tmp_path / "nofact.jsonl"], "line 1"),
        ([*good, "--held_out", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--tables", tmp_path / "facts.json", "--held_out", ""], "facts.json"),
    ):
        result = command("facts", *flags)
        assert result.code == 2 and said in result.error(), (flags, result)
    assert not (tmp_path / "out.jsonl").exists()

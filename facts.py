"""Tables of facts → question-answer pairs in Hindi, Devanagari and romanised, to tune a model on.

    python facts.py --output data/facts/train.jsonl --seed 0 --romanized 0.2

data/facts.json holds the tables, and how names are typed in Latin letters. A row is [key, ...]; a pattern turns every
row of its table into questions ("ask") and their answers: a sentence ("say") to a plain question, the value alone
("short") where a short answer is asked for or a blank is to be filled. {0} is the key, {1} the next column. Rows whose
fact, "table:key", stands in data/qa.jsonl are left out in every direction, so that those questions measure what a model
knows from elsewhere.
"""

import collections
import functools
import json
import os
import random
import re
from pathlib import Path

import romanize
from config import FactsConfig, check, parse, run_main

BRIEF = ("सिर्फ़ उत्तर लिखो।", "संक्षेप में उत्तर दो।", "केवल उत्तर बताइए।")  # asks for the value alone
BLANK = ("खाली जगह भरो: ", "रिक्त स्थान भरिए: ", "")
DEVANAGARI = re.compile("[\u0900-\u097f]")


def read_jsonl(path):
    """The objects of a file with one JSON object a line. Raises ValueError with the line's number."""
    rows = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{path}, line {n} is no JSON ({e}); mend or drop it") from e
        check(isinstance(rows[-1], dict), f"{path}, line {n} is no JSON object; mend or drop it")
    return rows


def read_tables(path):
    """facts.json as `generate` takes it. Raises ValueError where it is not so."""
    facts = json.loads(Path(path).read_text(encoding="utf-8"))
    check(set(facts) == {"names", "tables"}, f"{path} has {[*facts]} where names and tables belong; mend it")
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# one row, many questions


def asked(pattern, row, rng):
    """One pattern for one row: (bare, question, answer) of each question, put plainly or for a short answer."""
    short = pattern["short"].format(*row)
    hindi = DEVANAGARI.search(pattern["ask"][0])
    for ask in pattern["ask"]:
        if hindi and rng.random() < 0.5:
            yield ask.format(*row), f"{ask.format(*row)} {rng.choice(BRIEF)}", short
        else:
            yield ask.format(*row), ask.format(*row), rng.choice(pattern["say"]).format(*row)
    say = pattern["say"][0]
    if say.count(pattern["short"]) == 1:  # else it would be given away, or stands there in another form
        cloze = say.replace(pattern["short"], "___").format(*row)
        yield cloze, (rng.choice(BLANK) if hindi else "Fill in the blank: ") + cloze, short


def checked(table, row, others, rng):
    """A yes-or-no question: half of the time with the value of another row, which is then put right."""
    wrong = [other[1] for other in others if other[1] != row[1]]
    truth = table["patterns"][0]["say"][0].format(*row)
    if rng.random() < 0.5:
        return table["check"].format(*row), f"हाँ, {truth}"
    return table["check"].format(row[0], rng.choice(wrong)), f"नहीं, {truth}"


def arithmetic(rng, each=120):
    """(fact, question, answer) of sums, differences, products and quotients, all of them whole and not negative."""
    for _ in range(each):
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        ask = rng.choice(["{} और {} का योग कितना है?", "{} + {} = ?", "{} में {} जोड़ो।"])
        yield f"sum:{a}+{b}", ask.format(a, b), f"{a} + {b} = {a + b}"
        a, b = max(a, b), min(a, b)
        ask = rng.choice(["{} में से {} घटाओ।", "{} - {} = ?", "{} में से {} निकालने पर कितना बचता है?"])
        yield f"difference:{a}-{b}", ask.format(a, b), f"{a} - {b} = {a - b}"
        a, b = rng.randint(2, 20), rng.randint(2, 10)
        ask = rng.choice(["{} गुणा {} कितना होता है?", "{} × {} = ?", "{} को {} से गुणा करो।"])
        yield f"product:{a}×{b}", ask.format(a, b), f"{a} × {b} = {a * b}"
        ask = rng.choice(["{} को {} से भाग दो।", "{} ÷ {} = ?", "{} को {} बराबर हिस्सों में बाँटो। हर हिस्सा कितना होगा?"])
        yield f"quotient:{a * b}÷{b}", ask.format(a * b, b), f"{a * b} ÷ {b} = {a}"


def multiples(rows, rng):
    """(fact, question, answer): the rows of the table "unit", several at a time."""
    for key, one, _, many, n in rows:
        for times in rng.sample(range(2, 11), 4):
            say = f"{times} {one} में {times * int(n)} {many} होते हैं।"
            yield f"unit:{key}", f"{times} {one} में कितने {many} होते हैं?", say


# ---------------------------------------------------------------------------------------------------------------------
# all of it


@functools.cache
def any_of(names):
    """A pattern that finds whole names, the longest where several begin (मेक्सिको सिटी, not मेक्सिको)."""
    some = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(f"(?<![\u0900-\u0963])(?:{some})(?![\u0900-\u0963])")


def typed(text, names, seed):
    """Hindi as people type it in Latin letters; a name of the dict `names` as it is known: japan, not japaan."""
    return romanize.romanize(any_of(tuple(names)).sub(lambda name: names[name[0]], text), seed)


def generate(facts, held_out=(), seed=0, romanized=0.2):
    """Pairs {"fact", "messages": [user, assistant]}, no question twice, in an order drawn by the seed.

    facts: {"tables": {name: {"rows", "patterns", "check"}}, "names": {Devanagari: Latin}}, as in data/facts.json.
    held_out: facts "table:key" that no pair may state. romanized: the share of pairs added once more as people type
    them in Latin letters. A question that two rows answer is not asked.
    """
    rng, held_out, tables = random.Random(seed), set(held_out), facts["tables"]
    computed = [*arithmetic(rng), *multiples(tables["unit"]["rows"], rng)]
    made = [(fact, question, question, answer) for fact, question, answer in computed]
    for name, table in tables.items():
        known = [row for row in table["rows"] if f"{name}:{row[0]}" not in held_out]
        for row in table["rows"]:
            fact = f"{name}:{row[0]}"
            for pattern in table["patterns"]:
                made += [(fact, *asking) for asking in asked(pattern, row, rng)]
            if "check" in table:
                question, answer = checked(table, row, known, rng)
                made.append((fact, question, question, answer))
    stated = collections.defaultdict(set)  # by which facts a bare question is answered
    for fact, bare, _, _ in made:
        stated[bare].add(fact)
    pairs = {q: (fact, a) for fact, bare, q, a in made if len(stated[bare]) == 1 and fact not in held_out}
    for question, (fact, answer) in [*pairs.items()]:
        if rng.random() < romanized and DEVANAGARI.search(question):
            latin = [typed(text, facts["names"], rng.randrange(1 << 30)) for text in (question, answer)]
            pairs.setdefault(latin[0], (fact, latin[1]))
    turns = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]  # noqa: E731
    result = [{"fact": fact, "messages": turns(q, a)} for q, (fact, a) in pairs.items()]
    rng.shuffle(result)
    return result


def main():
    (cfg,) = parse(__doc__, FactsConfig)
    facts = read_tables(cfg.tables)
    items = read_jsonl(cfg.held_out) if cfg.held_out else []
    without = [n for n, item in enumerate(items, 1) if "fact" not in item]
    check(not without, f"{cfg.held_out}, line {[*without, 0][0]} names no fact; give it one")
    held_out = [item["fact"] for item in items]
    pairs = generate(facts, held_out, cfg.seed, cfg.romanized)
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    os.replace(temporary, output)
    different = len({pair["fact"] for pair in pairs})
    print(f"{output}: {len(pairs):,} pairs of {different:,} facts; {len(set(held_out)):,} facts held out")


if __name__ == "__main__":
    run_main(main)

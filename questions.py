"""Question answering, measured honestly: for `evaluate.py --qa`, on any checkpoint.

    python evaluate.py --ckpt checkpoints/chat_hi --qa                  # the questions of data/qa.jsonl

Every model is asked the same text through the one template, with no example, hint or choice of answers in it, and
answers greedily: a token a forward, from left to right, the likeliest one each time, until its EOS or so many tokens.
A denoiser could take another order; this one is what its autoregressive twin does, so that the rule is the same.
"""

import collections
import json
import unicodedata
from pathlib import Path

import numpy as np
import regex

import chat
import dataset
import sampling
import tokenizer as tokenizers
from config import check, one_line
from intervals import wilson
from sample_diffusion import right_padded

STRATEGY = "left_to_right"
GROUPS = {"form": ("question", "cloze"), "language": ("hi", "en"), "level": ("easy", "medium", "hard")}
BLANK = "___"  # where the answer of a cloze goes
OTHERS = 5  # words that an answer may hold besides the accepted one and those of its question
NEAR = 100  # words of the training text within which subject and answer stand together

# ---------------------------------------------------------------------------------------------------------------------
# what counts as the same words

# Spellings of one word: nukta or not, candrabindu or anusvara, joiners or not, Latin accents or not, either digits
FOLD = dict.fromkeys([0x93C, 0x200B, 0x200C, 0x200D, 0xFEFF, *range(0x300, 0x370)]) | {0x901: 0x902}
FOLD |= {0x966 + d: str(d) for d in range(10)}
# हिन्दी is हिंदी, मुम्बई is मुंबई: a nasal before a stop of its own class may be written as anusvara
NASAL = regex.compile("ङ्(?=[क-घ])|ञ्(?=[च-झ])|ण्(?=[ट-ढ])|न्(?=[त-ध])|म्(?=[प-भ])")
WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:(?<=\p{N})[.,](?=\p{N})[\p{L}\p{M}\p{N}]+)*|[,;/|]")
END = regex.compile(r"[।॥?!\r\n]|\.(?=\s|$)")
# a full stop behind these ends no sentence: Dr. B. R. Ambedkar, सी. वी. रमन
TITLES = "[a-z]|dr|mrs?|ms|st|mt|no|डॉ|प्रो|श्री|पं|सं|ए|बी|सी|डी|ई|एफ|जी|एच|आई|जे|के|एल|एम|एन|ओ|पी|आर|एस|टी|यू|वी"
TITLE = regex.compile(rf"(?<![\p{{L}}\p{{M}}\p{{N}}])(?:{TITLES})$", regex.IGNORECASE)
# what takes an answer back, or puts another one beside it
DOUBT = set("या अथवा और तथा एवं नहीं नही न मत or and not no nor never ya aur nahi nahin".split())


def tokens(text):
    """The words of text in one spelling, and "," for each comma, semicolon, slash or bar: a list.

    NFC or not, case, punctuation, dandas, nuktas, joiners, candrabindu, half nasals, accents, digits and the commas
    within a number make no difference.
    """
    text = unicodedata.normalize("NFD", text).translate(FOLD).casefold()
    return ["," if w in ",;/|" else w.replace(",", "") for w in WORD.findall(NASAL.sub("ं", text))]


def words(text):
    return [w for w in tokens(text) if w != ","]


def first_sentence(text):
    text = text.strip()
    ends = (e.start() for e in END.finditer(text) if e[0] != "." or not TITLE.search(text[: e.start()]))
    return text[: next(ends, len(text))]


def right(output, question, answers):
    """Whether `output` answers the question: only its first sentence counts, and of a list its first entry.

    An accepted answer must stand there, whole word for whole word; before it no comma, unless it fills a cloze that has
    one; around it, up to the next comma, at most OTHERS words that the question does not have, and no word of DOUBT.
    So the question alone, a list of all there is, a wrong answer before the right one, or two at once are wrong.
    """
    said, commas = [], []  # commas: how many words stand before each
    for token in tokens(first_sentence(output)):
        commas.append(len(said)) if token == "," else said.append(token)
    asked, before_blank = set(words(question)), words(question.partition(BLANK)[0])
    for answer in map(words, answers):
        for i in range(len(said) - len(answer) + 1):
            end = i + len(answer)
            if said[i:end] == answer and (said[:i] == before_blank or not any(0 < c <= i for c in commas)):
                until = min((c for c in commas if c >= end), default=len(said))
                others = [w for w in said[:i] + said[end:until] if w not in asked]
                if len(others) <= OTHERS and not DOUBT & set(others):
                    return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# the questions


def holds(text, phrase):
    """Whether the words of phrase stand in text one behind the other."""
    a, b = words(text), words(phrase)
    return any(a[i : i + len(b)] == b for i in range(len(a) - len(b) + 1))


def check_item(item):
    """Raises ValueError where an item lacks something or gives its answer away."""
    check(isinstance(item, dict), "it is no JSON object")
    for key in ("id", "question", "subject"):
        check(isinstance(item.get(key), str) and words(item[key]), f"its {key} is {item.get(key)!r}, needs to be words")
    for key, values in GROUPS.items():
        check(item.get(key) in values, f"its {key} is {item.get(key)!r}, not one of {', '.join(values)}")
    answers = item.get("answers")
    check(isinstance(answers, list) and answers, f"its answers are {answers!r}, need to be a list of texts")
    for answer in answers:
        check(isinstance(answer, str) and words(answer), f"its answer {answer!r} has no word")
        check(not holds(item["question"], answer), f"its answer {answer!r} stands in its question")
    cloze = item["form"] == "cloze"
    check((BLANK in item["question"]) == cloze, f"a {item['form']} {'needs' if cloze else 'has no'} {BLANK}")


def load(path):
    """The items of a .jsonl of questions: a list of dicts. Raises ValueError, with its line, for one that is wrong."""
    items, ids = [], set()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            if not line.strip():
                continue
            item = json.loads(line.decode("utf-8"))
            check_item(item)
            check(item["id"] not in ids, f"its id {item['id']!r} came before")
        except ValueError as e:  # no UTF-8, no JSON, no item
            raise ValueError(f"{path}, line {number}: {one_line(e)}; mend the line") from None
        ids.add(item["id"])
        items.append(item)
    check(items, f"{path} holds no questions")
    return items


# ---------------------------------------------------------------------------------------------------------------------
# asking


def ask(loaded, items, n, batch_size=32):
    """What a checkpoint answers to each item in at most n tokens: a list of texts.

    Raises ValueError where the longest question and its answer do not fit the model's window.
    """
    model, tokenizer = loaded.denoiser, loaded.tokenizer
    prompts = [chat.prompt([{"role": "user", "content": item["question"]}], tokenizer) for item in items]
    longest, limit = max(range(len(items)), key=lambda i: len(prompts[i])), model.config.max_seq_len
    check(
        len(prompts[longest]) + n <= limit,
        f"question {items[longest]['id']} takes {len(prompts[longest])} tokens and its answer {n}, the window of "
        f"{loaded.path} holds {limit}; take a smaller --answer_tokens, or a model with a longer window",
    )
    drawing = dict(temperature=0.0, eos_id=tokenizer.eos_id, forbid=tokenizer.never)
    texts, device = [""] * len(items), next(model.parameters()).device
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))  # rows of a batch are about equally long
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        x, lengths = right_padded([prompts[i] + [model.mask_id] * n for i in some], tokenizer.pad_id, device)  # (B, T)
        if hasattr(model, "extend"):
            decoding = sampling.write(model, x, lengths=lengths, **drawing)
        else:  # a model of blocks shares the steps out to them: as many as places are enough for a token a forward
            decoding = sampling.denoise(model, x, STRATEGY, steps=x.shape[1], lengths=lengths, **drawing)
        step = collections.deque(decoding, maxlen=1).pop()  # the last one
        for row, i in zip(step.x.tolist(), some, strict=True):
            texts[i] = chat.answer(row[len(prompts[i]) : len(prompts[i]) + n], tokenizer)
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# was the fact in the training text?


def documents(folder, sha256=None):
    """The texts of a prepared folder's train.bin: what stands between two EOS, or, of chats, a row.

    Raises ValueError if sha256 is not that of its data, and as dataset.load does.
    """
    data = dataset.load(folder)
    check(sha256 in (None, data.hash), f"{folder} was prepared again since (another sha256)")
    ids = tokenizers.load(Path(folder) / data.meta["tokenizer"]["file"])
    T = data.meta["seq_len"] if data.answers else len(data.train)
    for row in range(0, len(data.train), T):
        x = data.train[row : row + T]
        ends = np.flatnonzero(x == ids.eos_id).tolist()
        pieces = zip([0, *(e + 1 for e in ends)], [*ends, len(x)], strict=True)
        texts = (ids.decode(x[start:end]) for start, end in pieces if start < end)
        yield from ["\n".join(texts)] if data.answers else texts  # an EOS may stand between question and answer


def met(items, texts):
    """The ids of the items whose subject and an accepted answer stand within NEAR words in one of texts: a set.

    An English item may have both in Hindi too: item["hindi"], a dict.
    """
    phrases = collections.defaultdict(set)  # first word -> (all words, item, whether they are its subject)
    for item in items:
        for named in (item, item.get("hindi", {"answers": []})):
            for phrase in (named.get("subject"), *named["answers"]):
                if phrase:
                    phrase, subject = tuple(words(phrase)), phrase == named.get("subject")
                    phrases[phrase[0]].add((phrase, item["id"], subject))
    found = set()
    for text in texts:
        said, ends = words(text), {}  # ends: (item, whether its subject) -> where it ended last
        for at, word in enumerate(said):
            for phrase, item, subject in phrases.get(word, ()):
                if item not in found and tuple(said[at : at + len(phrase)]) == phrase:
                    ends[item, subject] = at + len(phrase)
                    if 0 <= at - ends.get((item, not subject), -NEAR - 1) <= NEAR:
                        found.add(item)
    return found


def contamination(items, loaded, data_dir=""):
    """The items that a checkpoint's training text may have taught it: a dict of the folders searched, of what of its
    text is unknown, and of the ids found.

    Searched are data_dir, or, without it, the data of the run and of each run that it began from. Raises as
    dataset.load does, for data_dir alone: text that is no longer there, or not the same, is unknown.
    """
    searched, unknown, found = [], [], set()
    if data_dir:
        searched, found = [str(data_dir)], met(items, documents(data_dir))
    name, config = str(loaded.path), None if data_dir else loaded.config
    while config is not None:
        folder, init = config.get("data_dir"), config.get("init")
        try:
            check(folder, f"what {name} was trained on")
            found |= met(items, documents(folder, config.get("data_sha256")))
            searched.append(folder)
        except (OSError, ValueError, RuntimeError) as e:
            unknown.append(one_line(e))
        name, config = init, None
        if init:
            try:
                run = Path(init) if Path(init).is_dir() else Path(init).parent
                config = json.loads((run / "config.json").read_text("utf-8"))
            except (OSError, ValueError):
                unknown.append(f"what {init} was trained on")
    return {"near": NEAR, "searched": searched, "unknown": unknown, "found": sorted(found)}


# ---------------------------------------------------------------------------------------------------------------------
# the figures


def accuracy(marks):
    """A list of bools → how many there are and are true, their mean and its Wilson 95 % interval: a dict."""
    low, high = wilson(sum(marks), len(marks))
    return {"n": len(marks), "right": sum(marks), "mean": sum(marks) / max(1, len(marks)), "low": low, "high": high}


def majority(items):
    """(answer, [whether it is right of each item]) of the accepted answer that is right most often."""
    distinct = {tuple(words(text)): text for item in items for text in item["answers"]}  # each in one spelling
    needed = [[set(words(text)) for text in item["answers"]] for item in items]
    best, most = "", []
    for said, text in distinct.items():
        marks = [
            any(some <= set(said) for some in sets) and right(text, item["question"], item["answers"])
            for item, sets in zip(items, needed, strict=True)
        ]
        if sum(marks) > sum(most):
            best, most = text, marks
    return best, most


def evaluate(loaded, items, n=32, batch_size=32, data_dir=""):
    """Everything about a checkpoint's answers to the items: a dict, with each item's question, output and mark."""
    outputs = ask(loaded, items, n, batch_size)
    marks = [right(output, item["question"], item["answers"]) for output, item in zip(outputs, items, strict=True)]
    constant, constant_marks = majority(items)
    trained = contamination(items, loaded, data_dir)
    known = [item["id"] in trained["found"] for item in items]
    groups = {
        key: {value: [m for m, item in zip(marks, items, strict=True) if item[key] == value] for value in values}
        for key, values in GROUPS.items()
    }
    return {
        "decoding": {"strategy": STRATEGY, "temperature": 0.0, "answer_tokens": n, "tokens_a_forward": 1},
        "accuracy": accuracy(marks),
        "majority": {"answer": constant, **accuracy(constant_marks)},
        "by": {key: {v: accuracy(some) for v, some in values.items() if some} for key, values in groups.items()},
        "contamination": trained
        | {
            "accuracy_of_found": accuracy([m for m, k in zip(marks, known, strict=True) if k]),
            "accuracy_without": accuracy([m for m, k in zip(marks, known, strict=True) if not k]),
        },
        "items": [
            {
                "id": item["id"],
                "question": item["question"],
                "answers": item["answers"],
                "output": output,
                "right": mark,
            }
            | {"in_training_text": k}
            for item, output, mark, k in zip(items, outputs, marks, known, strict=True)
        ],
    }


def report(result):
    """Print the figures of `evaluate`."""

    def line(name, f):
        interval = f"{f['low']:.1%} to {f['high']:.1%}"
        print(f"  {name:32}{f['mean']:6.1%}  ({f['right']} of {f['n']}; 95 % interval {interval})")

    line("right", result["accuracy"])
    line(f"always {result['majority']['answer']!r}", result["majority"])
    for key, values in result["by"].items():
        for value, figures in values.items():
            line(f"{key} {value}", figures)
    trained = result["contamination"]
    if trained["searched"]:
        line("found in the training text", trained["accuracy_of_found"])
        line("not found there", trained["accuracy_without"])
    for text in trained["unknown"]:
        print(f"  training text not searched: {text}")

"""The instruction template: turns ↔ ids, one function for training, sampling, evaluation and the app.

    turns = [{"role": "user", "content": "भारत की राजधानी क्या है?"}]       # user, assistant, user, ...; the last asks
    ids = prompt(turns, tokenizer)                    # end where the answer begins
    ids, n_prompt = example(turns + [{"role": "assistant", "content": "नई दिल्ली।"}], tokenizer)     # one training row
    text = answer(generated_ids, tokenizer)           # cut at EOS

A tokenizer with a separator token (`sep_id`, as BERT's) writes `User: … [SEP] Assistant: …`. Ours have none and write
`प्रश्न: …`, newline, `उत्तर: …`: a few tokens of any Hindi vocabulary. No content can forge a turn: special tokens are
never written out of text, and where a line of a content begins like a turn, it gets a space before it.
"""

import re

import tokenizer as tokenizers
from config import check

ROLES = ("user", "assistant")  # they take turns
MARKS = dict(zip(ROLES, ("प्रश्न:", "उत्तर:"), strict=True))
MARKS_SEP = dict(zip(ROLES, ("User:", "Assistant:"), strict=True))
FORGED = re.compile(rf"\n(?={'|'.join(MARKS.values())})")


def check_turns(turns, last):
    """Raises ValueError unless user and assistant take turns and `last` has the last word."""
    check(turns, "there is no turn to answer")
    for number, turn in enumerate(turns, 1):
        role, content = turn.get("role"), turn.get("content")
        expected = ROLES[(number - 1) % 2]
        check(role == expected, f"turn {number} is the {role}'s; user and assistant take turns, the user first")
        check(isinstance(content, str), f"the content of turn {number} is a {type(content).__name__}, not a string")
    check(role == last, f"the last turn is the {role}'s, it needs to be the {last}'s")


def plain_ids(text, tokenizer):
    """Ids of text, without the special tokens that a tokenizer may find written out in it."""
    special = {getattr(tokenizer, f"{name}_id", None) for name in ("pad", "bos", "eos", "sep")}
    return [i for i in tokenizer.encode(text) if i not in special]


def content_ids(text, tokenizer):
    """Ids of what one side says. The space before the first word belongs to it, as before every other word."""
    text = tokenizers.normalize(text).replace("\r\n", "\n").strip()
    return plain_ids(" " + FORGED.sub("\n ", text), tokenizer)


def prompt(turns, tokenizer):
    """Turns that end with the user's → ids up to where the assistant's answer begins.

    Raises ValueError for turns in another order.
    """
    check_turns(turns, "user")
    sep_id = getattr(tokenizer, "sep_id", None)
    marks, end = (MARKS, tokenizer.encode("\n")) if sep_id is None else (MARKS_SEP, [sep_id])
    ids = []
    for turn in turns:
        ids += plain_ids(marks[turn["role"]], tokenizer) + content_ids(turn["content"], tokenizer) + end
    return ids + plain_ids(marks["assistant"], tokenizer)


def example(turns, tokenizer):
    """Turns that end with the assistant's → (ids, n_prompt): the prompt, the answer and EOS; n_prompt are given.

    Raises ValueError for turns in another order.
    """
    check_turns(turns, "assistant")
    ids = prompt(turns[:-1], tokenizer)
    return ids + content_ids(turns[-1]["content"], tokenizer) + [tokenizer.eos_id], len(ids)


def answer(ids, tokenizer):
    """Generated ids → text, cut at EOS."""
    ids = list(ids)
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    return tokenizer.decode(ids[:end]).strip()


def latest(turns, fits):
    """The last turns for which fits(turns) holds; oldest pairs are dropped. [] if not even the last exchange does."""
    turns = list(turns)
    while turns and not fits(turns):
        turns = turns[2:]
    return turns

"""Instruction tuning: the template, the objective on answers alone, rows out of any data, the command, and the talk."""

import itertools
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import torch
from conftest import TINY, contents, difference, metrics, train
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from toys import MARKOV, STRINGS, Toy, V, build, fixed, oracle, seeded

import chat
import checkpoint
import config
import dataset
import diffusion
import evaluate
import sample_diffusion
import sampling
import tokenizer as tokenizers
import train_instruct
from model import Transformer

KINDS = [kind for kind in checkpoint.MODELS if not kind.startswith("hub")]
BYTES = tokenizers.Bytes()


def user(text):
    return dict(role="user", content=text)


def assistant(text):
    return dict(role="assistant", content=text)


class Words:
    """A tokenizer with a separator, as BERT's are: words and special tokens by name, even where text writes them."""

    specials = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, sep_id=2)

    def __init__(self):
        self.names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
        for name, id in self.specials.items():
            setattr(self, name, id)

    def encode(self, text):
        self.names += [w for w in dict.fromkeys(text.split()) if w not in self.names]
        return [self.names.index(w) for w in text.split()]

    def decode(self, ids):
        return " ".join(self.names[i] for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# the template


def test_the_template_as_text():
    turns = [user(" नमस्ते \n"), assistant("नमस्ते जी"), user("2 + 2?")]
    assert BYTES.decode(chat.prompt(turns, BYTES)) == "प्रश्न: नमस्ते\nउत्तर: नमस्ते जी\nप्रश्न: 2 + 2?\nउत्तर:"
    words = Words()
    assert words.decode(chat.prompt(turns, words)) == (
        "User: नमस्ते [SEP] Assistant: नमस्ते जी [SEP] User: 2 + 2? [SEP] Assistant:"
    )
    ids, n = chat.example([*turns, assistant("चार।")], words)
    assert ids[:n] == chat.prompt(turns, words) and words.decode(ids[n:]) == "चार। [SEP]" and ids[-1] == words.eos_id


TEXT = st.lists(
    st.sampled_from(["प्रश्न:", "उत्तर:", "User:", "Assistant:", "[SEP]", "[PAD]", "</s>", "\n", "\r\n", "\r", " ",
                     "\u200b", "क\u094d\u200cष", "mai kal gaya", "\ud800", "\ufeff", "ज\u093c", "x"]),
    max_size=8).map("".join)  # fmt: skip
TURNS = st.lists(TEXT, min_size=1, max_size=5)


@pytest.fixture(scope="module")
def model(data):
    return tokenizers.load(data / "tokenizer.model")


@settings(max_examples=60, deadline=None)
@given(TURNS)
@example(["नमस्ते\nउत्तर: x\r\n\u200bप्रश्न: y\n\nउत्तर: [SEP] z", "\nप्रश्न:\nउत्तर:", "q\nप्रश्न: r"])
def test_no_content_forges_a_turn(model, contents):
    """As many turns as were given stand in the ids, in their order, whatever they say; and what they say is kept."""
    contents = contents[: len(contents) - 1 + len(contents) % 2]  # the last is the user's
    turns = [(assistant if i % 2 else user)(text) for i, text in enumerate(contents)]
    for tokenizer in (BYTES, model):
        text = tokenizer.decode(chat.prompt(turns, tokenizer))
        assert re.findall("(?:^|\n)(प्रश्न|उत्तर):", text) == ["प्रश्न", "उत्तर"] * (len(turns) // 2 + 1)
        said = "".join(chat.MARKS[t["role"]] + tokenizers.normalize(t["content"]) for t in turns)
        assert "".join(text.split()) == "".join((said + chat.MARKS["assistant"]).split())
    words = Words()
    assert chat.prompt(turns, words).count(words.sep_id) == len(turns)


@pytest.mark.parametrize(
    "text", ["वह\u200cकल", "क्\u200dष", "mai kal bazaar gaya tha", "एक\n\nदो", "😀 [SEP] </s>", "ज़"]
)
def test_an_answer_comes_back(model, text):
    for tokenizer in (BYTES, model):
        ids, n = chat.example([user("?"), assistant(text)], tokenizer)
        assert chat.answer(ids[n:], tokenizer) == tokenizers.normalize(text) and ids[-1] == tokenizer.eos_id
        assert chat.answer(ids[n:] + tokenizer.encode("और") + [tokenizer.eos_id], tokenizer) == chat.answer(
            ids[n:-1], tokenizer
        )


@pytest.mark.parametrize(
    "turns, words",
    [
        ([], "no turn"),
        ([assistant("a")], "turn 1 is the assistant's"),
        ([user("a"), user("b")], "turn 2 is the user's"),
        ([user("a"), assistant("b")], "needs to be the user's"),
        ([user(3)], "turn 1 is a int"),
        ([{"content": "a"}], "turn 1 is the None's"),
    ],
)
def test_turns_in_another_order_are_refused(turns, words):
    with pytest.raises(ValueError, match=words):
        chat.prompt(turns, BYTES)


# ---------------------------------------------------------------------------------------------------------------------
# the objective


def conditional(x0, n):
    """-log p of what follows the first n tokens given those, per token, under MARKOV: (B,)."""
    p = []
    for x in x0:
        same = (STRINGS[:, :n] == x[:n]).all(1)
        p.append(MARKOV[(STRINGS == x).all(1)].sum() / MARKOV[same].sum())
    return -torch.stack(p).log() / (4 - n)


def by_masks(denoiser, x0, n):
    """The bound on what follows the first n tokens, from every mask that hides some of it: (B,)."""
    total, R = torch.zeros(len(x0), dtype=torch.float64), 4 - n
    for hide in itertools.product([False, True], repeat=R):
        if any(hide):
            mask = torch.tensor([False] * n + list(hide))
            logp = denoiser(x0.masked_fill(mask, V)).log_softmax(2).gather(2, x0[:, :, None]).squeeze(2)  # (B, T)
            total -= logp[:, mask].mean(1) / (R * math.comb(R, sum(hide)))
    return total


@pytest.mark.parametrize("tilt", [0.0, 1.5])
def test_the_bound_on_answers_by_enumeration(tilt):
    """Its mean is that over all masks of the answer; of an exact denoiser it is -log p(answer | prompt), else above."""
    denoiser = oracle(MARKOV, tilt)
    x0 = STRINGS[MARKOV > 0]
    for n in (0, 1, 2, 3):
        exact, expected = conditional(x0, n), by_masks(oracle(MARKOV, tilt), x0, n)
        denoiser.seen.clear()
        many = x0.repeat(600, 1)
        draws = diffusion.bound(denoiser, many, seeded(n), given=torch.full((len(many),), n)).view(600, -1)
        assert not any((seen[:, :n] == V).any() or not (seen[:, n:] == V).any(1).all() for seen in denoiser.seen)
        z = (draws.mean() - expected.mean()) / (draws.mean(1).std() / 600**0.5 + 1e-9)
        assert abs(z) < 4 or torch.allclose(draws.mean(1).double(), expected.mean(), atol=1e-5)
        if tilt == 0:
            torch.testing.assert_close(expected, exact)
        else:  # a bound on average over what is true
            weight = MARKOV[MARKOV > 0]
            assert (weight * expected).sum() > (weight * exact).sum() + 0.01


def test_counts_are_uniform_on_each_answer_and_every_set_alike():
    """Rows whose prompts differ in length, in one batch; and in blocks."""
    given_, n = torch.tensor([0, 1, 2, 3]).repeat(3000), 12000
    x_t, masked = diffusion.corrupt(STRINGS[:1].repeat(n, 1), V, generator=seeded(), given=given_)
    for g in range(4):
        mine, R = masked[given_ == g], 4 - g
        assert not mine[:, :g].any()
        sets = (mine[:, g:].long() * 2 ** torch.arange(R)).sum(1).bincount(minlength=2**R)
        expected = torch.tensor([0 if s == 0 else 3000 / (R * math.comb(R, s.bit_count())) for s in range(2**R)])
        assert sets[0] == 0 and ((sets - expected).abs() <= 4.5 * expected.sqrt()).all()
    sizes = torch.tensor([2, 2])
    x_t, masked = diffusion.corrupt(STRINGS[:1].repeat(n, 1), V, None, seeded(), sizes, given_)
    for g, open_ in ((0, [2, 2]), (1, [1, 2]), (2, [0, 2]), (3, [0, 1])):
        counts = masked[given_ == g].view(-1, 2, 2).sum(2)  # (rows, blocks)
        for b, size in enumerate(open_):
            assert sorted(set(counts[:, b].tolist())) == (list(range(1, size + 1)) or [0])
            assert counts[:, b].float().mean().item() == pytest.approx((size + 1) / 2 if size else 0, abs=0.03)


NARROW = dict(min_mask_rate=0.15, max_mask_rate=0.99)
CASES = [dict(loss_weight=weight, **rates) for weight in ("elbo", "low_var") for rates in ({}, NARROW)]


@pytest.mark.parametrize("case", CASES)
def test_a_constant_model_costs_its_constant(case):
    x0, answer = torch.zeros(8, 4, dtype=torch.long), torch.tensor([[n % 4, 4] for n in range(8)])
    loss = diffusion.training_loss(fixed(1.0, 0.0, 0.0), x0, config.MaskConfig(**case), seeded(), answer=answer)
    assert float(loss) == pytest.approx(math.log(math.e + 2) - 1, rel=1e-6)


def test_the_training_loss_is_the_bound_of_every_answers_token():
    """elbo: on average Σ R · bound / Σ R over the rows, by enumeration; and parts of a step give the big batch."""
    denoiser, x0 = oracle(MARKOV, 1.5), STRINGS[[4, 15, 40, 77]]
    answer = torch.tensor([[0, 2], [1, 4], [2, 3], [3, 4]])
    cfg = config.MaskConfig(loss_weight="elbo")
    expected = sum(by_masks(denoiser, x0[[i]], n) * (4 - n) for i, n in enumerate(range(4))) / (4 + 3 + 2 + 1)
    many = x0.repeat(10, 1), answer.repeat(10, 1)
    losses = [float(diffusion.training_loss(denoiser, many[0], cfg, seeded(s), answer=many[1])) for s in range(100)]
    losses = torch.tensor(losses, dtype=torch.float64)
    assert abs(losses.mean() - expected) < 4 * losses.std() / 100**0.5 < 0.1
    for name in ("elbo", "low_var"):
        cfg = config.MaskConfig(loss_weight=name)
        whole = diffusion.training_loss(denoiser, x0, cfg, seeded(7), answer=answer)
        parts = [diffusion.training_loss(denoiser, x0[2 * i : 2 * i + 2], cfg, seeded(7), (i, 2), answer=answer)
                 for i in range(2)]  # fmt: skip
        torch.testing.assert_close(sum(parts) / 2, whole)
    blocks = build("transformer", vocab_size=3, max_seq_len=4, block_length=2)
    assert blocks.loss(x0, cfg, seeded(), answer=answer).isfinite()
    one = build("transformer", vocab_size=3, max_seq_len=4, block_length=1)  # the exact likelihood of the answers
    rows = []
    for x, n in zip(x0, range(4), strict=True):
        before = [torch.cat((x[:t], torch.tensor([V])))[None] for t in range(n, 4)]
        rows.append(-torch.stack([one(x_t)[0, -1].log_softmax(0)[x[t]] for t, x_t in enumerate(before, n)]).detach())
    loss = one.loss(x0, config.MaskConfig(loss_weight="elbo"), seeded(), answer=answer)
    torch.testing.assert_close(loss.detach(), torch.cat(rows).mean(), rtol=1e-4, atol=1e-5)
    bound = diffusion.bound(one, x0, seeded(), given=answer[:, 0])
    torch.testing.assert_close(bound, torch.stack([r.mean() for r in rows]), rtol=1e-4, atol=1e-5)


def test_the_twin_learns_the_answers_tokens_alone():
    gpt = build("autoregressive")
    x0, answer = torch.randint(11, (6, 16), generator=seeded()), torch.tensor([[3, 9], [0, 4], [5, 16], [15, 16], [1, 2], [8, 12]])  # fmt: skip  # noqa: E501
    logp = gpt(x0).log_softmax(2).gather(2, x0[:, :, None]).squeeze(2)  # (B, T)
    rows = [-logp[i, a:b] for i, (a, b) in enumerate(answer.tolist())]
    cfg = config.MaskConfig()
    torch.testing.assert_close(gpt.loss(x0, cfg, answer=answer), torch.cat(rows).mean())
    parts = [gpt.loss(x0[2 * i : 2 * i + 2], cfg, part=(i, 3), answer=answer) for i in range(3)]
    torch.testing.assert_close(sum(parts) / 3, torch.cat(rows).mean())
    torch.testing.assert_close(gpt.nll(x0, answer=answer), torch.stack([r.mean() for r in rows]))
    behind = x0.clone()
    behind[0, 9:] = 0  # what fills the row changes nothing
    torch.testing.assert_close(gpt.nll(behind, answer=answer)[0], gpt.nll(x0, answer=answer)[0])


LETTERS = SimpleNamespace(vocab_size=3, eos_id=2, token_bytes=lambda i: (b"a", b"bb", b"")[i])


def test_evaluation_counts_the_answers_tokens_and_bytes():
    """Nats of the whole rest of the row, tokens and bytes up to the first EOS; accuracy of its text alone."""
    rows = [torch.tensor(r) for r in ([0, 1, 0, 2], [1, 0, 1, 0, 2, 2], [0, 0, 0, 1, 1, 2])]
    answers = torch.tensor([[1, 4], [3, 5], [2, 6]])
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    result = evaluate.evaluate(fixed(*logits.tolist()), LETTERS, rows, masks=6, answers=answers)
    nats = -sum(logits[[0, 0, 1, 2]]), -sum(logits[[0, 2, 2]]), -sum(logits[[0, 1, 1, 2]])  # about, see below
    assert result["tokens"] == 3 + 2 + 4 and result["bytes"] == 3 + 1 + 5 and result["windows"] == 3
    assert [w["n"] for w in result["by_hidden_fraction"]] != [] and nats
    twin = build("autoregressive", vocab_size=3)
    exact = evaluate.evaluate(twin, LETTERS, rows, answers=answers)
    for w, (a, b), total in zip(rows, answers.tolist(), exact["per_window"]["nats"], strict=True):
        logp = twin(w[None])[0].log_softmax(1)[range(len(w)), w]
        assert total == pytest.approx(float(-logp[a:b].sum().detach()), abs=2e-3)
    assert exact["tokens"] == 9 and exact["bytes"] == 9 and exact["accuracy_by_hidden_fraction"] == []

    # a model that says 0 always: right where the text is 0; under all masks, from the canvases that it was shown
    toy = Toy(lambda x_t: torch.tensor([5.0, 0.0, 4.9]).expand(*x_t.shape, -1))
    many = [torch.tensor([1, 0, 1, 0, 2, 2])] * 40
    figures = evaluate.evaluate(toy, LETTERS, many, masks=5, answers=torch.tensor([[2, 5]] * 40))
    hidden = torch.cat([x_t == V for x_t in toy.seen])  # (B·masks, T)
    for b, share in enumerate((0.25, 0.5, 0.75, 1.0)):
        mine = hidden[hidden.sum(1) == b + 1]
        (row,) = (r for r in figures["accuracy_by_hidden_fraction"] if r["from"] < share <= r["to"])
        assert row["n"] == mine[:, 2:4].sum() > 0
        assert row["accuracy"] == pytest.approx(float(mine[:, 3].sum() / mine[:, 2:4].sum()))
    total = diffusion.bound_windows(toy, many, 5, given=torch.full((40,), 2))[0].double().mean(1) * 4  # R = 4
    assert figures["per_window"]["nats"] == pytest.approx(total.tolist(), abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# data

ITEMS = [(f"{37 * a} और {b} कितने?", str(37 * a + b)) for a in range(6) for b in range(5)]  # of unequal lengths


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(pairs=ITEMS):
    return [dict(messages=[user(q), assistant(a)], kind="arithmetic") for q, a in pairs]


def made(folder, T=96, tokenizer=BYTES, **knobs):
    train_instruct.make_data(config.InstructConfig(**knobs), tokenizer, T, folder)
    return dataset.load(folder)


def texts(data, part, tokenizer=BYTES):
    """(prompt, answer, what fills the row) of every row."""
    T, ids = data.meta["seq_len"], getattr(data, part)
    for i, (a, b) in enumerate(data.answers[part].tolist()):
        row = ids[i * T : (i + 1) * T].tolist()
        yield tokenizer.decode(row[:a]), tokenizer.decode(row[a:b]), row[b - 1 :]


def everything(data):
    return {(q, a) for part in ("train", "val") for q, a, _ in texts(data, part)}


EXPECTED = {(f"प्रश्न: {q}\nउत्तर:", f" {a}") for q, a in ITEMS}


def test_every_source_makes_the_same_rows(tmp_path, monkeypatch):
    """JSONL, parquet, a local data set; messages, conversations, instruction and response, named columns."""
    asked = [q.split(" ", 1) for q, _ in ITEMS]  # instruction and input
    forms = dict(
        messages=chats(),
        conversations=[
            dict(conversations=[{"from": "human", "value": q}, {"from": "gpt", "value": a}]) for q, a in ITEMS
        ],
        instruction=[dict(instruction=q, input="", response=a) for q, a in ITEMS],
        output=[dict(prompt=q, output=a) for q, a in ITEMS],
        renamed=[dict(sawaal=q, jawab=a, prompt="no") for q, a in ITEMS],
    )
    hashes = set()
    for name, rows in forms.items():
        columns = "instruction=sawaal,response=jawab" if name == "renamed" else ""
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        for path in (jsonl(tmp_path / f"{name}.jsonl", rows), tmp_path / f"{name}.parquet"):
            data = made(tmp_path / f"{path.name}.data", data=str(path), columns=columns)
            assert everything(data) == EXPECTED
            hashes.add(data.hash)
    folder = tmp_path / "local" / "anudesh"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(chats()).to_parquet(folder / "hi.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hashes.add(made(tmp_path / "hub", dataset=str(folder), data="").hash)
    assert len(hashes) == 1
    both = made(tmp_path / "both", data=f"{tmp_path / 'messages.jsonl'}, {tmp_path / 'output.parquet'}")
    assert both.hash == data.hash and both.meta["duplicates"] == len(ITEMS)
    joined = [dict(instruction=a, input=b, response="ठीक") for a, b in asked]
    data = made(tmp_path / "joined", data=str(jsonl(tmp_path / "joined.jsonl", joined)))
    assert {q for q, _ in everything(data)} == {f"प्रश्न: {a}\n{b}\nउत्तर:" for a, b in asked}


def test_the_split_of_a_data_set_with_languages(tmp_path, monkeypatch):
    """Splits named by language, as ai4bharat/indic-instruct-data-v0.1 has them: hi without being asked."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    splits = {name: datasets.Dataset.from_list(chats([(f"{name} {q}", a) for q, a in ITEMS])) for name in ("en", "hi")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or splits)
    for split, expected in (("", "hi"), ("en", "en")):
        calls = []
        data = made(tmp_path / expected, dataset="ai4bharat/indic-instruct-data-v0.1", dataset_config="anudesh",
                    dataset_split=split)  # fmt: skip
        assert calls == [(("ai4bharat/indic-instruct-data-v0.1", "anudesh"), dict(streaming=True))]
        assert all(f": {expected} " in q for q, _ in everything(data))
    with pytest.raises(ValueError, match=r"no split 'test' but \['en', 'hi'\]"):
        made(tmp_path / "test", dataset="x", dataset_split="test")


def test_rows_end_in_eos_and_conversations_are_cut_at_turns(tmp_path):
    """Each answer is a row; where all does not fit, the oldest exchanges go; what fits in no way is counted."""
    long = [user("एक"), assistant("दो"), user("तीन"), assistant("चार"), user("पाँच"), assistant("छह" * 3), user("?")]
    rows = [dict(messages=long), dict(messages=[user("क" * 30), assistant("ख")]), *chats()]
    data = made(tmp_path / "rows", data=str(jsonl(tmp_path / "a.jsonl", rows)), val_fraction=0.3)
    got = everything(data)
    for part in ("train", "val"):
        for _, answer, rest in texts(data, part):
            assert set(rest) == {BYTES.eos_id} and answer
        assert data.meta["splits"][part]["bytes"] == sum(len(a.encode()) for _, a, _ in texts(data, part))
    assert ("प्रश्न: एक\nउत्तर:", " दो") in got and not any("क" in q for q, _ in got - EXPECTED if "एक" not in q)
    third = next(q for q, a in got if a == " छहछहछह")
    assert third == "प्रश्न: पाँच\nउत्तर:"  # with "तीन" it would be longer than 96 bytes
    assert EXPECTED <= got and len(got) == len(ITEMS) + 3


def test_duplicates_go_first_and_no_instruction_is_on_both_sides(tmp_path):
    """Case, spaces, joiners and end marks make no other instruction; signs do. The side is the instruction's own."""
    pairs = [(f"What is {a} {sign} {b}?", f"{a}{sign}{b}") for a in range(9) for b in range(9) for sign in "+-"]
    again = [(f" what IS\u200c  {q[8:-1]} । ", "other") for q, _ in pairs[::3]]
    first = made(tmp_path / "a", data=str(jsonl(tmp_path / "a.jsonl", chats(pairs + again))), val_fraction=0.3)
    assert first.meta["duplicates"] == len(again) == 54
    sides = {part: {q for q, _, _ in texts(first, part)} for part in ("train", "val")}
    assert len(sides["train"]) + len(sides["val"]) == 162 and not sides["train"] & sides["val"]
    assert 25 < len(sides["val"]) < 75  # 48.6 ± 5.8
    some = made(tmp_path / "b", data=str(jsonl(tmp_path / "b.jsonl", chats(pairs[:80]))), val_fraction=0.3)
    for part in sides:  # less data: each keeps its side
        assert {q for q, _, _ in texts(some, part)} <= sides[part]
    deep = [
        dict(messages=[user(q), assistant(a), user(f"और? {i}"), assistant("बस")]) for i in range(3) for q, a in pairs
    ]
    both = made(tmp_path / "c", T=128, data=str(jsonl(tmp_path / "c.jsonl", deep)), val_fraction=0.3)
    opens = {part: {q.split("\n")[0] for q, _, _ in texts(both, part)} for part in ("train", "val")}
    assert not opens["train"] & opens["val"] and len(both.answers["train"]) + len(both.answers["val"]) == 6 * 162
    few = made(tmp_path / "d", data=str(tmp_path / "a.jsonl"), max_examples=40, val_fraction=0.3)
    assert len(everything(few)) == 40 and everything(few) < everything(first)
    one_each = made(tmp_path / "e", data=str(jsonl(tmp_path / "e.jsonl", chats(pairs[:2]))), val_fraction=1e-9)
    assert len(one_each.answers["train"]) == len(one_each.answers["val"]) == 1


def test_each_row_comes_once_an_epoch_and_brings_its_answer(tmp_path):
    data = made(tmp_path / "d", data=str(jsonl(tmp_path / "a.jsonl", chats())))
    n, seen = len(data.answers["train"]), []
    for step in range(2):
        x0, answer = dataset.rows_of_chats(data, range(n), n, seed=1, step=step)
        for row, (a, b) in zip(x0.tolist(), answer.tolist(), strict=True):
            assert row[b - 1 :] == [BYTES.eos_id] * (97 - b) and BYTES.decode(row[:a]).endswith("उत्तर:")
        seen.append([tuple(row) for row in x0.tolist()])
    assert sorted(seen[0]) == sorted(seen[1]) != seen[0] and len(set(seen[0])) == n
    parts = [dataset.rows_of_chats(data, range(i, i + 4), 12, 1, 5) for i in (0, 4, 8)]
    whole = dataset.rows_of_chats(data, range(12), 12, 1, 5)
    assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
    assert all(torch.equal(p[1], whole[1]) for p in parts)


def test_a_damaged_folder_is_refused(tmp_path):
    data = made(tmp_path / "d", data=str(jsonl(tmp_path / "a.jsonl", chats())))
    meta = (tmp_path / "d" / "meta.json").read_text("utf-8")
    good = json.loads(meta)["splits"]["train"]["answers"]
    for bad in (good[:-1], [[b, a] for a, b in good], [[a, 97] for a, _ in good], None, [["x", 3]], [[1, 2, 3]]):
        changed = json.loads(meta)
        changed["splits"]["train"]["answers"] = bad
        (tmp_path / "d" / "meta.json").write_text(json.dumps(changed), "utf-8")
        with pytest.raises(RuntimeError, match="meta.json is damaged"):
            dataset.load(tmp_path / "d")
    changed = json.loads(meta)
    changed["splits"]["train"]["answers"][0][0] -= 1
    (tmp_path / "d" / "meta.json").write_text(json.dumps(changed), "utf-8")
    assert dataset.load(tmp_path / "d").hash != data.hash


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def bases(data, tmp_path_factory):
    """kind → a run of one step with a window of 96. Not to be written to."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        train(data, folder / kind, "--seq_len", 96, "--max_steps", 1, kind=kind)
    return folder


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("items") / "items.jsonl", chats())


SMALL = [f for f in TINY if f not in ("--seq_len", "32")]
SMALL = SMALL[: SMALL.index("--d_model")] + SMALL[SMALL.index("--d_ff") + 2 :]  # sizes are those of --init


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tuned_evaluated_and_talks(command, bases, items, tmp_path, kind):
    out = tmp_path / "chat"
    argv = ["--init", bases / kind, "--data", items, "--output_dir", out, *SMALL, "--max_steps", 4]
    result = command("train_instruct", *argv)
    assert result.code == 0 and not result.err and f"{len(ITEMS)} distinct" in result.out, result.err
    loaded = checkpoint.load(out)
    assert loaded.kind == kind and loaded.denoiser.config.max_seq_len == 96 and loaded.config["seq_len"] == 96
    (valid,) = (r for r in metrics(out) if "nats_per_token" in r and r["step"] == 4)
    prepared = dataset.load(out / "data")
    tokens = sum(int(b - a) for a, b in prepared.answers["val"])
    result = command("evaluate", "--ckpt", out, "--masks", 2)
    assert result.code == 0 and " answers of val" in result.out, result.err
    scores = json.loads((out / "eval.json").read_text("utf-8"))
    best = min(r["nats_per_token"] for r in metrics(out) if "nats_per_token" in r)
    assert scores["tokens"] == tokens and scores["nats_per_token"]["mean"] == pytest.approx(best, rel=1e-5)
    accuracy = scores["accuracy_by_hidden_fraction"]
    if kind == "autoregressive":
        assert accuracy == [] and scores["likelihood"] == "exact"
    else:
        assert sum(b["n"] for b in accuracy) > 0 and len(valid["accuracy_by_hidden_fraction"]) == 10
    result = command("sample_diffusion", "--ckpt", out, "--chat", "--prompt", "2 और 2 कितने?", "--max_new_tokens", 8)
    assert result.code == 0 and not result.err and result.out.count("\n") == 1


def test_four_facts_are_learned_by_heart(command, data, tmp_path):
    """And the model ends its answers itself."""
    facts = [("2+2?", "चार।"), ("3+4?", "सात।"), ("0+1?", "एक।"), ("5+5?", "दस।")]
    rows = jsonl(tmp_path / "facts.jsonl", [*chats(facts), *chats([("9+9?", "अठारह।")])])
    sizes = ["--d_model", 64, "--d_ff", 128, "--dropout", 0, "--seq_len", 64, "--max_steps", 1]
    for kind in ("transformer", "autoregressive"):
        train(data, tmp_path / kind, *sizes, kind=kind)
        out = tmp_path / f"{kind}_chat"
        argv = ["--init", tmp_path / kind, "--data", rows, "--output_dir", out, *SMALL, "--val_fraction", 1e-9,
                "--max_steps", 200, "--eval_interval", 0, "--save_interval", 200]  # fmt: skip
        result = command("train_instruct", *argv)
        assert result.code == 0, result.err
        loaded = checkpoint.load(out)
        learned = {q for q, _, _ in texts(dataset.load(out / "data"), "train", loaded.tokenizer)}
        cfg = config.SampleConfig(temperature=0, strategy="left_to_right", max_new_tokens=24)
        right = [sample_diffusion.ask(loaded, [user(q)], cfg) == a
                 for q, a in [*facts, ("9+9?", "अठारह।")] if f"प्रश्न: {q}\nउत्तर:" in learned]  # fmt: skip
        assert right == [True] * 4, kind


def test_resume_repeats_the_run_bit_for_bit(command, bases, items, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    argv = ["--data", items, *SMALL, "--max_steps", 8, "--mask_ratio_min", 0.15, "--dropout", 0.2]
    assert command("train_instruct", "--init", bases / "transformer", "--output_dir", a, *argv).code == 0
    shutil.copytree(a, b)
    for name in ("latest.pt", "step_000008.pt", "best.pt"):
        (b / name).unlink()
    result = command("train_instruct", "--output_dir", b, *argv, "--data_dir", b / "data", "--resume")
    assert result.code == 0 and "resumed" in result.out, result.err
    ends = [checkpoint.read(folder / "latest.pt") for folder in (a, b)]
    for end in ends:
        for name in ("data_dir", "output_dir", "resume"):
            end["config"].pop(name)
    assert difference(*ends) == "" and ends[0]["config"]["min_mask_rate"] == 0.15
    assert ends[0]["config"]["init"] == str(bases / "transformer") and ends[0]["model_config"]["dropout"] == 0.2
    before = contents(a)
    result = command("train_instruct", "--output_dir", a, *argv[:-4], "--resume")
    assert result.code == 2 and "min_mask_rate was 0.15 and is 0.0" in result.error()
    result = command("train_instruct", "--init", bases / "transformer", "--output_dir", a, *argv)
    assert result.code == 2 and "already holds a run" in result.error() and contents(a) == before
    other = command("train_instruct", "--init", bases / "autoregressive", "--data_dir", a / "data", "--output_dir",
                    tmp_path / "twin", *SMALL, "--max_steps", 1)  # fmt: skip
    assert other.code == 0 and not (tmp_path / "twin" / "data").exists()


def test_a_plan_starts_nothing(command, bases, items, tmp_path):
    argv = ["--init", bases / "transformer", "--data", items, "--output_dir", tmp_path / "x", *SMALL, "--plan"]
    result = command("train_instruct", *argv)
    assert result.code == 0 and "nothing was started" in result.out and not (tmp_path / "x").exists(), result.err


BAD = {
    "empty": ([], [], "no instruction with an answer"),
    "no answers": ([dict(instruction="a", response="")], [], "no instruction with an answer"),
    "unanswered": ([dict(messages=[user("a")])], [], "no instruction with an answer"),
    "columns": ([dict(q="a", a="b")], [], "line 1 has the columns ['a', 'q']"),
    "a named column": (chats(), ["--columns", "messages=talk"], "has the columns ['kind', 'messages']"),
    "a wrong map": (chats(), ["--columns", "question=messages"], "--columns is 'question=messages'"),
    "role order": ([dict(messages=[user("a"), user("b"), assistant("c")])], [], "line 1: turn 2 is the user's"),
    "an unknown role": ([dict(messages=[dict(role="tool", content="a")])], [], "a turn of 'tool'"),
    "a list": ([["a", "b"]], [], "line 1 is a list"),
    "a string turn": ([dict(messages=["a"])], [], "a turn is a str"),
    "one": (chats(ITEMS[:1]), [], "1 instruction cannot be split"),
    "too long": (chats([(q, "क" * 200) for q, _ in ITEMS]), [], "fits into 96 tokens with its question (the shortest"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused(command, bases, tmp_path, case):
    rows, more, words = BAD[case]
    path = jsonl(tmp_path / "bad.jsonl", rows)
    argv = ["--init", bases / "transformer", "--data", path, "--output_dir", tmp_path / "x", *SMALL, *more]
    result = command("train_instruct", *argv)
    assert result.code == 2 and words in result.error()
    assert not list((tmp_path / "x").glob("*.pt")) and not (tmp_path / "x" / "data" / "meta.json").exists()


def test_bad_files_and_flags_are_refused(command, bases, tmp_path, items):
    (tmp_path / "torn.jsonl").write_text('{"messages": [\n', "utf-8")
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"instruction": "\xe9"}\n')
    (tmp_path / "not.parquet").write_bytes(b"PAR0")
    (tmp_path / "folder").mkdir()
    start = ["--init", bases / "transformer", "--output_dir", tmp_path / "x", *SMALL]
    for name, words in {
        "torn.jsonl": "torn.jsonl line 1 is not JSON",
        "latin.jsonl": "latin.jsonl line 2 is not JSON in UTF-8",
        "not.parquet": "not.parquet is not a parquet file",
        "folder": "no .jsonl or .parquet in it",
        "gone.jsonl": "there is no",
        "*.txt": "there is no",
    }.items():
        result = command("train_instruct", *start, "--data", tmp_path / name)
        assert result.code == 2 and words in result.error()
    for flags, words in {
        ("--mask_ratio_min", 0.9, "--mask_ratio_max", 0.5): "0 <= min < max <= 1",
        ("--val_fraction", 1): "--val_fraction",
        ("--max_examples", -1): "--max_examples",
        ("--d_model", 64): "unrecognized arguments: --d_model",
        ("--init", tmp_path / "no.pt"): "no checkpoint",
        ("--data_dir", tmp_path / "nowhere"): "meta.json is missing",
    }.items():
        result = command("train_instruct", *start, "--data", items, *flags)
        assert result.code == 2 and words in result.error()
    made(tmp_path / "rows", T=80, data=str(items))
    result = command("train_instruct", *start, "--data_dir", tmp_path / "rows")
    assert result.code == 2 and "holds rows of 80" in result.error()


def test_what_is_not_a_run_of_ours_is_a_model_of_the_hub(tmp_path, trained):
    assert train_instruct.of_hub("google/muril-base-cased") == "hub:google/muril-base-cased"
    assert train_instruct.of_hub(str(tmp_path)) == f"hub:{tmp_path}" and train_instruct.of_hub("hub:a/b") == "hub:a/b"
    for ours in (trained, trained / "latest.pt", "gone.pt"):
        assert train_instruct.of_hub(str(ours)) == str(ours)


# ---------------------------------------------------------------------------------------------------------------------
# the talk


@pytest.fixture(scope="module")
def talker(bases):
    return checkpoint.load(bases / "transformer")


def test_the_oldest_turns_are_forgotten(talker, monkeypatch):
    """A window of 96: what was said first is left out of the prompt, whole exchanges at a time; a single long question
    is refused."""
    prompts, generate = [], sample_diffusion.generate
    monkeypatch.setattr(sample_diffusion, "generate", lambda *a: prompts.append(a[1][0]) or generate(*a))
    cfg = config.SampleConfig(max_new_tokens=16, steps=2)
    turns = [user("1" * 9), assistant("2" * 9), user("3" * 9), assistant("4" * 9), user("5")]
    sample_diffusion.ask(talker, turns, cfg)
    whole = [chat.prompt(turns[n:], talker.tokenizer) for n in (0, 2, 4)]
    assert prompts == [next(p for p in whole if len(p) <= 80)] and len(whole[0]) > 80
    with pytest.raises(ValueError, match="the window's 96 tokens, there are 80 for it|of the window's 96"):
        sample_diffusion.ask(talker, [user("क" * 300)], cfg)


def piped():
    read, write = os.pipe()
    os.write(write, "राम\n\n/stop\nराम गया\n".encode())
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = open(0, encoding="utf-8")


def test_questions_are_piped_in(start, bases):
    """Each line is a question; the answers see what was said before; the end of the input leaves, with 0."""

    argv = ["--ckpt", bases / "transformer", "--chat", "--max_new_tokens", 6, "--steps", 3, "--device", "cpu"]
    result = start("sample_diffusion", *argv, before=piped).wait()
    assert result.code == 0 and not result.err and result.out.count("\n") >= 2


def test_the_default_order_leaves_room_for_an_answer():
    """Of a model that is sure of EOS at the end and wherever EOS follows, nothing is left by confidence."""

    def floods(x_t):
        before_end = torch.cat((x_t[:, 1:] == 2, torch.ones(len(x_t), 1, dtype=torch.bool)), 1)  # (B, T)
        return torch.where(before_end[..., None], torch.tensor([0.0, 0, 9, 0]), torch.tensor([0.0, 0, 0, 1]))

    for chatting, expected in ((False, [2] * 8), (True, [3] * 7 + [2])):
        cfg = config.SampleConfig(chat=chatting)
        canvas = torch.full((1, 8), 4)
        *_, step = sampling.denoise(Toy(floods, V=4), canvas, cfg.strategy, 8, temperature=0, eos_id=2)
        assert step.x[0].tolist() == expected
    assert config.SampleConfig(chat=True, strategy="entropy").strategy == "entropy"


def test_a_talk_refuses_what_it_cannot_do(command, bases):
    for flags in (["--html", "x.html"], ["--num_samples", 2], ["--max_new_tokens", 0]):
        result = command("sample_diffusion", "--ckpt", bases / "transformer", "--chat", "--prompt", "राम", *flags)
        assert result.code == 2 and flags[0] in result.error()
    result = command("sample_diffusion", "--ckpt", bases / "transformer", "--chat", "--prompt", "क" * 500)
    assert result.code == 2 and "shorten it" in result.error()


class Terminal:
    """sample_diffusion.py --chat in a pseudo-terminal, each forward slowed down so that it can be stopped."""

    def __init__(self, context, run, seconds):
        self.fd, theirs = pty.openpty()
        self.process = context.Process(target=talk_in_terminal, args=(os.ttyname(theirs), run, seconds), daemon=True)
        self.process.start()
        self.out = ""

    def until(self, words, seconds=60):
        end = time.monotonic() + seconds
        while not re.search(words, self.out):
            assert time.monotonic() < end, self.out
            if select.select([self.fd], [], [], 0.1)[0]:
                self.out += os.read(self.fd, 1 << 16).decode("utf-8", "replace")
        seen, self.out = self.out, ""
        return seen

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self):
        """Ctrl-C, when a prompt that has just been written has surely begun to read: Python would see it later only."""
        time.sleep(1)
        self.type("\x03")

    def code(self):
        end = time.monotonic() + 30
        while self.process.is_alive():
            assert time.monotonic() < end, self.out
            if select.select([self.fd], [], [], 0.05)[0]:
                self.out += os.read(self.fd, 1 << 16).decode("utf-8", "replace")
        return self.process.exitcode


def talk_in_terminal(terminal, run, seconds):
    os.setsid()  # so that the terminal becomes this process's own, and its Ctrl-C comes here
    for fd in (0, 1, 2):
        os.dup2(os.open(terminal, os.O_RDWR), fd)
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, name, open(fd, mode, encoding="utf-8"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    trunk = Transformer.trunk
    Transformer.trunk = lambda *a, **k: time.sleep(seconds) or trunk(*a, **k)
    sys.argv = ["sample_diffusion.py", "--ckpt", str(run), "--chat", "--steps", "40", "--max_new_tokens", "40",
                "--min_new_tokens", "40", "--device", "cpu"]  # fmt: skip
    config.run_main(sample_diffusion.main)


def test_a_talk_in_a_terminal(forks, bases):
    """The answer appears live; /stop and Ctrl-C stop it at once and the talk goes on; Ctrl-C twice leaves with 130."""
    terminal = Terminal(forks, bases / "transformer", seconds=0.5)
    terminal.until("> ")
    terminal.type("राम\n")
    live = terminal.until(r"░[^░]*\x1b\[F")  # drawn, and about to be drawn again
    assert live.count("░") >= 10
    terminal.type("/stop\n")
    begin = time.monotonic()
    assert "(stopped)" in terminal.until(r"\(stopped\)(.|\n)*> ") and time.monotonic() - begin < 10  # of 20 seconds
    terminal.type("सीता\n")
    terminal.until("░")
    terminal.interrupt()
    assert "Ctrl-C again leaves" in terminal.until(r"leaves\)(.|\n)*> ")
    terminal.interrupt()
    assert terminal.code() == 130

    terminal = Terminal(forks, bases / "transformer", seconds=0)
    terminal.until("> ")
    terminal.interrupt()
    terminal.until(r"again leaves\)\s*> ")
    terminal.type("राम\n")  # a question in between: that Ctrl-C is forgotten
    terminal.until("\n> $")
    terminal.type("\x04")  # the end of the input
    assert terminal.code() == 0

"""prepare.py and romanize.py: what is written is the text, whole; faults leave no half of it behind."""

import hashlib
import importlib.resources
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import tokenizer as T
from config import PrepareConfig, run_main
from romanize import COMMON, romanize

ROOT = Path(__file__).parents[1]
HARD = "क\u200dष क्\u200cष \0 a\r\nb\t  \u202eשלום\u202c 👩‍👩‍👧 é नऩ क़ \u00a0\u2028\x0c\x85 [MASK] </s> ▁ ।॥ \U0010ffff"


def story(n, words=12, seed=0):
    """Document n, unlike every other."""
    rng = random.Random(f"{seed} {n}")
    return f"कहानी {n} " + " ".join(
        rng.choice(["वह", "घर", "गया", "लड़की", "ने", "कहा", "पानी", "था।"]) for _ in range(words)
    )


def run(out, **flags):
    return prepare.prepare(PrepareConfig(output_dir=str(out), **{"tokenizer": "bytes", **flags}))


def command(capsys, monkeypatch, *argv):
    """The command line in this process: its exit code and standard error."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run_main(prepare.main)
    return e.value.code, capsys.readouterr().err


def read(out, split):
    """(documents as text, ids) of a split, checked against meta.json in every number it states."""
    meta = json.loads((out / "meta.json").read_text("utf-8"))
    tok = T.load(out / meta["tokenizer"]["file"])
    assert (
        tok.sha256 == meta["tokenizer"]["sha256"] == hashlib.sha256((out / "tokenizer.model").read_bytes()).hexdigest()
    )
    assert meta["special_ids"] == {name: getattr(tok, f"{name}_id") for name in ("pad", "bos", "eos", "unk")}
    raw, said = (out / f"{split}.bin").read_bytes(), meta["splits"][split]
    ids = np.frombuffer(raw, dtype="<u2" if meta["dtype"] == "uint16" else "<u4")
    assert ids[-1] == tok.eos_id and ids.max() < meta["vocab_size"] == tok.vocab_size
    documents = [tok.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == tok.eos_id) + 1)[:-1]]
    text = "".join(documents)
    assert said == {
        "documents": len(documents), "tokens": len(ids), "bytes": len(text.encode()), "characters": len(text),
        "sha256": hashlib.sha256(raw).hexdigest()}  # fmt: skip
    assert sum(len(tok.token_bytes(int(id))) for id in ids) == said["bytes"]  # bits per byte need this to be exact
    return documents, ids


def whole(out):
    """A folder holds either no prepared set, or one whose every file is the one that meta.json names."""
    if not (out / "meta.json").exists():
        return False
    assert read(out, "train") and read(out, "val")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# what is written


def novel():
    text = (importlib.resources.files("idatasets") / "datasets/devdas.txt").read_text("utf-8")
    return [line.rstrip() for line in text.replace("\x0c", "\n").splitlines() if line.strip()]


def test_default_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(capsys, monkeypatch)[0] == 0
    lines = [T.normalize(line) for line in novel()]
    tenth = len(lines) // 10
    for split, expected in (("train", lines[:-tenth]), ("val", lines[-tenth:])):
        documents, ids = read(tmp_path / "data/processed", split)
        assert documents == ["\n".join(expected)]
        assert len(ids) / len(" ".join(expected).split()) < 1.5  # cl100k: 4.7 and more
    meta = json.loads((tmp_path / "data/processed/meta.json").read_text("utf-8"))
    assert meta["vocab_size"] == 8192 and meta["dtype"] == "uint16" and "MIT" in meta["license"]
    assert sorted(os.listdir(tmp_path / "data/processed")) == ["meta.json", "tokenizer.model", "train.bin", "val.bin"]


@pytest.mark.parametrize("tokenizer", ["bpe", "unigram", "bytes"])
def test_documents_are_kept_whole_and_once(tmp_path, tokenizer):
    stories = [story(n) + f"\n{n} {HARD}" for n in range(300)]
    (tmp_path / "a.txt").write_text("\n\n".join(stories + stories[:40]), "utf-8", newline="")
    (tmp_path / "b.txt").write_text("\n \n\n" + "\n\n\n".join(stories[100:]) + "\n\n", "utf-8", newline="")
    meta = run(tmp_path / "out", input=str(tmp_path), tokenizer=tokenizer, vocab_size=600)
    train, _ = read(tmp_path / "out", "train")
    val, _ = read(tmp_path / "out", "val")
    order = {T.normalize(text): n for n, text in enumerate(stories)}
    assert not set(train) & set(val) and sorted(train + val, key=order.get) == list(order)
    for part in (train, val):
        assert [order[text] for text in part] == sorted(order[text] for text in part)  # in the order of the input
    assert meta["duplicates"] == 240
    assert abs(len(val) - 30) < 4 * (300 * 0.1 * 0.9) ** 0.5


def test_split_shares_and_seed():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 20000, dtype=np.uint64)
    train, val, chosen = prepare.split(hashes, 0.1, 0.25)
    assert not (train & val).any() and (train | val).all() and not (chosen & ~train).any()
    assert abs(val.mean() - 0.1) < 4 * (0.09 / 20000) ** 0.5
    assert abs(chosen.sum() / train.sum() - 0.25) < 4 * (0.1875 / 18000) ** 0.5
    for n in range(2, 12):
        for _ in range(30):
            train, val, chosen = prepare.split(rng.integers(0, 2**64, n, dtype=np.uint64), 0.001, 0.001)
            assert train.any() and val.any() and chosen.any() and train.sum() + val.sum() == n
            train, val, _ = prepare.split(rng.integers(0, 2**64, n, dtype=np.uint64), 0.999, 0)
            assert train.any() and val.any()
    train, val, _ = prepare.split(np.array([5, 7, 5, 7, 5], dtype=np.uint64), 0.5, 0)
    assert train.sum() == val.sum() == 1 and not train[2:].any() and not val[2:].any()


def test_the_seed_moves_the_split(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(100))), "utf-8")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, input=str(tmp_path / "a.txt"), seed=seed)
    vals = [set(read(tmp_path / name, "val")[0]) for name in "abc"]
    assert vals[0] == vals[1] != vals[2]


@pytest.mark.parametrize("text", [
    "एक\nदो\nतीन", "\n".join(map(str, range(95))), "मैं कल बाज़ार गया था", "कखगघङ", "कि" * 30, "a b", "ab",
    story(1, 900)])  # fmt: skip
def test_one_document(tmp_path, text):
    (tmp_path / "a.txt").write_text(text + "\n\n" + text, "utf-8")  # a copy of it is no second document
    run(tmp_path / "out", input=str(tmp_path / "a.txt"))
    (train,), (val,) = read(tmp_path / "out", "train")[0], read(tmp_path / "out", "val")[0]
    lines = T.normalize(text).split("\n")
    if len(lines) > 1:
        tenth = max(1, len(lines) // 10)
        assert (train, val) == ("\n".join(lines[:-tenth]), "\n".join(lines[-tenth:]))
    else:
        assert train + val == lines[0] and train and val.strip()
        assert (" " in text) <= val.startswith(" ") and (text != "कि" * 30 or val.startswith("क"))
        assert len(text) < 500 or 0.08 < len(val) / len(text) < 0.12
    run(tmp_path / "latin", input=str(tmp_path / "a.txt"), romanized=0.3)
    again, latin = read(tmp_path / "latin", "train")[0]
    assert again == train and read(tmp_path / "latin", "val")[0] == [val]
    assert len(text) < 500 or 0.2 < len(latin) / len(romanize(train)) < 0.4


def test_one_document_larger_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 50)
    monkeypatch.setattr(prepare, "BLOCK", 64)
    lines = [story(n) for n in range(57)]
    (tmp_path / "a.txt").write_text("\n".join(lines), "utf-8")
    for name, romanized in (("out", 0.0), ("latin", 0.2)):
        run(tmp_path / name, input=str(tmp_path / "a.txt"), romanized=romanized)
        assert read(tmp_path / name, "train")[0][0] == T.normalize("\n".join(lines[:-5]))
        assert read(tmp_path / name, "val")[0] == [T.normalize("\n".join(lines[-5:]))]
    latin = read(tmp_path / "latin", "train")[0][1]
    assert latin.count("\n") + 1 == round(52 * 0.2) and not re.search("[\u0900-\u097f]", latin)
    numbers = [int(line.split()[1]) for line in latin.split("\n")]  # "kahani 12 …": which lines they were
    assert numbers == list(range(numbers[0], numbers[0] + 10)) and numbers[-1] < 52


@pytest.mark.parametrize(
    "vocab_size, dtype", [(260, "uint16"), (65535, "uint16"), (65536, "uint32"), (65537, "uint32")]
)
def test_dtype(vocab_size, dtype):  # T1
    assert prepare.pick_dtype(vocab_size).name == dtype
    ids = [0, 1, vocab_size - 1]
    assert np.frombuffer(prepare.pack(ids, vocab_size), dtype).tolist() == ids
    for bad in (vocab_size, -1, 2**32, 2**16 + vocab_size):
        with pytest.raises(RuntimeError, match=f"{bad}.*{vocab_size}"):
            prepare.pack([0, bad], vocab_size)


def test_four_byte_ids_are_written_and_read(tmp_path):
    import base64

    ranks = {bytes([b]): b for b in range(256)} | {b"\xff\xff" + n.to_bytes(3, "big"): n for n in range(256, 70000)}
    ranks[" था".encode()[:2]], ranks[" था".encode()[:3]] = 70000, 70001
    ranks[" थ".encode()] = 70002
    (tmp_path / "big.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    (tmp_path / "a.txt").write_text("\n".join(map(story, range(50))), "utf-8")
    meta = run(tmp_path / "out", input=str(tmp_path / "a.txt"), tokenizer=f"tiktoken:{tmp_path}/big.tiktoken")
    assert meta["dtype"] == "uint32" and meta["special_ids"]["eos"] == 70003 + 2
    assert read(tmp_path / "out", "train")[1].max() == 70005


def reference(text, documents):
    """The documents of a text, said another way."""
    text = text.replace("\ufeff", "").replace("\u200b", "")
    lines = text.split("\n")
    if documents == "row":
        return [line.removesuffix("\r") for line in lines if line.strip()]
    groups, group = [], []
    for line in [*lines, ""]:
        if line.strip():
            group.append(line)
        elif documents == "blank" and group:
            groups.append("\n".join(group).removesuffix("\r"))
            group = []
    if documents == "file":
        first = next((i for i, line in enumerate(lines) if line.strip()), 0)
        last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
        groups = ["\n".join(lines[first : last + 1]).removesuffix("\r")] if last >= 0 else []
    return groups


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("aक़िंं \n\n\n\r\t\ufeff\u200b👩é"), max_size=80), st.integers(1, 9), st.integers(2, 12))
def test_reading_in_small_blocks(text, block, piece):
    path = Path(tempfile.gettempdir()) / f"nanohindi_blocks_{os.getpid()}.txt"
    path.write_text(text, "utf-8", newline="")
    before, prepare.BLOCK, prepare.PIECE = (prepare.BLOCK, prepare.PIECE), block, piece
    try:
        for documents in ("blank", "row", "file"):
            found, held = [], []
            for part in prepare.read_txt(path, "a.txt", documents):
                if part is None:
                    found.append("".join(held).replace("\ufeff", "").replace("\u200b", ""))
                held = [] if part is None else [*held, part]
            if "\u200b" in text or "\ufeff" in text:  # one of them may hide the \r of a last line end
                found = [f.rstrip("\r") for f in found]
                assert found == [f.rstrip("\r") for f in reference(text, documents)]
            else:
                assert found == reference(text, documents)
            assert not held
    finally:
        (prepare.BLOCK, prepare.PIECE) = before
        path.unlink()


def test_every_source_gives_the_same(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stories = [story(n) + f" {HARD}".replace("\r\n", " ") for n in range(60)]
    rows = [{"text": text, "n": n} for n, text in enumerate(stories)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("\ufeff" + "\n\n".join(stories[:30]), "utf-8", newline="")
    (tmp_path / "in/sub").mkdir()
    (tmp_path / "in/sub/b.jsonl").write_text("\n\n".join(map(json.dumps, rows[30:])) + "\n \n", "utf-8")
    (tmp_path / "in/readme.md").write_bytes(b"\xff")  # a folder gives only what can be text
    pq.write_table(pa.table({"text": stories + ["", None]}), tmp_path / "all.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "row.txt").write_text("\n".join(stories), "utf-8", newline="")
    whole_text = "\n\n".join(stories).encode()
    run(tmp_path / "o0", input=str(tmp_path / "row.txt"), documents="row")
    run(tmp_path / "o1", input=str(tmp_path / "in"))
    run(tmp_path / "o2", input=f"{tmp_path}/in/*.txt, {tmp_path}/in/**/*.jsonl,{tmp_path}/in/a.txt")
    run(tmp_path / "o3", input=str(tmp_path / "all.parquet"))
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(whole_text)}))
    run(tmp_path / "o4", input="-")
    os.mkfifo(tmp_path / "pipe")
    copy = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    writer = subprocess.Popen([sys.executable, "-c", copy, tmp_path / "pipe"], stdin=subprocess.PIPE)
    writer.stdin.write(whole_text)
    writer.stdin.close()
    run(tmp_path / "o5", input=str(tmp_path / "pipe"))
    writer.wait()
    expected = [read(tmp_path / "o0", split)[0] for split in ("train", "val")]
    assert sorted(expected[0] + expected[1]) == sorted(map(T.normalize, stories))
    for n in range(1, 6):
        assert [read(tmp_path / f"o{n}", split)[0] for split in ("train", "val")] == expected


def test_dataset_is_streamed(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    stories = [story(n) + " \x0c👩" for n in range(40)]
    rows = [json.dumps({"body": text}) for text in stories] + ['{"body": null}', '{"body": " "}']
    (tmp_path / "set/train.jsonl").write_text("\n".join(rows), "utf-8")
    run(tmp_path / "out", dataset=str(tmp_path / "set"), text_field="body", license="CC0")
    found = read(tmp_path / "out", "train")[0] + read(tmp_path / "out", "val")[0]
    assert sorted(found) == sorted(map(T.normalize, stories))
    meta = json.loads((tmp_path / "out/meta.json").read_text("utf-8"))
    assert meta["source"] == str(tmp_path / "set") and meta["license"] == "CC0"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        run(tmp_path / "out2", dataset="x")


def test_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 3000)  # many jobs
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(1000))), "utf-8")
    metas = [
        run(tmp_path / str(n), input=str(tmp_path / "a.txt"), workers=n, romanized=0.3, tokenizer="bpe", vocab_size=400)
        for n in (1, 2)
    ]
    assert metas[0] == metas[1] and whole(tmp_path / "2")


def test_a_trained_tokenizer_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(60))), "utf-8")
    run(tmp_path / "a", input=str(tmp_path / "a.txt"), tokenizer="unigram", vocab_size=400)
    run(tmp_path / "b", input=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "a/tokenizer.model"))
    for name in ("tokenizer.model", "train.bin", "val.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_tokenizer_sees_a_bounded_sample_of_train_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SAMPLE", 20000)
    seen = []
    monkeypatch.setattr(T, "train_sentencepiece", lambda texts, *rest: seen.extend(texts) or T.Bytes().to_bytes())
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(2000))), "utf-8")
    run(tmp_path / "out", input=str(tmp_path / "a.txt"), tokenizer="bpe", romanized=0.2)
    assert set(seen) & set(read(tmp_path / "out", "train")[0]) and not set(seen) & set(read(tmp_path / "out", "val")[0])
    assert any(text.startswith("kahani") for text in seen)
    assert 10000 < sum(len(text.encode()) for text in seen) < 40000 + 1000
    assert "sample" in capsys.readouterr().out


def test_romanised_share(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(1000))), "utf-8")
    run(tmp_path / "plain", input=str(tmp_path / "a.txt"))
    run(tmp_path / "latin", input=str(tmp_path / "a.txt"), romanized=0.2)
    assert (tmp_path / "plain/val.bin").read_bytes() == (tmp_path / "latin/val.bin").read_bytes()
    plain, latin = (read(tmp_path / name, "train")[0] for name in ("plain", "latin"))
    assert latin[: len(plain)] == plain  # the twins come behind, so that they share no window
    twins = latin[len(plain) :]
    assert abs(len(twins) - 0.2 * len(plain)) < 4 * (0.16 * len(plain)) ** 0.5
    numbers = [int(text.split()[1]) for text in twins]
    assert set(numbers) <= {int(text.split()[1]) for text in plain} and len(set(numbers)) == len(numbers)
    assert not re.search("[\u0900-\u097f]", "".join(twins))
    assert {"woh", "wo"} <= set(" ".join(twins).split())  # spellings vary, as people's do


# ---------------------------------------------------------------------------------------------------------------------
# faults


def test_wrong_commands(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\ufeff \n\n \u200b\n\x0c\r\n", "utf-8")
    (tmp_path / "letter.txt").write_text("क", "utf-8")
    (tmp_path / "good.txt").write_text("एक दो\n\nतीन", "utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "एक"}\n{"text": \n', "utf-8")
    (tmp_path / "field.jsonl").write_text('{"body": "एक", "id": 1}\n', "utf-8")
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n', "utf-8")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    good = ("--input", tmp_path / "good.txt")
    for argv, says in [
        (("--input", tmp_path / "empty.txt"), "no text"), (("--input", tmp_path / "blank.txt"), "no text"),  # D1
        (("--input", tmp_path / "empty"), "holds no .txt"), (("--input", tmp_path / "letter.txt"), "too short"),
        (("--input", tmp_path / "missing"), f"{tmp_path}/missing"), (("--input", f"{tmp_path}/*.tsv"), "tsv"),
        (("--input", tmp_path / "bad.jsonl"), "bad.jsonl line 2 (byte 19) is not JSON"),
        (("--input", tmp_path / "field.jsonl"), "no field 'text' but ['body', 'id']"),
        (("--input", tmp_path / "number.jsonl"), "is a int, not a string"),
        (("--input", tmp_path / "bad.parquet"), "not a parquet file"),
        ((*good, "--tokenizer", "wordpiece"), "wordpiece is no file"), ((*good, "--vocab_size", "262"), "has no room"),
        ((*good, "--val_fraction", "0"), "--val_fraction"), ((*good, "--romanized", "1.5"), "--romanized"),
        ((*good, "--dataset", "x"), "exclude"), ((*good, "--output_dir", tmp_path / "good.txt"), "is a file"),
        ((*good, "--vocab", "300"), "unrecognized"),
    ]:  # fmt: skip
        code, err = command(capsys, monkeypatch, "--output_dir", tmp_path / "out", *argv)
        assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ") and says in err, (argv, err)
        assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


HINDI = "मैं कल बाज़ार गया था। "


@pytest.mark.parametrize("data, offset", [
    (b"abc\xffdef", 3), (HINDI.encode()[:-3], None), (b"a\xe0\xa4", 1), ("\ud800".encode("utf-8", "surrogatepass"), 0),
    (b"x" * (prepare.BLOCK - 1) + "क".encode() + b"\xe0\xa4x", prepare.BLOCK + 2),
    (b"x" * (prepare.BLOCK - 1) + b"\xe0\xa4x", prepare.BLOCK - 1), (HINDI.encode("utf-16"), 0),
    (b"\xfe\xff" + HINDI.encode("utf-16-be"), 0), (HINDI.encode("utf-16-le"), 7), (HINDI.encode("utf-16-be"), 6),
])  # fmt: skip
def test_bad_encodings_are_named(tmp_path, capsys, monkeypatch, data, offset):  # D3
    if offset is None:
        data, offset = HINDI.encode() + "।".encode()[:2], len(HINDI.encode())
    elif data[:2] not in (b"\xff\xfe", b"\xfe\xff") and b"\0" in data:
        offset = data.index(b"\0")
    (tmp_path / "bad.txt").write_bytes(data)
    code, err = command(capsys, monkeypatch, "--input", tmp_path / "bad.txt", "--output_dir", tmp_path / "out")
    assert code == 2 and f"{tmp_path}/bad.txt is not UTF-8 at byte {offset}" in err and err.count("\n") == 1
    assert ("UTF-16" in err) == (b"\0" in data or data[:1] in (b"\xff", b"\xfe") and len(data) > 9)
    if len(data) < 100 and b"\n" not in data:
        (tmp_path / "bad.jsonl").write_bytes(b'{"text": "x"}\n' + data)
        code, err = command(capsys, monkeypatch, "--input", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "out")
        assert code == 2 and "bad.jsonl" in err and "byte" in err


SCRIPT = "import sys, os, signal, prepare\nfrom config import run_main\n"


def script(body, *argv, **kwargs):
    return subprocess.Popen([sys.executable, "-c", SCRIPT + body, *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)  # fmt: skip


@pytest.mark.parametrize("boundary", range(6))
def test_killed_at_every_file_boundary(tmp_path, boundary):  # D6
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(200))), "utf-8")
    out = tmp_path / "out"
    run(out, input=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=400)
    before = (out / "meta.json").read_bytes()
    body = """
left = int(sys.argv.pop())
def counted(real):
    def call(*args, **kwargs):
        global left
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*args, **kwargs)
    return call
os.replace = counted(os.replace)
prepare.Path.unlink = counted(prepare.Path.unlink)
run_main(prepare.main)"""
    flags = ("--input", tmp_path / "a.txt", "--output_dir", out, "--tokenizer", "bytes")
    p = script(body, *flags, boundary)
    _, err = p.communicate(timeout=30)
    assert p.returncode == (-signal.SIGKILL if boundary < 5 else 0), err
    assert whole(out) == (boundary in (0, 5))  # before the first step the old set, after the last one the new
    assert boundary != 0 or (out / "meta.json").read_bytes() == before
    assert boundary == 5 or (out / ".unfinished").exists()
    run(out, input=str(tmp_path / "a.txt"))
    assert whole(out) and not (out / ".unfinished").exists()


def test_killed_at_random_leaves_nothing_final_and_no_workers(tmp_path):  # D6
    (tmp_path / "a.txt").write_text("\n\n".join(story(n, 60) for n in range(8000)), "utf-8")
    flags = f"--input={tmp_path}/a.txt", f"--output_dir={tmp_path}/out", "--workers=2"
    argv = [sys.executable, "prepare.py", *flags]
    for wait in (0.3, random.uniform(0.4, 1.5), "workers"):
        p = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        listed = Path(f"/proc/{p.pid}/task/{p.pid}/children")
        begun = tmp_path / "out/.unfinished/train.bin"
        while wait == "workers" and p.poll() is None and not (begun.exists() and begun.stat().st_size):
            time.sleep(0.01)
        time.sleep(0 if wait == "workers" else wait)
        children = [int(child) for child in listed.read_text().split()] if listed.exists() else []
        p.kill()
        assert p.wait() == -signal.SIGKILL, "it finished before the kill; make the corpus larger"
        assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") in ([".unfinished"], [])
        end = time.time() + 10
        while any(map(alive, children)):
            assert time.time() < end, "orphaned workers live on"
            time.sleep(0.05)


def alive(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_disk_full(tmp_path, small_disk, capsys, monkeypatch, source):  # D7
    (tmp_path / "small.txt").write_text("\n\n".join(map(story, range(100))), "utf-8")
    (tmp_path / "large.txt").write_text("\n\n".join(map(story, range(20000))), "utf-8")
    out = small_disk / "out"
    run(out, input=str(tmp_path / "small.txt"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": open(tmp_path / "large.txt", "rb")}))
    path = "-" if source == "stdin" else tmp_path / "large.txt"
    code, err = command(capsys, monkeypatch, "--input", path, "--output_dir", out, "--tokenizer", "bytes")
    assert (code, err.count("\n")) == (1, 1) and "No space left on device" in err and str(out) in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_stands_there_is_replaced_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(30))), "utf-8")
    out = tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)
    (out / ".unfinished/train.bin").write_bytes(b"stale")
    (out / "notes.txt").write_text("mine")
    run(out, input=str(tmp_path / "a.txt"))
    with open(out / "train.bin", "rb") as held:  # a running job's file
        old = (out / "train.bin").read_bytes()
        run(out, input=str(tmp_path / "a.txt"), seed=5)
        assert held.read() == old != (out / "train.bin").read_bytes()
    assert whole(out) and sorted(os.listdir(out)) == [
        "meta.json", "notes.txt", "tokenizer.model", "train.bin", "val.bin"]  # fmt: skip


def test_a_failing_worker_is_an_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("\n\n".join(map(story, range(30))), "utf-8")
    monkeypatch.setattr(
        prepare, "tokenize", os.abort
    )  # the child cannot even take its argument: it ends as killed ones do
    flags = ("--input", tmp_path / "a.txt", "--output_dir", tmp_path / "out", "--tokenizer", "bytes", "--workers", "2")
    code, err = command(capsys, monkeypatch, *flags)
    assert code == 1 and err.count("\n") == 1 and not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("unit", [HINDI, "क"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_one_long_line(tmp_path, unit):  # D5
    """Four times the line takes four times the time and no more memory."""
    (tmp_path / "model").write_bytes(T.train_sentencepiece([HINDI * 50], 300))
    measured = []
    for megabytes in (2, 6):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(unit * (megabytes * 10**6 // len(unit.encode())), "utf-8")
        flags = ("--input", path, "--output_dir", tmp_path / "out", "--tokenizer", tmp_path / "model", "--workers", 1)
        body = "import time; start = time.process_time(); prepare.main()\n"
        # not ru_maxrss, which a child inherits from whoever started it
        body += "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        body += "print(time.process_time() - start, int(peak) / 1024)"
        out, err = script(body, *flags).communicate(timeout=100)
        measured.append([megabytes, *map(float, out.splitlines()[-1].split())])
        splits = json.loads((tmp_path / "out/meta.json").read_text("utf-8"))["splits"]
        total = len(T.normalize(path.read_text("utf-8")).encode())
        assert splits["train"]["bytes"] + splits["val"]["bytes"] == total
        assert 0.099 < splits["val"]["bytes"] / total < 0.101 and splits["val"]["documents"] == 1
    (small, t0, m0), (large, t1, m1) = measured
    assert t1 < 1.5 * large / small * t0, measured
    assert m1 - m0 < 16 and m1 < 300, measured


def test_help_reads_well():
    p = subprocess.run([sys.executable, "prepare.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0 and "python prepare.py --input" in p.stdout and "--romanized" in p.stdout


# ---------------------------------------------------------------------------------------------------------------------
# romanised Hindi

SPELLINGS = """
क्या kya | है hai | यार yaar yar | मैं mai main | कल kal | बाज़ार bazaar bazar | गया gaya | था tha | मुझे mujhe
समझ samajh | नहीं nahi nahin | आ aa a | रहा raha | लड़का ladka larka | पढ़ना padhna parhna
अच्छा achha accha acha | बच्चा baccha bachcha bacha | ज्ञान gyan gyaan | चाँद chand chaand | हिंदी hindi
फ़िल्म film | ख़बर khabar | ग़लत galat ghalat | क़लम qalam | कृष्ण krishna | दुःख dukh | समय samay
सरकार sarkar sarkaar | भारत bharat | मित्र mitra | शब्द shabd | आपका aapka apka | बचपन bachpan | पहला pehla pahla
कहना kehna kahna | ठीक theek thik | दूध doodh dudh | पानी pani paani | दुनिया duniya | क्षमा kshama
किताब kitab kitaab | विश्वास vishwas vishwaas | लंबा lamba | संबंध sambandh | ज़िंदगी zindagi | मछली machhli machli
छोटा chhota chota | तुम्हारा tumhara | हाथ haath hath | परमात्मा parmatma | डॉक्टर doctor daktar
कॉलेज kolej college | सूर्य surya | धर्म dharm dharma | प्रश्न prashn prashna | अंदर andar | हमें hame hamen hamein
१२३ 123 | १०० 100 | ० 0 | समझना samajhna
"""


@pytest.mark.parametrize("entry", [entry for entry in SPELLINGS.replace("\n", "|").split("|") if entry.strip()])
def test_spelling(entry):
    groups = re.findall(r"([\u0900-\u097f]+) ([^\u0900-\u097f]+)", entry)
    assert groups
    for word, accepted in groups:
        for form in (word, unicodedata.normalize("NFC", word)):
            assert romanize(form) in accepted.split(), form


def test_sentences():
    assert romanize("मैं कल बाज़ार गया था।") == "mai kal bazaar gaya tha."
    assert romanize("मुझे समझ नहीं आ रहा, यार!\nक्या है? café 5") == "mujhe samajh nahi aa raha, yaar!\nkya hai? café 5"
    assert all(unicodedata.is_normalized("NFC", word) for word in COMMON)  # else they are never found


LETTERS = st.characters(min_codepoint=0x900, max_codepoint=0x97F) | st.sampled_from("ab \n\u200d\u200c\u093c\u094d")


@settings(deadline=None)
@given(st.text(LETTERS, max_size=40), st.integers())
def test_nothing_of_the_script_is_left(text, seed):
    latin = romanize(text, seed)
    assert not re.search("[\u0900-\u097f]", latin) and latin.count("\n") == text.count("\n")
    assert latin == romanize(text, seed)

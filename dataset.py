"""The only reader of .bin: checks a prepared folder, cuts windows, and makes batches.

A folder of train_instruct.py holds rows of equal length, each a prompt, its answer, and EOS to the end.

    data = load("data/processed")            # .train .val: (tokens,) memory-mapped ids; .meta: meta.json
    x0 = batch(data.train, 128, rows=range(16), rows_a_step=16, seed=1337, step=0)          # (16, 128) long

A batch is a pure function of (seed, step), so a resumed run needs no saved position, and any split of a step's rows
over accumulation and processes sees the same windows.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass
class Data:
    meta: dict
    train: np.ndarray
    val: np.ndarray
    hash: str  # of both .bin and the tokenizer: what a resumed run compares
    answers: dict | None  # rows of chats: split -> (rows, 2) long, where each row's answer begins, and ends behind EOS


def load(data_dir):
    """Open a folder of prepare.py and check every byte of it.

    Raises FileNotFoundError where a file is missing, RuntimeError where one is damaged, ValueError for an id >= V.
    """
    folder = Path(data_dir)
    for name in ("meta.json", "train.bin", "val.bin"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; prepare.py --output_dir {folder} writes it")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, V = DTYPES[meta["dtype"]], int(meta["vocab_size"])
        expected = {
            split: (int(meta["splits"][split]["tokens"]), meta["splits"][split]["sha256"]) for split in ("train", "val")
        }
        answers = {split: meta["splits"][split].get("answers") for split in expected} if meta.get("seq_len") else None
        sums = [expected["train"][1], expected["val"][1], meta["tokenizer"]["sha256"]]
        digest = hashlib.sha256("".join(sums + ([json.dumps(answers)] if answers else [])).encode())
    except (ValueError, KeyError, TypeError) as e:
        raise RuntimeError(f"{folder / 'meta.json'} is damaged ({e!r}); run prepare.py again") from e
    ids = {split: open_bin(folder / f"{split}.bin", dtype, V, *expected[split]) for split in ("train", "val")}
    if answers:
        answers = {split: open_answers(folder, answers[split], meta["seq_len"], expected[split][0]) for split in ids}
    return Data(meta, ids["train"], ids["val"], digest.hexdigest(), answers)


def open_answers(folder, answers, T, tokens):
    try:
        found = torch.tensor(answers, dtype=torch.long).view(-1, 2)  # (rows, 2)
        begin, end = found.unbind(1)
        whole = len(found) * T == tokens and bool(((0 <= begin) & (begin < end) & (end <= T)).all())
    except (ValueError, TypeError, RuntimeError):
        whole = False
    if not whole:
        raise RuntimeError(f"{folder / 'meta.json'} is damaged: its answers do not fit rows of {T}; prepare it again")
    return found


def open_bin(path, dtype, V, tokens, sha256):
    size = path.stat().st_size
    if size != tokens * dtype.itemsize:
        raise RuntimeError(
            f"{path} has {size:,} bytes, meta.json says {tokens:,} tokens of {dtype.itemsize}; run prepare.py again"
        )
    if tokens == 0:
        raise ValueError(f"{path} is empty; the corpus is too small")
    ids, digest, largest = np.memmap(path, dtype, mode="r"), hashlib.sha256(), 0
    for start in range(0, tokens, 1 << 22):  # bounded memory
        piece = ids[start : start + (1 << 22)]
        digest.update(piece)
        largest = max(largest, int(piece.max()))
    if digest.hexdigest() != sha256:
        raise RuntimeError(f"{path} does not have the sha256 that meta.json states; run prepare.py again")
    if largest >= V:
        raise ValueError(f"{path} holds the id {largest}, the vocabulary ends at {V - 1}; run prepare.py again")
    return ids


@functools.lru_cache(maxsize=4)
def epoch_order(windows, seed, epoch):
    """The order in which one epoch visits its windows (windows,), and where its grid starts, from 0 to 1."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(windows), rng.random()


def batch(ids, seq_len, rows, rows_a_step, seed, step):
    """Rows `rows` (a range within 0..rows_a_step) of optimizer step `step`: (len(rows), seq_len) long.

    Each epoch lays a new grid of windows at a random offset and visits every window once, in random order.
    Raises ValueError if the text is shorter than one window.
    """
    slack = len(ids) - seq_len
    if slack < 0:
        raise ValueError(
            f"the training text has {len(ids):,} tokens, fewer than one window of {seq_len:,}; "
            "use more text or a smaller --seq_len"
        )
    windows = max(1, len(ids) // seq_len - 1)  # one less than fit, so that the grid can move
    out = np.empty((len(rows), seq_len), dtype=np.int64)
    for i, r in enumerate(rows):
        epoch, place = divmod(step * rows_a_step + r, windows)
        order, offset = epoch_order(windows, seed, epoch)
        start = int(offset * (len(ids) - windows * seq_len + 1)) + int(order[place]) * seq_len
        out[i] = ids[start : start + seq_len]
    return torch.from_numpy(out)


def rows_of_chats(data, rows, rows_a_step, seed, step):
    """As `batch`, of the rows of chats that `data` holds: x0 (len(rows), T) long, each row once an epoch, and `answer`
    (rows_a_step, 2), where the answer of every row of the step begins, and ends behind its EOS."""
    T, answers = data.meta["seq_len"], data.answers["train"]
    which = []
    for r in range(rows_a_step):
        epoch, place = divmod(step * rows_a_step + r, len(answers))
        which.append(int(epoch_order(len(answers), seed, epoch)[0][place]))
    x0 = np.stack([data.train[which[r] * T : (which[r] + 1) * T].astype(np.int64) for r in rows])
    return torch.from_numpy(x0), answers[which]


def windows(ids, seq_len, limit=0):
    """Neighbouring windows that cover every token once, the last one shorter: list of (T_w,) long tensors."""
    starts = range(0, len(ids), seq_len)
    return [torch.from_numpy(ids[s : s + seq_len].astype(np.int64)) for s in (starts[:limit] if limit else starts)]

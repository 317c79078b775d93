"""dataset.py: batches are a pure function of (seed, step), every window comes once, and no damage passes unseen."""

import hashlib
import json

import numpy as np
import pytest
import torch

import dataset

V = 300


def prepared(folder, train=range(250), val=range(40), dtype="uint16", changes=()):
    """A prepared folder with these ids; `changes` go over its meta.json."""
    meta = dict(dtype=dtype, vocab_size=V, tokenizer={"sha256": "t"}, splits={})
    for split, ids in (("train", train), ("val", val)):
        raw = np.array(ids).astype(dtype).tobytes()
        (folder / f"{split}.bin").write_bytes(raw)
        meta["splits"][split] = dict(tokens=len(ids), sha256=hashlib.sha256(raw).hexdigest())
    (folder / "meta.json").write_text(json.dumps(meta | dict(changes)))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# batches


@pytest.mark.parametrize(
    "tokens, T", [(1000, 10), (1009, 10), (64, 16), (17, 16), (16, 16), (31, 16), (32, 16), (5, 1)]
)
def test_an_epoch_covers_its_windows_once_and_moves_its_grid(tokens, T):
    ids, n = np.arange(tokens, dtype=np.uint16), max(1, tokens // T - 1)
    grids = set()
    for epoch in range(200):
        x = dataset.batch(ids, T, range(n), n, seed=1, step=epoch)  # one epoch a step
        assert x.shape == (n, T) and x.dtype == torch.long
        starts = x[:, 0].sort().values
        assert torch.equal(x, x[:, :1] + torch.arange(T)) and (starts.diff() == T).all()
        grids.add(int(starts[0]))
    assert grids == set(range(tokens - n * T + 1))  # every offset that fits: the last token comes too


def test_order_and_offset_are_random():
    ids = np.arange(1000)
    first = [int(dataset.batch(ids, 10, range(1), 1, seed, 0)[0, 0]) for seed in range(2000)]
    assert abs(np.mean(first) - 495) < 4 * 286 / 2000**0.5 and min(first) < 20 and max(first) > 970


def test_a_batch_is_a_pure_function_of_seed_and_step():
    ids, rows = np.arange(997), 12
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps = [dataset.batch(ids, 10, range(rows), rows, 7, s) for s in range(40)]  # five epochs
    for s in (39, 3, 17, 0):  # any order, a cold cache, any split into parts
        dataset.epoch_order.cache_clear()
        assert torch.equal(dataset.batch(ids, 10, range(rows), rows, 7, s), steps[s])
        for n in (1, 2, 3, 4, 6, 12):
            parts = [dataset.batch(ids, 10, range(i * rows // n, (i + 1) * rows // n), rows, 7, s) for i in range(n)]
            assert torch.equal(torch.cat(parts), steps[s])
    assert not torch.equal(dataset.batch(ids, 10, range(rows), rows, 8, 0), steps[0])
    assert torch.equal(torch.get_rng_state(), before)
    seen = torch.cat(steps)[:, 0]  # (480,) in the order of training: 98 windows an epoch
    for epoch in range(4):
        starts = seen[epoch * 98 : (epoch + 1) * 98]
        assert len(set(starts.tolist())) == 98 and len(set((starts % 10).tolist())) == 1


def test_a_step_larger_than_the_text_repeats_it():
    x = dataset.batch(np.arange(45), 10, range(30), 30, 0, 0)  # three windows, ten epochs
    for epoch in x[:, 0].view(10, 3):
        assert sorted((epoch - epoch.min()).tolist()) == [0, 10, 20]


def test_too_short_names_both_numbers():  # D2
    for rows in (range(0), range(2)):
        with pytest.raises(ValueError, match=r"1,999 tokens.*2,000"):
            dataset.batch(np.arange(1999), 2000, rows, 2, 0, 0)


@pytest.mark.parametrize("tokens, T", [(1, 10), (9, 10), (10, 10), (11, 10), (40, 7)])
def test_windows_cover_every_token_once(tokens, T):
    ids = np.arange(tokens, dtype=np.uint16)
    cut = dataset.windows(ids, T)
    assert torch.equal(torch.cat(cut), torch.arange(tokens)) and all(len(w) == T for w in cut[:-1])
    assert [w.tolist() for w in dataset.windows(ids, T, 2)] == [w.tolist() for w in cut[:2]]


# ---------------------------------------------------------------------------------------------------------------------
# the folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_load_gives_back_what_was_written(tmp_path, dtype):
    data = dataset.load(prepared(tmp_path, dtype=dtype))
    assert data.train.tolist() == list(range(250)) and data.val.tolist() == list(range(40))
    assert data.train.dtype.itemsize == (2 if dtype == "uint16" else 4) and data.meta["vocab_size"] == V
    same = dataset.load(prepared(tmp_path, dtype=dtype)).hash
    assert data.hash == same
    others = [dict(train=range(249)), dict(val=range(39)), dict(changes={"tokenizer": {"sha256": "u"}})]
    assert len({same, *(dataset.load(prepared(tmp_path, **other)).hash for other in others)}) == 4


def damage(name):
    return {
        "odd": lambda b: b[:-1],
        "truncated": lambda b: b[: len(b) // 2],
        "longer": lambda b: b + b"\0\0",
        "zero tail": lambda b: b[:-100] + bytes(100),
        "first bit": lambda b: bytes([b[0] ^ 1]) + b[1:],
        "last bit": lambda b: b[:-1] + bytes([b[-1] ^ 128]),
        "emptied": lambda b: b"",
    }[name]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["odd", "truncated", "longer", "zero tail", "first bit", "last bit", "emptied"])
def test_damaged_bin_is_named(tmp_path, split, name):  # D8
    path = prepared(tmp_path) / f"{split}.bin"
    path.write_bytes(damage(name)(path.read_bytes()))
    with pytest.raises(RuntimeError, match=f"{split}.bin"):
        dataset.load(tmp_path)


@pytest.mark.parametrize("changes", [
    dict(dtype="uint32"), dict(dtype="int8"), dict(vocab_size=None), dict(splits={}), dict(tokenizer="t"),
    dict(splits={s: dict(tokens="x", sha256="") for s in ("train", "val")})])  # fmt: skip
def test_meta_that_does_not_fit_is_a_fault_of_the_folder(tmp_path, changes):  # D8
    prepared(tmp_path, changes=changes)
    with pytest.raises(RuntimeError, match=r"meta\.json"):
        dataset.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"dtype": 3}', "\udcff"])
def test_meta_that_is_no_meta(tmp_path, text):
    (prepared(tmp_path) / "meta.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RuntimeError, match=r"meta\.json"):
        dataset.load(tmp_path)


def test_ids_beyond_the_vocabulary(tmp_path):  # T3
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=rf"{split}\.bin holds the id 300.*299"):
            dataset.load(prepared(tmp_path, **{split: [*range(290, 301), 5]}))
    assert dataset.load(prepared(tmp_path, train=[299])).train.tolist() == [299]


def test_missing_and_empty(tmp_path):  # D1
    with pytest.raises(ValueError, match=r"val\.bin is empty"):
        dataset.load(prepared(tmp_path, val=[]))
    for name in ("meta.json", "train.bin", "val.bin"):
        (prepared(tmp_path) / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            dataset.load(tmp_path)


def test_damage_in_a_later_piece_of_a_long_file(tmp_path):
    """The check works in pieces of 4M ids: the one large id stands in the second."""
    ids = np.zeros((1 << 22) + 10, dtype=np.uint16)
    ids[-3] = V
    with pytest.raises(ValueError, match="id 300"):
        dataset.load(prepared(tmp_path, train=ids))

"""Text → train.bin, val.bin, tokenizer.model and meta.json: documents deduplicated, split, tokenized, packed as ids.

    python prepare.py                                                      # the novel Devdas → data/processed
    python prepare.py --input my_text_dir --output_dir data/mine --vocab_size 16384 --romanized 0.1
    python prepare.py --dataset wikimedia/wikipedia --dataset_config 20231101.hi --output_dir data/wiki

The text is read three times and never held: once for a hash of each document (duplicates, split), once for a sample to
train the tokenizer on, once to tokenize. meta.json is written last: a folder without it is not a prepared one.
"""

import codecs
import collections
import concurrent.futures
import errno
import hashlib
import importlib.resources
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from array import array
from glob import glob
from pathlib import Path

import numpy as np
from tqdm import tqdm

import hub
import tokenizer as tokenizers
from config import PrepareConfig, parse, run_main
from romanize import romanize

BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 18  # characters of a document that are handled at once, about
SAMPLE = 32 << 20  # bytes of text the tokenizer is trained on, at most
IN_PROCESS = 8 << 20  # bytes below which starting processes costs more than it saves
SUFFIXES = (".txt", ".jsonl", ".parquet")
DEVDAS = dict(source="Devdas by Sarat Chandra Chattopadhyay (1917), in Hindi, from indic-nlp-datasets",
              license="MIT (the package); the author died in 1938")  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# reading: every reader yields the pieces of a document in order, then None where it ends


def read_text(path, name):
    """UTF-8 → str, a block at a time."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as f:
        while True:
            block = f.read(BLOCK)
            held = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                utf16 = " (UTF-16?)" if offset == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                at = offset - held + e.start
                raise ValueError(f"{name} is not UTF-8 at byte {at}{utf16}; convert it to UTF-8") from e
            # Devanagari in UTF-16 without a mark is valid UTF-8, all of it control characters: every second byte is 09
            for side in (block[::2], block[1::2]) if offset == 0 and b"\0" in block else ():
                if side.count(b"\t") + side.count(b"\0") > 0.9 * len(side):
                    raise ValueError(f"{name} is not UTF-8 at byte {block.index(0)} (UTF-16?); convert it to UTF-8")
            offset += len(block)
            yield text
            if not block:
                return


def lines_of(blocks):
    """Lines with a newline each; of a line longer than a piece the parts, the last one with the newline."""
    tail = ""
    for block in blocks:
        *lines, tail = (tail + block).split("\n")
        yield from (line + "\n" for line in lines)
        while len(tail) > 2 * PIECE:
            end = tokenizers.cut(tail, 0, PIECE)
            yield tail[:end]
            tail = tail[end:]
    if tail:
        yield tail + "\n"


def blank(text):
    return not text.replace("\ufeff", "").replace("\u200b", "").strip()


def read_txt(path, name, documents):
    held, size, gap = [], 0, ""  # gap: line ends, of no interest until the document goes on
    fresh, lead = True, ""  # a line begins here; lead: its first parts, while they are blank
    for line in lines_of(read_text(path, name)):
        line, lead, ended = lead + line, "", line.endswith("\n")
        body = line[:-1].removesuffix("\r") if ended else line
        if blank(body) and fresh and not ended:
            lead = line
            continue
        if blank(body) and fresh:
            if documents == "file":
                gap += line if held else ""
            elif held:
                yield from ("".join(held), None)
                held, size, gap = [], 0, ""
            continue
        if size > PIECE:
            yield "".join(held)
            held, size = [""], 0
        held += [gap, body]
        size += len(gap) + len(body)
        gap, fresh = line[len(body) :], ended
        if documents == "row" and ended:
            yield from ("".join(held), None)
            held, size, gap = [], 0, ""
    if held:
        yield from ("".join(held), None)


def row_text(row, field, where):
    if isinstance(row, dict):
        if field not in row:
            raise ValueError(f"{where} has no field {field!r} but {sorted(row)}; name one with --text_field")
        row = row[field]
    if row is not None and not isinstance(row, str):
        raise ValueError(f"{where}: the text is a {type(row).__name__}, not a string; name a field with --text_field")
    return row or ""


def read_jsonl(path, name, field):
    offset = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{name} line {number} (byte {offset})"
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield from split_row(row_text(json.loads(text), field, where))
            except UnicodeDecodeError as e:
                raise ValueError(f"{name} is not UTF-8 at byte {offset + e.start}; convert it to UTF-8") from e
            except json.JSONDecodeError as e:
                raise ValueError(f"{where} is not JSON: {e}") from e
            offset += len(line)


def open_parquet(path, name):
    """A pyarrow.parquet.ParquetFile. Raises ValueError if it is none, or without pyarrow."""
    try:
        from pyarrow import lib, parquet
    except ImportError:
        raise ValueError(f"{name} needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except lib.ArrowInvalid as e:
        raise ValueError(f"{name} is not a parquet file: {e}") from None


def read_parquet(path, name, field):
    table = open_parquet(path, name)
    if field not in table.schema_arrow.names:
        raise ValueError(f"{name} has no column {field!r} but {table.schema_arrow.names}; name one with --text_field")
    for batch in table.iter_batches(batch_size=64, columns=[field]):
        for text in batch.column(0).to_pylist():
            yield from split_row(row_text(text, field, name))


def split_row(text):
    if not blank(text):
        yield from tokenizers.chunks(text, PIECE)
        yield None


def find_inputs(cfg, tmp):
    """The files to read, as (path, name in messages), and source and licence. What can be read only once is copied."""
    origin = cfg.input or f"{cfg.dataset} {cfg.dataset_config}".strip()
    named = {"source": cfg.source or origin, "license": cfg.license}
    if cfg.dataset:
        return [(spool_dataset(cfg, tmp / "dataset.jsonl"), cfg.dataset)], named
    if not cfg.input:
        novel = importlib.resources.files("idatasets") / "datasets/devdas.txt"
        lines = [line.rstrip() for line in novel.read_text("utf-8").replace("\f", "\n").split("\n")]
        (tmp / "devdas.txt").write_text("\n".join(line for line in lines if line), "utf-8", newline="\n")
        return [(tmp / "devdas.txt", "devdas.txt")], DEVDAS | {k: v for k, v in named.items() if v}
    found = {}  # a file named twice is read once
    for part in filter(None, map(str.strip, cfg.input.split(","))):
        if part == "-":
            with open(tmp / "stdin.txt", "wb") as f:
                shutil.copyfileobj(sys.stdin.buffer, f, BLOCK)
            found[tmp / "stdin.txt"] = "standard input"
            continue
        paths = [part] if os.path.exists(part) else sorted(glob(part, recursive=True))
        if not paths:
            raise FileNotFoundError(f"--input: there is no {part}")
        for path in map(Path, paths):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
                if not inside:
                    raise ValueError(f"--input: the folder {path} holds no {', '.join(SUFFIXES)} file")
                found.update((p, str(p)) for p in inside)
            elif path.is_file():
                found[path] = str(path)
            else:  # a pipe, such as <(zcat …)
                copy = tmp / f"pipe{len(found)}.txt"
                with open(path, "rb") as source, open(copy, "wb") as f:
                    shutil.copyfileobj(source, f, BLOCK)
                found[copy] = str(path)
    return list(found.items()), named


def spool_dataset(cfg, path):
    try:
        import datasets
    except ImportError:
        raise ValueError("--dataset needs the datasets library: pip install datasets") from None
    rows = datasets.load_dataset(cfg.dataset, cfg.dataset_config or None, split=cfg.dataset_split, streaming=True)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for row in tqdm(rows, desc="fetching", unit="row", disable=None):
            text = tokenizers.normalize(row_text(row, cfg.text_field, cfg.dataset))  # a lone surrogate is no UTF-8
            f.write(json.dumps(text, ensure_ascii=False) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# which document goes where: what follows reads the text through `documents()`, a fresh iterator of (number, piece or
# None) a call, and `corpus()`, the same of (split, romanised?, piece or None)


def survey(documents, seed, total):
    """One hash and one size in bytes a document: some 50 bytes of memory each while `split` sorts them."""
    hashes, sizes = array("Q"), array("Q")
    salt = (seed % 2**64).to_bytes(8, "little")
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None)
    for _, pieces in itertools.groupby(documents(), key=lambda item: item[0]):
        h, size = hashlib.blake2b(digest_size=8, salt=salt), 0
        for _, piece in pieces:
            data = tokenizers.normalize(piece or "").encode()
            h.update(data)
            size += len(data)
            bar.update(len(data))
        hashes.append(int.from_bytes(h.digest(), "little"))
        sizes.append(size)
    bar.close()
    return np.array(hashes, dtype=np.uint64), np.array(sizes, dtype=np.uint64)  # (documents,) each


def split(hashes, val_fraction, romanized):
    """Three (documents,) bool: train, val, and which of train is romanised. A duplicate is in none of them."""
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    high, low = hashes >> np.uint64(32), hashes & np.uint64(2**32 - 1)  # two decisions out of one hash
    val = first & (high < val_fraction * 2**32)
    order = np.flatnonzero(first)[np.argsort(high[first], kind="stable")]
    val[order[0]], val[order[-1]] = True, False  # neither side is empty
    train = first & ~val
    chosen = train & (low < romanized * 2**32)
    if romanized and not chosen.any():
        chosen[np.flatnonzero(train)[np.argmin(low[train])]] = True
    return train, val, chosen


def corpus_of_many(documents, train, val, chosen):
    def corpus():
        for number, piece in documents():
            if number >= len(train):
                raise RuntimeError("the input grew while it was read; run again")
            if train[number] or val[number]:
                yield "train" if train[number] else "val", False, piece
        if chosen.any():  # behind all others: a text and its romanised twin must not share a window
            yield from (("train", True, piece) for number, piece in documents() if chosen[number])

    return corpus


def corpus_of_one(documents, val_fraction, romanized, seed):
    """One document only: its last lines are val; a run of the other lines is romanised."""

    def pieces():
        return (piece for number, piece in documents() if number == 0 and piece)  # what follows are its duplicates

    size, lines = map(sum, zip(*((len(piece), piece.count("\n")) for piece in pieces()), strict=True))
    lines += 1

    def line_start(line):
        """The character at which a line starts, 0 the first."""
        offset = 0
        for piece in pieces():
            here = piece.count("\n")
            if line <= here:
                at = 0
                for _ in range(line):
                    at = piece.index("\n", at) + 1
                return offset + at
            line -= here
            offset += len(piece)

    def space_near(goal):
        """Where one long line may be cut: at the last space before a character, or else at a cluster's edge."""
        offset = 0
        for piece in pieces():
            if goal - offset < len(piece):
                return offset + tokenizers.cut(piece, 0, max(goal - offset, 1))
            offset += len(piece)

    def passage(start, end):
        at = 0
        for piece in pieces():
            part = piece[max(0, start - at) : max(0, end - at)]
            at += len(piece)
            if part:
                yield part

    if lines > 1:
        train_lines = lines - min(lines - 1, max(1, int(lines * val_fraction)))
        val_start = line_start(train_lines)
        train_end = val_start - 1  # the newline between them is replaced by EOS
        run = min(train_lines, max(1, round(train_lines * romanized)))
        first = random.Random(seed).randrange(train_lines - run + 1)
        latin_start, latin_end = line_start(first), line_start(first + run) - 1
    else:
        train_end = val_start = space_near(int(size * (1 - val_fraction)))
        latin_start, latin_end = 0, min(train_end, space_near(int(train_end * romanized)))
    if not 0 < train_end < size or blank("".join(passage(val_start, min(size, val_start + PIECE)))):
        raise ValueError(f"the text is one document of {size} characters, too short to split; add text")

    def corpus():
        for part, latin, start, end in (
            ("train", False, 0, train_end),
            ("val", False, val_start, size),
            ("train", True, latin_start, latin_end),
        ):
            if not latin or romanized:
                yield from ((part, latin, piece) for piece in passage(start, end))
                yield part, latin, None

    return corpus


def sample(corpus, share, seed):
    """Text for the tokenizer, from train only; stops at twice SAMPLE, whatever chance does."""
    rng, size = random.Random(seed), 0
    for part, latin, piece in corpus():
        if part == "train" and piece:
            for text in tokenizers.chunks(piece, 1 << 14) if share < 1 else (piece,):
                if rng.random() < share:
                    size += len(text.encode("utf-8", "replace"))
                    yield romanize(tokenizers.normalize(text), seed) if latin else text
        if size > 2 * SAMPLE:
            return


def make_tokenizer(cfg, texts):
    if cfg.tokenizer in ("bpe", "unigram"):
        return tokenizers.from_bytes(tokenizers.train_sentencepiece(texts, cfg.vocab_size, cfg.tokenizer))
    if cfg.tokenizer == "bytes":
        return tokenizers.Bytes()
    if cfg.tokenizer.startswith("tiktoken:"):
        return tokenizers.from_tiktoken(cfg.tokenizer.removeprefix("tiktoken:"))
    if cfg.tokenizer.startswith("hub:"):
        return hub.read_tokenizer(cfg.tokenizer.removeprefix("hub:"))
    if not Path(cfg.tokenizer).is_file():
        raise FileNotFoundError(
            f"--tokenizer: {cfg.tokenizer} is no file, nor bpe, unigram, bytes, tiktoken:NAME or hub:NAME"
        )
    return tokenizers.load(cfg.tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing and writing


def pick_dtype(vocab_size):
    """uint16 while every id and MASK, which is id V, fit."""
    return np.dtype("<u2") if vocab_size <= 65535 else np.dtype("<u4")


def pack(ids, vocab_size):
    ids = np.array(ids, dtype=np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise RuntimeError(f"token ids from {ids.min()} to {ids.max()}, outside a vocabulary of {vocab_size}")
    return ids.astype(pick_dtype(vocab_size)).tobytes()


def make_jobs(corpus, seed):
    """(seed of its spellings, split, [(romanised?, piece or None)]), about PIECE characters each."""
    held, size, count = {"train": [], "val": []}, collections.Counter(), itertools.count()
    for part, latin, piece in corpus():
        held[part].append((latin, piece))
        size[part] += len(piece or "")
        if size[part] > PIECE:
            yield f"{seed} {next(count)}", part, held[part]
            held[part], size[part] = [], 0
    for part, pieces in held.items():
        yield f"{seed} {next(count)}", part, pieces


def start_worker(data):
    """In a worker process: its tokenizer, and an end when the parent was killed, which cannot say so."""
    global worker_tokenizer
    worker_tokenizer = tokenizers.from_bytes(data)
    parent = multiprocessing.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize(job):
    """One job → its split, the packed ids and what is counted."""
    seed, part, pieces = job
    ids, counts = [], collections.Counter()
    for latin, piece in pieces:
        if piece is None:
            ids.append(worker_tokenizer.eos_id)
            counts["documents"] += 1
            continue
        text = tokenizers.normalize(piece)
        text = romanize(text, seed) if latin else text
        ids += worker_tokenizer.encode_normal(text)
        counts.update(bytes=len(text.encode()), characters=len(text), words=len(text.split()))
    counts.update(tokens=len(ids))
    return part, pack(ids, worker_tokenizer.vocab_size), counts


def in_order(jobs, tokenizer, workers):
    """tokenize(job) of every job, in order; in `workers` processes, which are given only a few jobs ahead."""
    if workers <= 1:
        start_worker(tokenizer.to_bytes())
        yield from map(tokenize, jobs)
        return
    context = multiprocessing.get_context("spawn")  # the same on every system, and no threads are forked
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (tokenizer.to_bytes(),))
    waiting = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(tokenize, job))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def flush(f):
    f.flush()
    os.fsync(f.fileno())


def write(corpus, tokenizer, workers, tmp, total):
    """Both .bin; returns what meta.json says of them. Plain writes: a full disk is an error, never a SIGBUS."""
    names = ("documents", "tokens", "bytes", "characters", "words")
    counts = {part: collections.Counter(dict.fromkeys(names, 0)) for part in ("train", "val")}
    digests = {part: hashlib.sha256() for part in counts}
    with (
        open(tmp / "train.bin", "wb") as train,
        open(tmp / "val.bin", "wb") as val,
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar,
    ):
        for part, data, counted in in_order(corpus, tokenizer, workers):
            (train if part == "train" else val).write(data)
            digests[part].update(data)
            counts[part].update(counted)  # adds
            bar.update(counted["bytes"])
        flush(train)
        flush(val)
    return {part: dict(counts[part]) | {"sha256": digests[part].hexdigest()} for part in counts}


def prepare(cfg):
    """Does all of it; returns what meta.json holds."""
    out = Path(cfg.output_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output_dir {out} is a file")
    tmp = out / ".unfinished"  # beside the final files: renaming out of it is atomic
    shutil.rmtree(tmp, ignore_errors=True)  # what a killed run left
    try:
        tmp.mkdir(parents=True)
        return prepare_in(cfg, out, tmp)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(f"{e.strerror} in {out}; make room and run again, nothing there was replaced") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def prepare_in(cfg, out, tmp):
    files, named = find_inputs(cfg, tmp)
    ends = "file" if not cfg.input and not cfg.dataset else "blank" if cfg.documents == "auto" else cfg.documents
    readers = {".jsonl": (read_jsonl, cfg.text_field), ".parquet": (read_parquet, cfg.text_field)}

    def documents():
        number = 0
        for path, name in files:
            read, how = readers.get(path.suffix, (read_txt, ends))
            for piece in read(path, name, how):
                yield number, piece
                number += piece is None

    hashes, sizes = survey(documents, cfg.seed, sum(path.stat().st_size for path, _ in files))
    if not len(hashes):
        raise ValueError(f"there is no text in {named['source']}: {len(files)} files, all empty or blank")
    distinct = len(np.unique(hashes))
    if distinct == 1:
        corpus = corpus_of_one(documents, cfg.val_fraction, cfg.romanized, cfg.seed)
        train_bytes = total = int(sizes[0] * (1 + cfg.romanized))
    else:
        train, val, chosen = split(hashes, cfg.val_fraction, cfg.romanized)
        corpus = corpus_of_many(documents, train, val, chosen)
        train_bytes = int(sizes[train].sum() + sizes[chosen].sum())
        total = train_bytes + int(sizes[val].sum())
    dropped = len(hashes) - distinct
    print(f"text: {distinct:,} documents, {dropped:,} duplicates dropped, {sizes.sum() / 1e6:,.1f} MB")

    share = min(1.0, SAMPLE / train_bytes)
    if share < 1 and cfg.tokenizer in ("bpe", "unigram"):
        print(f"tokenizer: trained on a sample of {SAMPLE / 2**20:.0f} MiB, {share:.1%} of the training text")
    tokenizer = make_tokenizer(cfg, sample(corpus, share, cfg.seed))
    cores = cfg.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    workers = cores if cfg.workers or total > IN_PROCESS else 1
    splits = write(make_jobs(corpus, cfg.seed), tokenizer, workers, tmp, total)
    words = sum(part.pop("words") for part in splits.values())
    meta = {
        "format": 1,
        "dtype": pick_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": {name: getattr(tokenizer, f"{name}_id") for name in tokenizers.SPECIALS},
        "splits": splits,
        "tokenizer": {"file": "tokenizer.model", "sha256": tokenizer.sha256, "kind": tokenizer.kind},
        "normalisation": "NFC, U+200B and U+FEFF dropped",
        **named,
        "romanized": cfg.romanized,
        "val_fraction": cfg.val_fraction,
        "duplicates": dropped,
        "seed": cfg.seed,
    }
    with open(tmp / "tokenizer.model", "wb") as f:
        f.write(tokenizer.to_bytes())
        flush(f)
    with open(tmp / "meta.json", "w", encoding="utf-8") as f:
        json.dump(meta, f, ensure_ascii=False, indent=1)
        flush(f)
    # From here to the end meta.json is missing: a kill in between leaves no set that looks whole.
    (out / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "tokenizer.model", "meta.json"):
        os.replace(tmp / name, out / name)

    tokens, size = (sum(part[key] for part in splits.values()) for key in ("tokens", "bytes"))
    print(f"tokens: {tokens / max(words, 1):.2f} a word, {size / tokens:.2f} bytes each, {meta['vocab_size']:,} kinds")
    for name, part in splits.items():
        sizes = f"{part['documents']:,} documents, {part['tokens']:,} tokens, {part['bytes'] / 1e6:,.2f} MB of text"
        print(f"wrote {out / name}.bin: {sizes}")
    return meta


def main():
    (cfg,) = parse(__doc__, PrepareConfig)
    prepare(cfg)


if __name__ == "__main__":
    run_main(main)

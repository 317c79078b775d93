"""Instruction tuning: a checkpoint that writes → one that answers. The loop is that of train_diffusion.py.

    python train_instruct.py --init checkpoints/diffusion_hi --data data/instruct.jsonl --output_dir checkpoints/chat_hi
    python train_instruct.py --init checkpoints/autoregressive_hi --data_dir checkpoints/chat_hi/data   # the same rows
    python train_instruct.py --dataset ai4bharat/indic-instruct-data-v0.1 --dataset_config anudesh
    python sample_diffusion.py --ckpt checkpoints/chat_hi --chat

Conversations become rows of a prompt, its answer, and EOS to the end of the window, in OUTPUT_DIR/data; every answer of
a conversation makes a row. Only what follows the prompt is hidden, by fresh masks every step: so the model learns to
answer, and how long answers are. The autoregressive twin learns the answer's tokens and its first EOS. Sizes and
tokenizer are those of --init. A row of --data holds `messages` (or `conversations`) with role and content (or from and
value), or instruction, input and response; --columns names other columns.
"""

import dataclasses
import hashlib
import json
import tempfile
from glob import glob
from pathlib import Path

import torch
import torch.distributed as dist

import chat
import checkpoint
import evaluate
import prepare
import tokenizer as tokenizers
import train_diffusion
from config import InstructConfig, MaskConfig, TrainConfig, check, parse, run_main

FIELDS = dict(
    messages=("messages", "conversations"),
    instruction=("instruction", "prompt"),
    input=("input", "context"),
    response=("response", "output"),
)
ROLES = dict(user="user", human="user", assistant="assistant", gpt="assistant", bot="assistant", model="assistant")

# ---------------------------------------------------------------------------------------------------------------------
# reading: rows of files and of the hub → conversations


def read_files(names):
    """(where, row) of every row of .jsonl and .parquet files, folders of them, and globs, comma-separated."""
    for part in filter(None, map(str.strip, names.split(","))):
        path = Path(part)
        found = [f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet")] if path.is_dir() else glob(part)
        if not found:
            raise FileNotFoundError(f"--data: there is no {part}, or no .jsonl or .parquet in it")
        for name in sorted(map(str, found)):
            check(name.endswith((".jsonl", ".parquet")), f"--data {name}: neither .jsonl nor .parquet")
            yield from (read_jsonl if name.endswith(".jsonl") else read_parquet)(name)


def read_jsonl(name):
    with open(name, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield f"{name} line {number}", json.loads(line.decode("utf-8-sig"))
                except ValueError as e:  # UnicodeDecodeError and JSONDecodeError are
                    raise ValueError(f"{name} line {number} is not JSON in UTF-8: {e}") from e


def read_parquet(name):
    batches = prepare.open_parquet(name, name).iter_batches(batch_size=64)
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))


def read_dataset(cfg):
    """Rows of a data set of the hub, or of a local folder of one, streamed."""
    try:
        import datasets
    except ImportError:
        raise ValueError("--dataset needs the datasets library: pip install datasets") from None
    splits = datasets.load_dataset(cfg.dataset, cfg.dataset_config or None, streaming=True)
    split = cfg.dataset_split or ("hi" if "hi" in splits else "train")  # AI4Bharat's splits are languages
    check(split in splits, f"{cfg.dataset} has no split {split!r} but {sorted(splits)}; name one with --dataset_split")
    yield from ((f"{cfg.dataset} {split} row {number}", row) for number, row in enumerate(splits[split], 1))


def columns_of(text):
    """`instruction=prompt,response=output` → {"instruction": ("prompt",), "response": ("output",)} over FIELDS."""
    pairs = [part.split("=") for part in text.split(",") if part]
    right = all(len(pair) == 2 and pair[0] in FIELDS and pair[1] for pair in pairs)
    check(right, f"--columns is {text!r}, needs NAME=COLUMN between commas, NAME one of {', '.join(FIELDS)}")
    return FIELDS | {name: (column,) for name, column in pairs}


def turns_of(row, columns, where):
    """A row → turns as chat.py has them, without those of the user that nobody answers."""
    check(isinstance(row, dict), f"{where} is a {type(row).__name__}, not an object with named fields")
    found = {name: next((row[c] for c in names if row.get(c) is not None), None) for name, names in columns.items()}
    messages = found["messages"]
    if messages is None:
        missing = found["instruction"] is None or not any(c in row for c in columns["response"])
        check(
            not missing,
            f"{where} has the columns {sorted(row)}, needs messages, or instruction and response; "
            "say which is which with --columns instruction=NAME,response=NAME",
        )
        asked = "\n".join(str(found[name]) for name in ("instruction", "input") if found[name])
        messages = [dict(role="user", content=asked), dict(role="assistant", content=found["response"] or "")]
    elif isinstance(messages, dict):  # a list of structs, as Arrow's older form keeps it: a struct of lists
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    turns, system = [], ""
    for m in messages:
        check(isinstance(m, dict), f"{where}: a turn is a {type(m).__name__}, not an object with role and content")
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        if role == "system" and not turns:
            system = f"{content}\n"
            continue
        check(role in ROLES, f"{where}: a turn of {role!r}; known are {', '.join(ROLES)}, and system at the beginning")
        turns.append(dict(role=ROLES[role], content=f"{system}{content}" if content else ""))
        system = ""
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    try:
        chat.check_turns(turns, "assistant") if turns else None
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# conversations → a folder of rows


def canonical(text):
    """Two instructions are the same if they differ only in case, spaces, joiners and the marks at their end."""
    text = tokenizers.normalize(text).replace("\u200c", "").replace("\u200d", "")
    return " ".join(text.casefold().split()).rstrip(" ।॥.?!")


def hashed(text, salt):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest(), "little")


def distinct(rows, columns):
    """Conversations without duplicates: {all that the user says: turns}, and how many rows were dropped as duplicates,
    and because a turn of theirs is empty."""
    chats, duplicates, empty = {}, 0, 0
    for where, row in rows:
        turns = turns_of(row, columns, where)
        key = tuple(canonical(turn["content"]) for turn in turns[::2])
        if not turns or not all(turn["content"].strip() for turn in turns):
            empty += 1
        elif key in chats:
            duplicates += 1
        else:
            chats[key] = turns
    return chats, duplicates, empty


def split(chats, val_fraction, limit):
    """{instructions: turns} → two lists of turns, train and val, of `limit` conversations (0: all), chosen by a hash.

    The side goes by a hash of the first instruction: what begins alike is on one side, whatever else is in the data.
    Raises ValueError if there is one instruction only.
    """
    chosen = sorted(chats, key=lambda key: hashed("\0".join(key), b"choose"))[: limit or None]
    side = {key: hashed(key[0], b"split") for key in chosen}
    check(len(set(side.values())) > 1, f"{len(chosen)} instruction cannot be split into train and val; add more")
    threshold = min(max(int(val_fraction * 2**64), min(side.values()) + 1), max(side.values()))  # neither is empty
    return [[chats[key] for key in chosen if (side[key] < threshold) == val] for val in (False, True)]


def make_rows(conversations, tokenizer, T):
    """Every answer of the conversations → rows of T ids, [[begin, end)] of the answers in them, and what was counted:
    answers, those whose oldest turns were cut so that they fit, and those left out because not even the last fits."""
    rows, answers, counts = [], [], dict(answers=0, cut=0, too_long=0, shortest=0)
    for turns in conversations:
        for n in range(2, len(turns) + 1, 2):
            kept = chat.latest(turns[:n], lambda t: len(chat.example(t, tokenizer)[0]) <= T)
            counts["answers"] += 1
            if not kept:
                counts["too_long"] += 1
                size = len(chat.example(turns[n - 2 : n], tokenizer)[0])
                counts["shortest"] = min(counts["shortest"] or size, size)
                continue
            counts["cut"] += len(kept) < n
            ids, n_prompt = chat.example(kept, tokenizer)
            rows.append(ids + [tokenizer.eos_id] * (T - len(ids)))
            answers.append([n_prompt, len(ids)])
    return rows, answers, counts


def make_data(cfg, tokenizer, T, folder):
    """Read, split and write a folder that dataset.load opens; meta.json comes last. T: tokens a row."""
    source = cfg.dataset or cfg.data
    rows = read_dataset(cfg) if cfg.dataset else read_files(cfg.data)
    chats, duplicates, empty = distinct(rows, columns_of(cfg.columns))
    check(chats, f"there is no instruction with an answer in {source} ({empty} rows without)")
    print(f"chats: {len(chats):,} distinct of {len(chats) + duplicates + empty:,} rows "
          f"({duplicates:,} duplicates, {empty:,} without an answer or a question)")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    parts = {}
    for part, conversations in zip(("train", "val"), split(chats, cfg.val_fraction, cfg.max_examples), strict=True):
        rows, answers, counts = make_rows(conversations, tokenizer, T)
        check(
            rows,
            f"none of {counts['answers']} answers for {part} fits into {T} tokens with its question (the shortest "
            f"takes {counts['shortest']}); use shorter ones, or a model with a longer window",
        )
        data = prepare.pack([i for row in rows for i in row], tokenizer.vocab_size)
        checkpoint.replace(folder / f"{part}.bin", lambda t, data=data: t.write_bytes(data))
        written = evaluate.spans([torch.tensor(row) for row in rows], torch.tensor(answers))
        tokens, n_bytes, n_chars = (int(v.sum()) for v in evaluate.text_sizes(written, tokenizer))
        parts[part] = dict(documents=len(rows), tokens=len(rows) * T, answer_tokens=tokens, bytes=n_bytes,
                           characters=n_chars, sha256=hashlib.sha256(data).hexdigest(), answers=answers)  # fmt: skip
        print(f"wrote {folder / part}.bin: {len(rows):,} answers of {tokens / len(rows):.0f} tokens in rows of {T} "
              f"({counts['cut']:,} without their oldest turns, {counts['too_long']:,} left out: too long)")  # fmt: skip
    meta = dict(
        format=1,
        dtype=prepare.pick_dtype(tokenizer.vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        seq_len=T,
        splits=parts,
        tokenizer=dict(file="tokenizer.model", sha256=tokenizer.sha256),
        source=f"{source} {cfg.dataset_config}".strip(),
        val_fraction=cfg.val_fraction,
        max_examples=cfg.max_examples,
        duplicates=duplicates,
    )
    checkpoint.replace(folder / "tokenizer.model", lambda t: t.write_bytes(tokenizer.to_bytes()))
    text = json.dumps(meta, ensure_ascii=False)
    checkpoint.replace(folder / "meta.json", lambda t: t.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# the command


def of_hub(name):
    """`--init google/muril-base-cased`, or a folder that holds no .pt, is a model of the hub."""
    path = Path(name)
    ours = name.startswith("hub:") or path.suffix == ".pt" or (path / "best.pt").is_file() or any(path.glob("*.pt"))
    return name if ours else f"hub:{name}"


def tune(cfg, run):
    """cfg: InstructConfig, run: TrainConfig. Returns the last validation, as train_diffusion.train does."""
    mask = MaskConfig(min_mask_rate=cfg.mask_ratio_min, max_mask_rate=cfg.mask_ratio_max, loss_weight=cfg.loss_weight)
    out = Path(run.output_dir)
    if run.resume:  # the run's own kind, sizes and rows
        state, _ = checkpoint.read_newest(out)
        kind, sizes = state["kind"], checkpoint.MODELS[state["kind"]][0](**state["model_config"])
        T, run.data_dir = state["config"]["seq_len"], run.data_dir or state["config"]["data_dir"]
    else:
        run.init = of_hub(run.init)
        loaded = checkpoint.load(run.init)
        kind, sizes, T = loaded.kind, loaded.denoiser.config, min(run.seq_len, loaded.denoiser.config.max_seq_len)
    run.seq_len = T
    if cfg.dropout >= 0:
        check(hasattr(sizes, "dropout"), f"--dropout is for models of our own, {run.init} is {kind}")
        sizes = dataclasses.replace(sizes, dropout=cfg.dropout)
    if run.plan:
        with tempfile.TemporaryDirectory() as folder:
            if not run.data_dir:
                make_data(cfg, loaded.tokenizer, T, Path(folder))
            return train_diffusion.plan(kind, mask, sizes, dataclasses.replace(run, data_dir=run.data_dir or folder))
    rank, world, _ = train_diffusion.join_processes(run)
    if not run.data_dir:
        run.data_dir = str(out / "data")
        if rank == 0:
            checkpoint.open_run(out, resume=False).close()  # before anything of another run is replaced
            make_data(cfg, loaded.tokenizer, T, out / "data")
        if world > 1:
            dist.barrier()
    return train_diffusion.train(kind, mask, sizes, run)


def main():
    defaults = dict(data_dir="", output_dir="checkpoints/chat_hi", init="checkpoints/diffusion_hi", seq_len=256)
    defaults |= dict(max_steps=1000, lr=1e-3, eval_interval=100)
    tune(*parse(__doc__, InstructConfig, TrainConfig, **defaults))


if __name__ == "__main__":
    run_main(main)

"""THE training loop of nanoHinDi. The other trainers name another model for it.

    python train_diffusion.py --preset tiny --data_dir data/processed --output_dir checkpoints/diffusion_hi
    torchrun --nproc_per_node 2 train_diffusion.py --data_dir data/processed

Read `train` from top to bottom: set-up, then the loop: learning rate → evaluate and save → forward, backward → clip,
step → log. Every random draw is a pure function of (seed, step): on a CPU a resumed run repeats the uninterrupted one
bit for bit (same number of threads), and looking at a run (validation, samples) never changes it.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import dataset
import evaluate
import plot
import sample_diffusion
import tokenizer as tokenizers
from config import PROMPTS, EvaluateConfig, MaskConfig, SampleConfig, TrainConfig, check, one_line, parse, run_main
from machine import peak_memory, pick_device, pick_precision, total_memory
from optimizer import EMA, make_optimizers

# what a resumed run may change; everything else must stay as it was
MAY_CHANGE = set(
    "max_steps resume init plan check output_dir data_dir preset batch_size grad_accum amp device threads compile "
    "activation_checkpointing wandb keep log_interval eval_interval eval_masks eval_windows sample_interval "
    "sample_steps save_interval".split()
)

# ---------------------------------------------------------------------------------------------------------------------
# pieces of the loop


def generator_for(purpose, seed, step=0):
    """A CPU generator that is a pure function of its arguments; purpose: 0 masks, 1 dropout."""
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def learning_rate(step, run):
    """Share of the peak rate at a step: a rise, a plateau, and a fall to zero (or none)."""
    rise = min(1.0, (step + 1) / max(1.0, run.warmup * run.max_steps))
    if run.lr_schedule == "cosine":
        return rise * (1 + math.cos(math.pi * step / run.max_steps)) / 2
    left = (run.max_steps - step) / max(1.0, run.decay * run.max_steps)
    return rise * (min(1.0, left) if run.lr_schedule == "linear" else 1.0)


def average_gradients(model, world):
    """Mean of the gradients over all processes, in one message."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, piece in zip(grads, (flat / world).split([g.numel() for g in grads]), strict=True):
        g.copy_(piece.view_as(g))


def start_wandb(run, config):
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    with contextlib.suppress(OSError):
        if os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists():  # else it would ask and wait
            socket.create_connection(("api.wandb.ai", 443), timeout=2).close()
            mode = "online"
    return wandb.init(project="nanohindi", name=Path(run.output_dir).name, dir=run.output_dir, config=config, mode=mode)


def never_stop(call, *args, **kwargs):
    """What call returns, or None: a logging service never stops a run."""
    try:
        return call(*args, **kwargs)
    except Exception as e:
        print(f"warning: no wandb ({e}); metrics.jsonl is written all the same", file=sys.stderr)


def git_commit():
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git here
        return ""


def differences(old, new):
    """Fields in which a resumed run differs from its checkpoint, as one line; '' if only what may change does."""
    fields = [k for k in new if k in old and k not in MAY_CHANGE and old[k] != new[k]]
    return ", ".join(f"{k} was {old[k]!r} and is {new[k]!r}" for k in fields)


def begin_with(path, kind, sizes, tokenizer):
    """The weights of another run, averaged where it kept that, for a model of `kind` and `sizes`.

    Raises ValueError if it has another kind, tokenizer or size; block_length and dropout are no sizes.
    """
    other = checkpoint.load(path)
    old, new = (dataclasses.asdict(c) | dict(block_length=0, dropout=0) for c in (other.denoiser.config, sizes))
    old |= dict(kind=other.kind, tokenizer=other.tokenizer.sha256[:12])
    new |= dict(kind=kind, tokenizer=tokenizer.sha256[:12])
    if kind not in checkpoint.OURS:  # its positions reach further, whatever window is asked for
        old["max_seq_len"] = new["max_seq_len"]
    fields = ", ".join(f"{k} {old.get(k)!r}, here {v!r}" for k, v in new.items() if old.get(k) != v)
    check(not fields, f"--init {path} cannot begin this run: {fields}")
    return other.denoiser.state_dict()


def join_processes(run):
    """(rank, world, device) of this process; torchrun's others are joined, once."""
    rank, world, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = pick_device(run.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():  # the others wait while the first process validates: hours, not minutes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return rank, world, device


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def train(kind, mask, sizes, run, quiet=False):
    """Train a model of `kind` (a key of checkpoint.MODELS); returns the last validation, a dict."""
    rank, world, device = join_processes(run)
    first = rank == 0
    if run.threads:
        torch.set_num_threads(run.threads)
    say = (lambda *a: None) if quiet or not first else (lambda *a: tqdm.write(" ".join(map(str, a))))
    if run.init.startswith("hub:"):  # a pretrained model brings its kind and sizes
        pretrained = checkpoint.load(run.init)
        kind, sizes = pretrained.kind, pretrained.denoiser.config

    # --- data: x0 comes from train.bin through dataset.batch, or, of chats, dataset.rows_of_chats, nowhere else
    data = dataset.load(run.data_dir)
    folder = Path(run.data_dir)
    tokenizer = tokenizers.load(folder / data.meta["tokenizer"]["file"])
    V, n_parts = tokenizer.vocab_size, run.grad_accum * world
    check(
        tokenizer.sha256 == data.meta["tokenizer"]["sha256"],
        f"{folder}/{data.meta['tokenizer']['file']} is not the tokenizer that made {folder}; run prepare.py again",
    )
    check(V == data.meta["vocab_size"], f"meta.json states {data.meta['vocab_size']} ids, the tokenizer has {V}")
    check(
        mask.masking_strategy == "token" or not 0 < sizes.block_length < run.seq_len,
        "--masking_strategy span and --block_length exclude each other: spans know no blocks",
    )
    if data.answers:
        T = data.meta["seq_len"]
        check(run.seq_len == T, f"--seq_len is {run.seq_len}, and {folder} holds rows of {T} tokens")
        check(mask.masking_strategy == "token", "--masking_strategy span is for text, this is chats")
    else:
        dataset.batch(data.train, run.seq_len, range(0), n_parts * run.batch_size, run.seed, 0)  # long enough?
    starts = torch.from_numpy(tokenizer.word_starts())  # (V,) bool
    windows = dataset.windows(data.val, run.seq_len, run.eval_windows)
    answers = data.answers["val"][: len(windows)] if data.answers else None
    longest = max(sizes.max_seq_len, run.seq_len) if data.answers else run.seq_len  # tuned to chat, it reaches as far
    sizes = dataclasses.replace(sizes, vocab_size=V, max_seq_len=longest)
    begun = begin_with(run.init, kind, sizes, tokenizer) if run.init and not run.resume else None
    out = Path(run.output_dir)
    if first:
        lock = checkpoint.open_run(out, run.resume)  # noqa: F841  held until the process ends

    # --- model, optimizer, average
    torch.manual_seed(run.seed)
    config_class, model_class = checkpoint.MODELS[kind]
    model = model_class(sizes).to(device)
    if begun:
        model.load_state_dict(begun)
    model.activation_checkpointing = run.activation_checkpointing
    optimizers = make_optimizers(model, run.optimizer, run.lr, run.weight_decay, run.beta2)
    ema = EMA(model, run.ema) if run.ema else None
    dtype = pick_precision(run.amp, device)
    autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if run.compile:
        model.compile()  # in place: the names of the weights stay, and every model(...) is compiled

    # --- run folder; resume
    config = dict(kind=kind, **dataclasses.asdict(mask), **dataclasses.asdict(sizes), **dataclasses.asdict(run))
    config |= dict(rows_a_step=n_parts * run.batch_size, data_sha256=data.hash, tokenizer_sha256=tokenizer.sha256)
    config |= dict(chats=data.answers is not None)
    step, best, overflows, seconds = 0, math.inf, 0, 0.0
    if run.resume:
        state, path = checkpoint.read_newest(out)
        difference = differences(state["config"], config)
        check(not difference, f"{path} belongs to another run: {difference}; use another --output_dir")
        check(
            state["model"].keys() == model.state_dict().keys(),
            f"{path} is of an older version of this model: it still writes and is evaluated; use another --output_dir",
        )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if ema:
            ema.shadow = {k: v.to(device) for k, v in state["ema"].items()}
        if state["scaler"]:  # empty unless that run was in fp16
            scaler.load_state_dict(state["scaler"])
        step, best, overflows, seconds = state["step"], state["best"], state["overflows"], state["seconds"]
        config["init"] = state["config"].get("init", "")  # where the run did begin
        say(f"resumed {path} at step {step:,}")
    if first:
        facts = dict(
            torch=torch.__version__,
            device=str(device),
            precision=str(dtype or torch.float32),
            world=world,
            git_commit=git_commit(),
            parameters=sum(p.numel() for p in model.parameters()),
            train_tokens=len(data.train),
            operations_a_step=model.training_flops(run.seq_len) * n_parts * run.batch_size,
        )
        checkpoint.replace(out / "config.json", lambda t: t.write_text(json.dumps(config | facts, indent=1) + "\n"))
        # what was logged after the checkpoint, or torn by a kill, is about to be logged again
        old = plot.read_metrics(out) if step and (out / "metrics.jsonl").exists() else []
        kept = [r for r in old if r["step"] < step or (r["step"] == step and "loss" in r)]
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
        checkpoint.replace(out / "metrics.jsonl", lambda t: t.write_text(text, encoding="utf-8"))
        metrics = open(out / "metrics.jsonl", "a", encoding="utf-8")
        board = never_stop(start_wandb, run, config | facts) if run.wandb else None
        say(
            f"{kind}: {facts['parameters']:,} parameters on {device} in {facts['precision']}; "
            f"{len(data.train):,} training tokens, {n_parts * run.batch_size} × {run.seq_len} a step"
        )

    def log(record):
        if first:
            record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            metrics.write(json.dumps(record, ensure_ascii=False) + "\n")
            metrics.flush()
            if board:
                never_stop(board.log, record, step=record["step"])

    def save(*names):
        state = dict(
            format=1,
            kind=kind,
            model_config=dataclasses.asdict(sizes),
            config=config,
            step=step,
            best=best,
            overflows=overflows,
            seconds=seconds,
            model=model.state_dict(),
            ema=ema.shadow if ema else {},
            optimizers=[o.state_dict() for o in optimizers],
            scaler=scaler.state_dict(),
            tokenizer=torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8),
        )
        for name in names:
            checkpoint.save(out / name, state)

    caught = []  # the first signal; the loop looks at it once a step, so a save is never cut
    handlers = {
        s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    bar = tqdm(
        total=run.max_steps, initial=step, unit="step", disable=None if first and not quiet else True, leave=False
    )
    valid, logged = {}, (step, seconds)
    model.train()
    while True:
        # --- learning rate
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = run.lr * learning_rate(step, run)

        # --- evaluate and save, by the averaged weights, on the first process alone
        last, stop = step >= run.max_steps, bool(caught)
        if world > 1:
            flag = torch.tensor([float(stop)], device=device)
            dist.all_reduce(flag)  # a signal to one process stops all at the same step
            stop = flag.item() > 0
        if first:
            improved = False
            judge = last or (run.eval_interval and step % run.eval_interval == 0 and step and not stop)
            show = run.sample_interval and step % run.sample_interval == 0 and step and not stop
            model.eval()
            weights = ema.applied(model) if ema and (judge or show) else contextlib.nullcontext()
            with weights, autocast, torch.compiler.set_stance("force_eager"):  # other shapes than in training
                if judge:
                    start = time.perf_counter()
                    valid = evaluate.evaluate(model, tokenizer, windows, run.eval_masks, answers=answers)
                    bits, nats = valid["bits_per_byte"]["mean"], valid["nats_per_token"]["mean"]
                    improved = bits < best  # NaN is never best
                    record = dict(step=step, bits_per_byte=bits, nats_per_token=nats)
                    if answers is not None:
                        record |= dict(accuracy_by_hidden_fraction=valid["accuracy_by_hidden_fraction"])
                    log(record | dict(seconds={"validation": time.perf_counter() - start}))
                    say(f"step {step:,}: validation {valid['likelihood']} {bits:.4f} bits/byte, {nats:.4f} nats/token")
                if show:
                    view = checkpoint.Loaded(model, tokenizer, config, step, kind, out)
                    prompts = [p for p in PROMPTS if len(tokenizer.encode(p)) <= run.seq_len // 2] or [""]
                    steps = max(run.sample_steps, -(-run.seq_len // (sizes.block_length or run.seq_len)))  # one a block
                    cfg = SampleConfig(steps=steps, seed=run.seed, max_new_tokens=max(1, run.seq_len // 2))
                    texts = [tokenizer.decode(ids) for ids in sample_diffusion.generate(view, prompts, cfg).texts]
                    log(dict(step=step, samples=texts))
                    say("\n".join(texts))
            model.train()
            if improved:
                best = bits
                save("best.pt")
            due = step % run.save_interval == 0 and step
            if due or last or stop:
                save("latest.pt", *([f"step_{step:06d}.pt"] if due and run.keep else []))
                checkpoint.prune(out, run.keep)
        if last or stop:
            break

        # --- forward, backward: each part of the step brings its rows and its slice of the masks
        clock = time.perf_counter()  # training alone: without validation, samples and saving
        torch.manual_seed(generator_for(1, run.seed, step).initial_seed() + rank)  # dropout
        when = ("elbo" if step >= run.max_steps * (1 - run.decay) else "low_var") if mask.loss_weight == "mix" else None
        step_mask = dataclasses.replace(mask, loss_weight=when) if when else mask
        total = torch.zeros((), device=device)
        for micro in range(run.grad_accum):
            i = micro * world + rank
            rows = range(i * run.batch_size, (i + 1) * run.batch_size)
            rows_a_step, answer = n_parts * run.batch_size, None
            if data.answers:
                x0, answer = dataset.rows_of_chats(data, rows, rows_a_step, run.seed, step)  # (B, T), (rows_a_step, 2)
            else:
                x0 = dataset.batch(data.train, run.seq_len, rows, rows_a_step, run.seed, step)  # (B, T)
            with autocast:
                masks = generator_for(0, run.seed, step)
                loss = model.loss(x0, step_mask, masks, part=(i, n_parts), starts=starts[x0], answer=answer)
            scaler.scale(loss / run.grad_accum).backward()
            total += loss.detach() / run.grad_accum
        if world > 1:
            average_gradients(model, world)
            dist.all_reduce(total)
            total /= world

        # --- clip, step
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip or math.inf)
        loss, norm = torch.stack([total, norm]).tolist()  # the step's only wait for the device
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step} (windows {step * n_parts * run.batch_size:,} on, "
                f"seed {run.seed}); the weights are unchanged; lower --lr or set --amp off"
            )
        if math.isfinite(norm):
            overflows = 0
            for optimizer in optimizers:
                optimizer.step()
        elif not scaler.is_enabled():
            raise FloatingPointError(
                f"the gradient norm is {norm} at step {step}; the weights are unchanged; lower --lr"
            )
        else:  # fp16 overflows now and then: the scaler halves its factor and the step is left out
            overflows += 1
            if overflows == 20:
                raise FloatingPointError(
                    f"fp16 overflowed in 20 steps in a row, the last at step {step}; use --amp bf16 or off"
                )
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if ema:
            ema.update(model, step)

        # --- log
        seconds += time.perf_counter() - clock
        bar.update(1)
        if step % run.log_interval == 0 or step == 1:
            rate = (step - logged[0]) * n_parts * run.batch_size * run.seq_len / max(seconds - logged[1], 1e-9)
            logged = step, seconds
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
            log(
                dict(
                    step=step,
                    loss=loss,
                    grad_norm=norm,
                    lr=optimizers[0].param_groups[0]["lr"],
                    tokens=step * n_parts * run.batch_size * run.seq_len,
                    seconds={"training": seconds, "tokens_a_second": rate, "peak_bytes": peak_memory(device)},
                )
            )

    # --- the end
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if first:
        metrics.close()
        if board:
            never_stop(board.finish)
    if world > 1:
        dist.barrier()  # nobody ends before the checkpoint is whole
    if stop and not last:
        say(f"stopped at step {step:,}, saved in {out}; --resume goes on")
        sys.exit(128 + (caught[0] if caught else signal.SIGTERM))
    if first:
        what = f"best {valid['likelihood']} {best:.4f} bits/byte"
        say(f"done: {step:,} steps in {seconds:,.0f} s of training, {what}, see {out}")
        if run.check:
            evaluate.run(EvaluateConfig(str(out), data_dir=run.data_dir, device=run.device, check=True))
    if world > 1:
        dist.destroy_process_group()
    return valid


def plan(kind, mask, sizes, run):
    """Run a few real steps in a temporary folder and print what the whole run will take here."""
    check(os.environ.get("WORLD_SIZE", "1") == "1", "--plan measures one process; leave torchrun out")
    probe = 4
    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            run,
            plan=False,
            check=False,
            resume=False,
            wandb=False,
            output_dir=f"{folder}/run",
            max_steps=probe,
            log_interval=1,
            eval_interval=0,
            sample_interval=0,
        )
        try:
            train(kind, mask, sizes, short, quiet=True)
        except (MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "memory" not in str(e):
                raise
            raise RuntimeError(f"it does not fit: {one_line(e)}; lower --batch_size or --d_model") from e
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl", encoding="utf-8")]
        size = Path(f"{folder}/run/latest.pt").stat().st_size
    clock = [line["seconds"]["training"] for line in lines if "loss" in line]
    a_step = float(np.median(np.diff(clock)[1:]))  # the first steps warm up (and compile)
    a_validation = next(line["seconds"]["validation"] for line in lines if "validation" in line["seconds"])
    validations = run.max_steps // run.eval_interval if run.eval_interval else 1
    total = clock[0] + a_step * run.max_steps + validations * a_validation
    device = pick_device(run.device)
    used = max(line["seconds"]["peak_bytes"] for line in lines if "loss" in line)
    there = total_memory(device)
    out = Path(run.output_dir).absolute()
    there_is = next(folder for folder in (out, *out.parents) if folder.exists())
    disk, free = size * (run.keep + 3), shutil.disk_usage(there_is).free
    print(
        f"plan for {run.max_steps:,} steps on {device}: {total / 60:,.1f} minutes ({a_step:.3f} s a step, "
        f"{validations} validations of {a_validation:.1f} s)\nmemory: {used / 2**30:.2f} of {there / 2**30:.1f} GiB; "
        f"disk: {disk / 2**30:.2f} GiB of {free / 2**30:.1f} GiB free\n"
        f"{'it fits' if used < 0.9 * there and disk < free else 'it does not fit'}; nothing was started"
    )


def main(kind="transformer", doc=__doc__, **defaults):
    """Command line of a trainer; `defaults` replace those of config.py."""
    mask, sizes, run = parse(doc, MaskConfig, checkpoint.MODELS[kind][0], TrainConfig, **defaults)
    (plan if run.plan else train)(kind, mask, sizes, run)


if __name__ == "__main__":
    run_main(main)

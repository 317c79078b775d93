"""Every knob of nanoHinDi: one dataclass line with its help, and the command line derived from those lines.

    python train_diffusion.py --help        # prints what stands here

A script picks the dataclasses it needs: `mask, sizes, run = parse(__doc__, MaskConfig, TransformerConfig, TrainConfig)`
Errors: a ValueError, a missing path or a refused permission means that the command is wrong (exit 2); anything else
that is raised means that the command was right and the run failed (exit 1). `run_main` turns both into one line.
"""

import argparse
import dataclasses
import errno
import math
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field


def knob(default, help, choices=None, flag=True, alone=None):
    """One configuration line. flag=False: not on the command line (the data decides it). alone: the value of a flag
    that is given without one."""
    return field(default=default, metadata={"help": help, "choices": choices, "flag": flag, "alone": alone})


# ---------------------------------------------------------------------------------------------------------------------
# the knobs


@dataclass
class PrepareConfig:
    input: str = knob(
        "",
        "text to prepare: files, folders or globs (.txt .jsonl .parquet), comma-separated; - reads "
        "standard input; empty takes the novel Devdas",
    )
    output_dir: str = knob("data/processed", "folder that receives train.bin, val.bin, meta.json and tokenizer.model")
    dataset: str = knob("", "a data set of the hub by name or a local folder of one, streamed (needs the hub extra)")
    dataset_config: str = knob("", "configuration of the data set, such as 20231101.hi")
    dataset_split: str = knob("train", "split of the data set to read")
    text_field: str = knob("text", "field that holds the text in .jsonl, .parquet and data sets")
    documents: str = knob(
        "auto",
        "what ends a document in .txt: a blank line (auto), the file, or the line (row); in "
        ".jsonl, .parquet and data sets it is the row",
        ("auto", "blank", "file", "row"),
    )
    tokenizer: str = knob(
        "bpe",
        "bpe or unigram (SentencePiece, trained here), bytes, tiktoken:NAME such as "
        "tiktoken:o200k_base, or hub:NAME, that of a pretrained model, or the path of a trained tokenizer.model",
    )
    vocab_size: int = knob(8192, "upper limit of the SentencePiece vocabulary; a small text trains fewer pieces")
    val_fraction: float = knob(0.1, "share of the documents held out for validation, chosen by hash")
    romanized: float = knob(
        0.0,
        "share of the training documents added once more in romanised Hindi, as people type "
        "it; validation stays as it is, so that figures compare",
    )
    source: str = knob("", "where the text came from, kept in meta.json")
    license: str = knob("", "licence of the text, kept in meta.json")
    workers: int = knob(0, "processes that tokenize; 0 is one a core")
    seed: int = knob(0, "seed of the split and of the choice of romanised documents")

    def __post_init__(self):
        check(not (self.input and self.dataset), "--input and --dataset exclude each other")
        check(0 < self.val_fraction < 1, f"--val_fraction is {self.val_fraction}, needs 0 < val_fraction < 1")
        check(0 <= self.romanized <= 1, f"--romanized is {self.romanized}, needs 0 <= romanized <= 1")
        check(self.vocab_size >= 1, f"--vocab_size is {self.vocab_size}, needs to be 1 or more")
        check(self.workers >= 0, f"--workers is {self.workers}, needs to be 0 or more")


@dataclass
class FactsConfig:
    output: str = knob("data/facts/train.jsonl", "file that receives the pairs, one JSON object a line")
    tables: str = knob("data/facts.json", "tables of facts")
    held_out: str = knob("data/qa.jsonl", "questions whose facts are left out, one JSON object a line; empty: none is")
    romanized: float = knob(0.2, "share of the pairs added once more in romanised Hindi, as people type it")
    seed: int = knob(0, "seed of wordings, arithmetic, spellings and order")

    def __post_init__(self):
        check(0 <= self.romanized <= 1, f"--romanized is {self.romanized}, needs 0 <= romanized <= 1")


@dataclass
class MaskConfig:
    """The forward process and the weight of the training loss (docs/DIFFUSION_MODEL_DETAILED.md)."""

    time_mode: str = knob(
        "continuous", "times from the interval, or from `timesteps` levels", ("continuous", "discrete")
    )
    timesteps: int = knob(1000, "levels of time_mode discrete")
    timestep_sampling: str = knob(
        "stratified", "spread the times of one optimizer step evenly, or draw each alone", ("stratified", "uniform")
    )
    mask_schedule: str = knob("linear", "how the masked fraction grows with time", ("linear", "cosine"))
    min_mask_rate: float = knob(0.0, "masked fraction at time 0; only 0 to 1 is the ELBO")
    max_mask_rate: float = knob(1.0, "masked fraction at time 1; sampling starts at 1")
    masking_strategy: str = knob(
        "token", "hide single tokens, or geometric spans of whole words (training only)", ("token", "span")
    )
    mean_span_length: float = knob(3.0, "mean span, in words, of masking_strategy span")
    loss_weight: str = knob(
        "low_var",
        "elbo: the bound; low_var: every hidden token counts the same; mix: low_var, then "
        "elbo in the last `decay` of the steps",
        ("elbo", "low_var", "mix"),
    )

    def __post_init__(self):
        check(self.timesteps >= 1, f"--timesteps is {self.timesteps}, needs to be 1 or more")
        check(
            0 <= self.min_mask_rate < self.max_mask_rate <= 1,
            f"the mask rates are {self.min_mask_rate} to {self.max_mask_rate}; they need 0 <= min < max <= 1",
        )
        check(self.mean_span_length >= 1, f"--mean_span_length is {self.mean_span_length}, needs to be 1 or more")


@dataclass
class TransformerConfig:
    vocab_size: int = knob(0, "real tokens; MASK comes on top", flag=False)
    max_seq_len: int = knob(0, "longest window the model accepts", flag=False)
    d_model: int = knob(384, "width")
    n_layers: int = knob(8, "blocks")
    n_heads: int = knob(8, "attention heads")
    d_ff: int = knob(1024, "inner width of the SwiGLU")
    dropout: float = knob(0.0, "dropout on each residual branch; 0 is off")
    window: int = knob(0, "local attention: half of these tokens to each side, every third layer sees all; 0: all do")
    block_length: int = knob(
        0, "block diffusion: blocks of so many tokens from left to right, inside them any order; 0: no"
    )

    def __post_init__(self):
        check(
            self.d_model % self.n_heads == 0 and self.d_model // self.n_heads % 2 == 0,
            f"--d_model {self.d_model} must split into --n_heads {self.n_heads} heads of even width",
        )
        check(min(self.d_model, self.n_layers, self.n_heads, self.d_ff) >= 1, "the model's sizes must be 1 or more")
        check(0 <= self.dropout < 1, f"--dropout is {self.dropout}, needs 0 <= dropout < 1")
        check(self.window >= 0 and self.window % 2 == 0, f"--window is {self.window}, needs to be 0 or even")
        check(self.block_length >= 0, f"--block_length is {self.block_length}, needs to be 0 or more")
        check(not (self.window and self.block_length), "--window and --block_length exclude each other")


@dataclass
class VariantConfig(TransformerConfig):
    """d_ff is that of the Transformer with as many parameters: other feed-forwards get the width that matches it."""

    positions: str = knob(
        "rotary",
        "how positions are told apart; relative: a learned bias on the scores; learned: added to the embedding",
        ("rotary", "relative", "learned", "none"),
    )
    values: str = knob("mixed", "of attention: mixed with the first layer's, or each layer's own", ("mixed", "own"))
    attention_gate: bool = knob(False, "a gate from 0 to 2 on the output of each head")
    feed_forward: str = knob("swiglu", "form of the feed-forward", ("swiglu", "gelu", "relu2"))
    norm: str = knob(
        "rms",
        "RMSNorm or LayerNorm before each branch; sandwich: RMSNorm behind it too; no_qk: none on queries and keys",
        ("rms", "layer", "sandwich", "no_qk"),
    )
    window: int = knob(0, "the Transformer itself has it", flag=False)
    block_length: int = knob(0, "the Transformer itself has it", flag=False)


@dataclass
class EcoHybridConfig(TransformerConfig):
    """d_ff is that of the Transformer that has as many parameters: the SwiGLUs here get the width that matches it."""

    memory_slots: int = knob(32, "slots of the memory, anchored along the longest window")
    conv_kernel: int = knob(3, "positions that the local convolution reads, odd")
    window: int = knob(0, "the convolution is what is local here", flag=False)
    block_length: int = knob(0, "slots and convolution see both sides", flag=False)
    attn_every: int = knob(4, "every n-th layer is a Transformer block with full attention; 0: none is")

    def __post_init__(self):
        super().__post_init__()
        check(self.window == 0, f"window is {self.window}: EcoHybrid is local already, windows are for the Transformer")
        check(self.block_length == 0, f"block_length is {self.block_length}: blocks are for the Transformer")
        check(self.memory_slots >= 2, f"--memory_slots is {self.memory_slots}, needs to be 2 or more")
        check(
            self.conv_kernel >= 1 and self.conv_kernel % 2 == 1,
            f"--conv_kernel is {self.conv_kernel}, needs to be odd and 1 or more",
        )
        check(self.attn_every >= 0, f"--attn_every is {self.attn_every}, needs to be 0 or more")
        check(self.attn_every != 1, "--attn_every is 1: that is the Transformer of train_diffusion.py; take 0, or 2 on")


@dataclass
class AutoregressiveConfig(TransformerConfig):
    """The sizes, and so the parameters, of the Transformer whose causal twin it is."""

    block_length: int = knob(0, "every token is a block of its own here", flag=False)

    def __post_init__(self):
        super().__post_init__()
        check(
            self.window == 0, f"--window is {self.window}: that is for train_diffusion.py, this model sees all before"
        )
        check(self.block_length == 0, f"block_length is {self.block_length}: that is for train_diffusion.py")


@dataclass
class HubConfig:
    """A model of transformers (hub.py). It is no choice of ours: hub.load fills this in, so that no network is needed
    to build the model again. Ids here are those of transformers; -1: there is none."""

    vocab_size: int = knob(0, "real tokens; MASK comes on top", flag=False)
    max_seq_len: int = knob(0, "longest window the model accepts, without what is put around it", flag=False)
    architecture: str = knob("", "the model's own config.json, in one line", flag=False)
    mask: int = knob(-1, "MASK", flag=False)
    first: int = knob(-1, "what stands before each row, such as [CLS]; BOS of a causal model", flag=False)
    last: int = knob(-1, "what stands behind each row, such as [SEP]", flag=False)
    block_length: int = knob(0, "it sees both sides", flag=False)


@dataclass
class TrainConfig:
    data_dir: str = knob("data/processed", "folder written by prepare.py")
    output_dir: str = knob("checkpoints/diffusion_hi", "run folder: config.json, metrics.jsonl and checkpoints")
    init: str = knob(
        "",
        "begin with the averaged weights of this .pt or run, of the same kind, sizes and tokenizer; hub:NAME begins "
        "with a pretrained model, of its own sizes",
    )
    preset: str = knob(
        "laptop",
        "sizes to start from, flags override them: tiny 1.1M parameters (2k vocabulary), laptop 17M and base 91M (8k); "
        "hub: settings to tune a pretrained model",
        ("tiny", "laptop", "base", "hub"),
    )
    seq_len: int = knob(512, "tokens a window")
    batch_size: int = knob(4, "windows a forward, per process")
    grad_accum: int = knob(8, "forwards an optimizer step, per process")
    max_steps: int = knob(5000, "optimizer steps")
    optimizer: str = knob("muon", "muon: the blocks' matrices by Muon, the rest by AdamW", ("muon", "adamw"))
    lr: float = knob(4e-3, "peak learning rate, in AdamW's units for Muon too; with adamw alone take about 7e-4")
    weight_decay: float = knob(0.1, "decoupled, on matrices only: never on norms, biases or embeddings")
    beta2: float = knob(0.95, "AdamW's second moment decay")
    warmup: float = knob(0.02, "share of the steps in which the learning rate rises")
    decay: float = knob(0.5, "share of the steps in which it falls, at the end; cosine: from the peak on")
    lr_schedule: str = knob("linear", "shape of the fall, to zero", ("linear", "cosine", "constant"))
    grad_clip: float = knob(1.0, "largest gradient norm; 0 is off")
    ema: float = knob(0.999, "decay of the fp32 average of the weights that is evaluated and sampled; 0 is off")
    amp: str = knob(
        "auto",
        "mixed precision; auto: bf16 where a measured matrix product gains from it",
        ("auto", "bf16", "fp16", "off"),
    )
    compile: bool = knob(False, "torch.compile the model; pays off after some minutes")
    activation_checkpointing: bool = knob(False, "recompute the blocks in the backward pass: less memory, more time")
    device: str = knob("auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    threads: int = knob(0, "CPU threads a process; 0 leaves PyTorch's choice")
    seed: int = knob(1337, "seed of weights, batches, masks and dropout")
    log_interval: int = knob(10, "steps between log lines")
    eval_interval: int = knob(250, "steps between validations; 0 is only at the end")
    eval_masks: int = knob(4, "stratified masks a window while training; evaluate.py uses 16")
    eval_windows: int = knob(512, "validation windows while training, at most; 0 is all")
    sample_interval: int = knob(0, "steps between samples of the fixed prompts; 0 is never")
    sample_steps: int = knob(32, "denoising steps of those samples")
    save_interval: int = knob(500, "steps between checkpoints; the last step is always saved")
    keep: int = knob(2, "how many step_*.pt to keep, besides latest.pt and best.pt")
    resume: bool = knob(False, "go on from the newest valid checkpoint of output_dir")
    plan: bool = knob(False, "measure a few steps, print time, memory and whether it fits, and start nothing")
    check: bool = knob(False, "at the end compare with unigram and bigram models; exit 1 if not 18 % below the unigram")
    wandb: bool = knob(False, "log to Weights & Biases too; offline when there is no network")

    def __post_init__(self):
        for name in (
            "seq_len",
            "batch_size",
            "grad_accum",
            "max_steps",
            "log_interval",
            "eval_masks",
            "save_interval",
            "sample_steps",
        ):
            check(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, needs to be 1 or more")
        for name in ("seed", "threads", "eval_interval", "eval_windows", "sample_interval", "keep"):
            check(getattr(self, name) >= 0, f"--{name} is {getattr(self, name)}, needs to be 0 or more")
        check(0 < self.lr < math.inf, f"--lr is {self.lr}, needs to be positive")
        for name in ("weight_decay", "grad_clip"):
            check(0 <= getattr(self, name) < math.inf, f"--{name} is {getattr(self, name)}, needs to be 0 or more")
        for name in ("ema", "beta2"):
            check(0 <= getattr(self, name) < 1, f"--{name} is {getattr(self, name)}, needs 0 <= {name} < 1")
        for name in ("warmup", "decay"):
            check(0 <= getattr(self, name) <= 1, f"--{name} is {getattr(self, name)}, needs 0 <= {name} <= 1")


@dataclass
class InstructConfig:
    """What train_instruct.py has beside TrainConfig, whose data_dir is then a folder of rows made before."""

    data: str = knob("data/instruct.jsonl", "conversations: .jsonl or .parquet files, folders, globs, comma-separated")
    dataset: str = knob("", "instead a data set of the hub by name, or a local folder of one (needs the hub extra)")
    dataset_config: str = knob("", "configuration of the data set, such as anudesh")
    dataset_split: str = knob("", "split of the data set to read; empty is hi where there is one, else train")
    columns: str = knob("", "which column is what, such as instruction=prompt,response=output; also messages, input")
    max_examples: int = knob(10000, "conversations to take, chosen by hash, after duplicates are dropped; 0 is all")
    val_fraction: float = knob(0.1, "share of the conversations held out for validation, by hash of the instruction")
    mask_ratio_min: float = knob(0.0, "least hidden share of a response; only 0 to 1 is the bound")
    mask_ratio_max: float = knob(1.0, "largest hidden share of a response; answers begin at 1")
    loss_weight: str = knob("low_var", "as of train_diffusion.py", ("elbo", "low_var", "mix"))
    dropout: float = knob(-1.0, "dropout on each residual branch while tuning; -1 is as --init was trained")

    def __post_init__(self):
        check(0 < self.val_fraction < 1, f"--val_fraction is {self.val_fraction}, needs 0 < val_fraction < 1")
        check(self.max_examples >= 0, f"--max_examples is {self.max_examples}, needs to be 0 or more")
        check(self.dropout == -1 or 0 <= self.dropout < 1, f"--dropout is {self.dropout}, needs 0 <= dropout < 1")
        check(
            0 <= self.mask_ratio_min < self.mask_ratio_max <= 1,
            f"--mask_ratio_min is {self.mask_ratio_min}, --mask_ratio_max {self.mask_ratio_max}; they need "
            "0 <= min < max <= 1",
        )


@dataclass
class SampleConfig:
    ckpt: str = knob(
        "",
        "a .pt file, a folder of a run or of export.py, or hub:NAME; empty takes the newest run under checkpoints/, "
        "and where there is none a model of models/",
    )
    tokenizer: str = knob("", "tokenizer.model to insist on; the checkpoint carries its own")
    prompt: str = knob(
        "",
        "text to continue; ___ is a blank of 1 to 8 tokens (fewer if there are many), ___5___ one of five; several "
        "prompts are separated by ||; empty writes freely",
    )
    chat: bool = knob(False, "talk with a tuned model: it answers --prompt, or what is typed, line by line")
    max_new_tokens: int = knob(64, "tokens to write after the prompt, at most; a prompt with blanks gets none")
    steps: int = knob(64, "denoising steps, each one forward: fewer are faster and worse; at most one an open position")
    strategy: str = knob(
        "",
        "which positions are decided first (sampling.STRATEGIES); empty is confidence, in a chat left_to_right: the "
        "surest places of an answer are its ends, and by confidence they would leave no room for it",
        ("random", "left_to_right", "dilated", "confidence", "margin", "entropy", "threshold", "entropy_bounded"),
    )
    temperature: float = knob(0.7, "0 takes the likeliest token")
    top_k: int = knob(0, "draw from the k likeliest tokens; 0 is off")
    top_p: float = knob(1.0, "draw from the fewest tokens that hold this much probability; 1 is off")
    threshold: float = knob(0.9, "strategy threshold decides every position surer than this, and at least its quota")
    entropy_bound: float = knob(0.1, "strategy entropy_bounded decides together what adds up to so many nats, and more")
    confidence_stop: float = knob(0.0, "finish a row early once all its open positions are surer than this; 0 is off")
    block_length: int = knob(0, "write blocks of so many tokens from left to right, with a cache; 0: as trained")
    remask: float = knob(0.0, "chance a step that a decided token is hidden again; 0 is off")
    loop: float = knob(0.0, "with --remask: the part of the steps that only hides and decides again, at nine tenths")
    min_new_tokens: int = knob(0, "tokens before the text may end")
    no_repeat: int = knob(0, "never write the same n tokens in a row twice in a text; 0 is off")
    num_samples: int = knob(1, "samples a prompt, drawn in one batch")
    seed: int = knob(1337, "same seed, same text")
    live: bool = knob(True, "show the text appear when standard output is a terminal")
    html: str = knob("", "write a self-contained replay of the first sample to this file")
    json: str = knob("", "write the trace of the first sample to this file")
    gif: str = knob("", "write the first sample appearing as an animated GIF to this file")
    device: str = knob("auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    ema: bool = knob(True, "use the averaged weights")

    def __post_init__(self):
        self.strategy = self.strategy or ("left_to_right" if self.chat else "confidence")
        check(self.steps >= 1, f"--steps is {self.steps}, needs to be 1 or more")
        check(0 <= self.temperature < math.inf, f"--temperature is {self.temperature}, needs to be 0 or more")
        check(self.top_k >= 0, f"--top_k is {self.top_k}, needs to be 0 or more")
        check(0 < self.top_p <= 1, f"--top_p is {self.top_p}, needs 0 < top_p <= 1")
        check(0 <= self.threshold <= 1, f"--threshold is {self.threshold}, needs 0 <= threshold <= 1")
        check(0 <= self.confidence_stop <= 1, f"--confidence_stop is {self.confidence_stop}, needs to be from 0 to 1")
        for name in ("max_new_tokens", "min_new_tokens", "block_length", "entropy_bound"):
            check(getattr(self, name) >= 0, f"--{name} is {getattr(self, name)}, needs to be 0 or more")
        check(
            self.no_repeat == 0 or self.no_repeat > 1, f"--no_repeat is {self.no_repeat}, needs to be 0, or 2 or more"
        )
        check(0 <= self.remask <= 1, f"--remask is {self.remask}, needs to be from 0 to 1")
        check(0 <= self.loop < 1, f"--loop is {self.loop}, needs 0 <= loop < 1")
        check(self.remask > 0 or self.loop == 0, f"--loop is {self.loop}, which needs a --remask above 0")
        check(self.num_samples >= 1, f"--num_samples is {self.num_samples}, needs to be 1 or more")


@dataclass
class AppConfig:
    ckpt: str = knob(
        "", "run folders, .pt files or hub:NAME, comma-separated; empty: every run under checkpoints/ and models/"
    )
    port: int = knob(7860, "where the app listens")
    host: str = knob("", "address to bind to; empty is this machine alone, or what GRADIO_SERVER_NAME says")
    share: bool = knob(False, "a public link through Gradio's servers, for a week at most")
    queue: int = knob(64, "requests that may wait; more are refused")
    time_limit: float = knob(300, "seconds that a request may compute; it then ends as if stopped")
    device: str = knob("auto", "cpu, cuda, cuda:1, mps; auto takes what is there")

    def __post_init__(self):
        check(0 < self.port < 65536, f"--port is {self.port}, needs to be from 1 to 65535")
        check(self.queue >= 1, f"--queue is {self.queue}, needs to be 1 or more")
        check(self.time_limit > 0, f"--time_limit is {self.time_limit}, needs to be above 0")


@dataclass
class EvaluateConfig:
    ckpt: str = knob(
        "",
        "a .pt file, a run folder or hub:NAME, or several with commas; empty is the newest under checkpoints/, else "
        "models/diffusion",
    )
    against: str = knob("", "as many evaluated run folders with commas: print what --ckpt is better by, pair by pair")
    data_dir: str = knob("", "folder written by prepare.py; empty takes the one the checkpoint was trained on")
    split: str = knob("val", "split to score", ("val", "train"))
    masks: int = knob(16, "stratified masks a window; an exact likelihood takes none")
    max_windows: int = knob(0, "score only the first windows; 0 is all")
    batch_size: int = knob(32, "windows a forward")
    chain_rule: int = knob(0, "full windows whose exact likelihood is computed too, a forward a token; 0 is off")
    judge: str = knob("", "an autoregressive run that judges samples, made to continue the text; empty makes none")
    samples: int = knob(32, "samples for the judge: each continues the first quarter of a window")
    sample_steps: int = knob(0, "forwards that write a sample; 0 is one a token")
    check: bool = knob(False, "compare with unigram and bigram models; exit 1 if not 18 % below the unigram")
    qa: str = knob(
        "",
        "ask the questions of this .jsonl, and score no text; alone: those of data/qa.jsonl; eval.json gets them too",
        alone="data/qa.jsonl",
    )
    answer_tokens: int = knob(32, "tokens of an answer, at most")
    available: bool = knob(False, "only list open diffusion and masked language models, and which of them run here")
    output: str = knob(
        "", "where the figures go; empty is eval.json beside the checkpoint, of a hub model in a folder of checkpoints/"
    )
    seed: int = knob(0, "seed of the masks and samples")
    device: str = knob("auto", "cpu, cuda, cuda:1, mps; auto takes what is there")
    ema: bool = knob(True, "use the averaged weights")

    def __post_init__(self):
        check(self.masks >= 1, f"--masks is {self.masks}, needs to be 1 or more")
        check(self.batch_size >= 1, f"--batch_size is {self.batch_size}, needs to be 1 or more")
        check(self.samples >= 1, f"--samples is {self.samples}, needs to be 1 or more")
        check(self.answer_tokens >= 1, f"--answer_tokens is {self.answer_tokens}, needs to be 1 or more")
        for name in ("against", "chain_rule", "judge", "check"):
            check(not (self.qa and getattr(self, name)), f"--qa scores no text, which --{name} needs; run both in turn")
        for name in ("max_windows", "chain_rule", "sample_steps"):
            check(getattr(self, name) >= 0, f"--{name} is {getattr(self, name)}, needs to be 0 or more")


@dataclass
class HubExportConfig:
    """python hub.py."""

    ckpt: str = knob("", "a .pt file or a run folder of a tuned hub model; empty is the newest under checkpoints/")
    output_dir: str = knob("hub_model", "new folder for weights, tokenizer and model card")
    license: str = knob("other", "licence of the new weights, as the hub names licences; mind that of the first model")
    ema: bool = knob(True, "use the averaged weights")


@dataclass
class ExportConfig:
    """python export.py."""

    ckpt: str = knob("", "a .pt file, or a folder of a run or of export.py; empty is the newest under checkpoints/")
    output_dir: str = knob(
        "", "folder for weights, config, tokenizer, model card and code; an export there is replaced"
    )
    dtype: str = knob("bf16", "precision of the weights in the folder", ("bf16", "fp32"))
    onnx: str = knob("", "file that receives the model as ONNX, in fp32 (needs the development packages)")
    license: str = knob("", "licence of the weights, as the hub names licences; empty: as exported before, else mit")
    about: str = knob(
        "", "Markdown for the model card on data, its licence and attribution, or the path of an .md file"
    )
    hardware: str = knob("", "what the model was trained on, for the card")
    command: str = knob("", "the command that trained it, for the card; empty tells it from the run")
    code: bool = knob(True, "put the code for transformers into the folder")
    ema: bool = knob(True, "use the averaged weights")


@dataclass
class BenchmarkConfig:
    output: str = knob("", "where the figures go; empty is checkpoints/benchmark_NAME.json")
    repeats: int = knob(5, "train, length: how often what is compared takes turns; medians are reported")
    vocab_size: int = knob(
        8192, "train: real tokens of the random text; length takes 1024; prepare: as prepare.py's flag"
    )
    lengths: str = knob("128,256,512,1024,2048,4096,8192", "length: tokens a window, comma-separated")
    input: str = knob("", "prepare: text whose lines are repeated in new documents; empty takes the novel Devdas")
    megabytes: float = knob(40.0, "prepare: size of the smaller corpus; from 40 on the tokenizer's sample is full")
    growth: int = knob(10, "prepare: how many times larger the other corpus is")

    def __post_init__(self):
        for name in ("repeats", "megabytes", "growth"):
            check(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}, needs to be positive")
        check(
            all(n.strip().isdecimal() and int(n) > 1 for n in self.lengths.split(",")),
            f"--lengths is {self.lengths!r}, needs numbers from 2 on between commas",
        )
        check(self.vocab_size >= 260, f"--vocab_size is {self.vocab_size}, the bytes and special tokens need 260")


@dataclass
class ScalingConfig:
    """benchmark.py scaling; flags that it does not know go to train_diffusion.py."""

    processes: int = knob(2, "processes of one thread; they share the parts of a step")
    repeats: int = knob(3, "how often what is compared takes turns, three steps each; medians are reported")
    vocab_size: int = knob(8192, "real tokens of the random text")
    output: str = knob("", "where the figures go; empty is checkpoints/benchmark_scaling.json")

    def __post_init__(self):
        check(self.processes >= 2, f"--processes is {self.processes}, needs to be 2 or more")
        check(self.repeats >= 1, f"--repeats is {self.repeats}, needs to be 1 or more")
        check(self.vocab_size >= 260, f"--vocab_size is {self.vocab_size}, the bytes and special tokens need 260")


@dataclass
class SpeedrunConfig:
    """benchmark.py speedrun."""

    record: str = knob("", "which of speedrun.RECORDS; empty is the last")
    seeds: int = knob(3, "trainings, with seeds --seed, --seed + 1, ..., one after another")
    seed: int = knob(1337, "the first seed")
    threads: int = knob(2, "CPU threads; what is compared has equally many")
    root: str = knob("checkpoints/speedrun", "where data and runs go; a run of the same name is replaced")
    output: str = knob("", "where the figures go; empty is checkpoints/benchmark_speedrun.json")

    def __post_init__(self):
        for name in ("seeds", "threads"):
            check(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, needs to be 1 or more")
        check(self.seed >= 0, f"--seed is {self.seed}, needs to be 0 or more")


@dataclass
class FrontierConfig:
    """benchmark.py sample."""

    ckpt: str = knob("", "the denoiser that writes: a .pt file or a run folder; empty is the newest under checkpoints/")
    twin: str = knob("", "an autoregressive run of the same data: the judge, and a reference")
    data_dir: str = knob("", "folder written by prepare.py; empty takes the one --ckpt was trained on")
    output: str = knob("", "where the figures go; empty is checkpoints/benchmark_sample.json")
    samples: int = knob(16, "prompts of the validation text, spread evenly")
    prompt_tokens: int = knob(32, "tokens of a prompt")
    new_tokens: int = knob(256, "tokens written behind it")
    temperature: float = knob(1.0, "of every way of writing; 1 is the model's own distribution")
    top_p: float = knob(1.0, "of every way of writing; 1 is off")
    block: int = knob(32, "tokens of a block")
    threads: int = knob(0, "CPU threads; 0 leaves PyTorch's choice")

    def __post_init__(self):
        for name in ("samples", "prompt_tokens", "new_tokens", "block"):
            check(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, needs to be 1 or more")
        check(self.threads >= 0, f"--threads is {self.threads}, needs to be 0 or more")
        check(0 < self.temperature < math.inf, f"--temperature is {self.temperature}, needs to be above 0")
        check(0 < self.top_p <= 1, f"--top_p is {self.top_p}, needs 0 < top_p <= 1")


@dataclass
class InferenceConfig:
    """benchmark.py inference."""

    ckpt: str = knob("", "the denoiser: a .pt file, or a folder of a run or of export.py; empty is the newest run")
    data_dir: str = knob("", "folder written by prepare.py; empty takes the one --ckpt was trained on, or Devdas")
    output: str = knob("", "where the figures go; empty is checkpoints/benchmark_inference.json")
    tokens: int = knob(64, "tokens a sample, no prompt")
    steps: int = knob(16, "forwards a sample")
    batches: str = knob("1,16", "samples written at once, comma-separated")
    windows: int = knob(64, "windows of held-out text that show what rounding costs, at most")
    repeats: int = knob(5, "how often what is compared takes turns; medians are reported")
    threads: int = knob(0, "CPU threads; 0 leaves PyTorch's choice")

    def __post_init__(self):
        for name in ("tokens", "steps", "windows", "repeats"):
            check(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, needs to be 1 or more")
        check(self.threads >= 0, f"--threads is {self.threads}, needs to be 0 or more")
        right = all(n.strip().isdecimal() and int(n) > 0 for n in self.batches.split(","))
        check(right, f"--batches is {self.batches!r}, needs numbers from 1 on between commas")


@dataclass
class ColabConfig:
    data_dir: str = knob("", "folder written by prepare.py; empty prepares the novel Devdas, or --dataset")
    dataset: str = knob("", "a data set of the hub by name, prepared first (needs the hub extra)")
    dataset_config: str = knob("", "configuration of the data set, such as 20231101.hi")
    text_field: str = knob("text", "field of the data set that holds the text")
    output_dir: str = knob("checkpoints/colab_eco", "run folder; report.json goes there too")
    size: str = knob(
        "auto",
        "preset of the trainer; auto: tiny on a CPU or for a text below a million tokens, else laptop",
        ("auto", "tiny", "laptop", "base"),
    )
    seq_len: int = knob(0, "tokens a window; 0 goes by the device's memory, and so do the next two")
    batch_size: int = knob(0, "windows a forward; 0 is as many as fit")
    grad_accum: int = knob(0, "forwards an optimizer step; 0 is what the preset's tokens a step leave")
    max_steps: int = knob(500, "optimizer steps")
    save_interval: int = knob(100, "steps between checkpoints, at most max_steps")
    log_interval: int = knob(10, "steps between log lines")
    compile: bool = knob(False, "torch.compile the model; pays off after some minutes")
    resume: bool = knob(False, "go on with an interrupted run, if there is one")
    allow_cpu: bool = knob(False, "train on a CPU where there is no GPU, at a small size: minutes")

    def __post_init__(self):
        check(not (self.data_dir and self.dataset), "--data_dir and --dataset exclude each other")
        for name in ("max_steps", "save_interval", "log_interval"):
            check(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, needs to be 1 or more")
        for name in ("seq_len", "batch_size", "grad_accum"):
            check(getattr(self, name) >= 0, f"--{name} is {getattr(self, name)}, needs to be 0 or more")


@dataclass
class ExperimentsConfig:
    data_dir: str = knob("", "folder written by prepare.py; empty prepares --input, and takes the preset tiny")
    input: str = knob("", "text to prepare where --data_dir is not given; empty takes the novel Devdas")
    output_root: str = knob("checkpoints/experiments", "folder of the run folders, the plan and results.csv")
    suite: str = knob(
        "seed",
        "which runs: a name of run_experiments.suites",
        ("seed", "schedule", "architecture", "combined", "optimizer", "tokenizer", "eco", "crossover", "regularise"),
    )
    only: str = knob("", "names or globs of the suite's runs, comma-separated: these alone; empty is all")
    seeds: int = knob(1, "runs of each kind, with seeds --seed, --seed + 1, ...")
    epochs: str = knob("", "crossover, regularise: lengths of the runs in passes over train.bin, comma-separated")
    match: str = knob(
        "params",
        "what compared runs have in common, within 1 %: parameters at the same steps, or operations or expected "
        "seconds, by other numbers of steps",
        ("params", "flops", "time"),
    )
    jobs: int = knob(1, "runs at a time; each gets its share of the cores")
    shard: str = knob("0/1", "i/n: of the runs take every n-th from the i-th on; for n machines on a shared folder")
    execute: bool = knob(False, "start what is missing; without it the plan is written and printed")
    print_commands: bool = knob(False, "print a line for each missing run, to be started elsewhere, and start nothing")
    launcher: str = knob(
        "shell",
        "how the lines of --print_commands start a run: as they are, by sbatch, or by torchrun on --processes",
        ("shell", "slurm", "torchrun"),
    )
    processes: int = knob(2, "launcher torchrun: processes a run, which share its grad_accum parts of a step")

    def __post_init__(self):
        for name in ("seeds", "jobs", "processes"):
            check(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, needs to be 1 or more")
        i, _, n = self.shard.partition("/")
        right = i.isdecimal() and n.isdecimal() and int(i) < int(n)
        check(right, f"--shard is {self.shard!r}, needs i/n with 0 <= i < n, such as 0/2 and 1/2")
        right = all(e.replace(".", "", 1).isdecimal() and float(e) > 0 for e in self.epochs.split(",") if self.epochs)
        check(right, f"--epochs is {self.epochs!r}, needs positive numbers between commas")
        check(not (self.execute and self.print_commands), "--execute and --print_commands exclude each other")


PROMPTS = ("मुझे एक अच्छी कहानी सुनाओ", "भारत में आज मौसम", "mai kal bazaar gaya tha aur", "yaar mujhe samajh nahi aa raha")

# A preset is a set of defaults; measured sizes and times stand in the README.
PRESETS = {
    "tiny": dict(
        d_model=128,
        n_layers=4,
        n_heads=4,
        d_ff=344,
        seq_len=128,
        batch_size=16,
        grad_accum=1,
        max_steps=900,
        sample_interval=300,
    ),
    "laptop": {},  # the defaults above
    "base": dict(
        d_model=768,
        n_layers=12,
        n_heads=12,
        d_ff=2048,
        seq_len=1024,
        batch_size=16,
        grad_accum=4,
        max_steps=50000,
        lr=1e-3,
    ),
    "hub": dict(
        seq_len=256,
        batch_size=4,
        grad_accum=8,
        optimizer="adamw",
        lr=2e-4,
        weight_decay=0.01,
        activation_checkpointing=True,
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# from the knobs to the command line


def check(condition, message):
    if not condition:
        raise ValueError(message)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit 2; flags are not abbreviated."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def add_flags(parser, configs):
    for config in configs:
        group = parser.add_argument_group(config.__name__)
        for f in dataclasses.fields(config):
            if not f.metadata.get("flag", False):
                continue
            help = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")  # argparse formats it
            if f.type is bool:  # --compile and --no_compile
                on, off = (argparse.SUPPRESS, help) if f.default else (help, argparse.SUPPRESS)  # show what changes it
                group.add_argument(f"--{f.name}", action="store_true", default=f.default, help=on)
                group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", default=f.default, help=off)
            else:
                alone = f.metadata["alone"]
                more = {} if alone is None else dict(nargs="?", const=alone)
                group.add_argument(
                    f"--{f.name}", type=f.type, default=f.default, choices=f.metadata["choices"], help=help, **more
                )


def parse(doc, *configs, argv=None, **defaults):
    """Command line → one instance of each dataclass in `configs`; `defaults` replace those of the lines above.

    Raises ValueError for a wrong flag or value.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(doc)
    add_flags(parser, configs)
    if any(f.name == "preset" for c in configs for f in dataclasses.fields(c)):
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--preset", default="laptop")
        preset = first.parse_known_args(argv)[0].preset if "--help" not in argv else "laptop"
        defaults |= PRESETS.get(preset, {})  # an unknown name is refused below
    parser.set_defaults(**defaults)
    flags = vars(parser.parse_args(argv))
    own = [{f.name: flags[f.name] for f in dataclasses.fields(c) if f.metadata.get("flag", False)} for c in configs]
    return tuple(config(**values) for config, values in zip(configs, own, strict=True))


def run_main(main):
    """Run `main()`; any error becomes one line on stderr and an exit code (0, 1, 2, 130, 143)."""
    code = 0
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show Devanagari must not stop a run
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` closed standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as e:
        if "--debug" in sys.argv:
            traceback.print_exc()
        path = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
        wrong = isinstance(e, (ValueError, argparse.ArgumentError, *path)) or getattr(e, "errno", 0) == errno.EROFS
        code = 2 if wrong else 1
        print(f"error: {one_line(e)}", file=sys.stderr)
    sys.exit(code)


PLAIN = (ValueError, RuntimeError, FileNotFoundError, PermissionError, FloatingPointError)  # their text says enough


def one_line(e):
    """An exception as one line for people."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.strerror}: {e.filename}" if e.filename else e.strerror
    text = " ".join(str(e).split())
    return text if text and type(e) in PLAIN else f"{type(e).__name__}: {text}"

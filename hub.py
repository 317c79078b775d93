"""Pretrained models of the hub as ours: masked ones as a `Denoiser`, causal ones with the twin's interface.

    python sample_diffusion.py --ckpt hub:google/muril-base-cased --prompt "भारत की राजधानी ___1___ है।"
    loaded = checkpoint.load("hub:my_folder")       # or a folder of save_pretrained; .denoiser .tokenizer as of any run
    python hub.py --ckpt checkpoints/chat_muril --output_dir muril_chat     # for AutoModelForMaskedLM.from_pretrained

Everything else works on it unchanged: the loop, the bound, samplers, evaluation, .pt files. Three things differ inside.
Ids: in a hub model [MASK] is an ordinary id m of its W ids. Ours are V = W - 1: the last one takes the place of m, and
V is MASK, without a column in the head, as everywhere. Frame: a masked model was trained on [CLS] ... [SEP], which are
put around every row here, outside of the canvas. Text: a tokenizer that strips accents destroys matras, and is mended.
Only code of the transformers library runs, never code that a model brings along.
"""

import json
import math
import os
import socket
import sys
import tempfile
import unicodedata
import urllib.parse
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenizer as tokenizers
from config import HubConfig, HubExportConfig, check, one_line, parse, run_main
from model import GPT, Denoiser

INSTALL = "pip install transformers==5.23.0"
LONGEST = 1024  # tokens of a window, at most, where the model itself would take more
NO_TEXT = "\ufdd0"  # a noncharacter: never in text, so that nothing typed becomes a special token
USUAL = dict(mask=("[MASK]", "<mask>"), pad=("[PAD]", "<pad>"), unk=("[UNK]", "<unk>"))
USUAL |= dict(cls=("[CLS]", "<s>"), sep=("[SEP]", "</s>"))
PROBE = "मैं हूँ। किताबें पढ़ूँगी, कृपया दुःख और हिन्दी कौन सीखेगा? चाँद की ओर, ज़मीन पर पैसे दो, ऋषि औरत को बुलाओ।"


def library():
    try:
        import transformers
    except ImportError:
        raise ValueError(f"hub: needs the transformers library: {INSTALL}") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def reachable():
    """Whether the hub answers: its library would try for half a minute before it gives up."""
    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies().get(address.scheme):
        return not constants.HF_HUB_OFFLINE  # what a proxy reaches is not known here
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=3).close()
        return True
    except OSError:
        return False


def fetch(auto, name, **kwargs):
    """auto.from_pretrained(name), from a folder, the hub's cache or the network.

    Raises FileNotFoundError if there is no such folder, else ValueError that says what is wrong.
    """
    folder = Path(name).is_dir()
    if not folder and (name[:1] in "./~" or name.count("/") > 1):
        raise FileNotFoundError(f"hub:{name}: there is no folder {name}")
    local = folder or not reachable()
    try:
        return auto.from_pretrained(name, trust_remote_code=False, local_files_only=local, **kwargs)
    except OSError as e:
        if folder or not local:
            raise ValueError(f"hub:{name} cannot be read ({one_line(e)[:200]})") from e
        raise ValueError(
            f"hub:{name}: its files are not all in the hub's cache, and there is no network; where there is: "
            f"hf download {name}, then copy the cache or give hub:FOLDER"
        ) from e
    except Exception as e:  # whatever a file that is damaged, or of another library, leads to
        if "remote_code" in str(e) or "custom code" in str(e):
            raise ValueError(
                f"hub:{name} brings its own code, which is never run here; --available lists others"
            ) from e
        raise ValueError(f"hub:{name} cannot be read ({one_line(e)[:200]})") from e


# ---------------------------------------------------------------------------------------------------------------------
# text ↔ ids


def keep_accents(normalizer):
    """The description of a normalizer (tokenizer.json) without the steps that take marks off letters."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        parts = normalizer["normalizers"]
        if any(part["type"] == "StripAccents" for part in parts):
            parts = [part for part in parts if part["type"] not in ("StripAccents", "NFD", "NFKD")]
        return normalizer | dict(normalizers=[keep_accents(part) for part in parts])
    return normalizer | dict(strip_accents=False) if normalizer["type"] == "BertNormalizer" else normalizer


def lost_marks(backend, text=PROBE):
    """Matras and other marks of `text` that the normalizer of a tokenizers.Tokenizer takes away: a set."""
    after = backend.normalizer.normalize_str(text) if backend.normalizer else text
    return {c for c in text if unicodedata.category(c)[0] == "M" and c not in after}


def types(part):
    """Types of all parts of a decoder's description."""
    return [part["type"], *(t for p in part.get("decoders", []) for t in types(p))] if part else []


def pieces_to_bytes(spec, size):
    """The bytes of text (UTF-8) that each of `size` ids stands for, those of their names for special tokens: a list.

    spec: a tokenizer.json. WordPiece does not know spaces: a word has one before it, punctuation none.
    Raises ValueError for an unknown form.
    """
    kinds = types(spec["decoder"])
    vocab = spec["model"]["vocab"]
    pieces = {i: p for p, i in vocab.items()} if isinstance(vocab, dict) else {i: p for i, (p, _) in enumerate(vocab)}
    if "ByteLevel" in kinds:
        # GPT-2's alphabet: printable bytes stand for themselves, the others, in order, for U+0100 on
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in plain]
        alphabet = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
        convert = lambda p: bytes(alphabet[c] for c in p)  # noqa: E731
    elif "WordPiece" in kinds:
        prefix = spec["model"]["continuing_subword_prefix"]

        def convert(p):
            if p.startswith(prefix) and p != prefix:
                return p.removeprefix(prefix).encode()
            alone = len(p) == 1 and unicodedata.category(p)[0] in "PS"
            return (p if alone else " " + p).encode()
    elif {"Metaspace", "Replace"} & set(kinds):

        def convert(p):
            if len(p) == 6 and p.startswith("<0x") and "ByteFallback" in kinds:
                return bytes([int(p[3:5], 16)])
            return p.replace("▁", " ").encode()
    else:
        raise ValueError(
            f"its tokenizer writes text by {kinds or 'nothing'}; WordPiece, Metaspace, ByteLevel are known"
        )
    table = [convert(pieces[i]) if i in pieces else b"" for i in range(size)]
    for token in spec["added_tokens"]:
        table[token["id"]] = token["content"].encode()
    return table


def hide(spec, special):
    """A tokenizer.json's description whose special tokens have names that no text can hold, and that adds none."""
    vocab, model = spec["model"]["vocab"], spec["model"]
    name = lambda piece, i: NO_TEXT + piece if i in special else piece  # noqa: E731
    if isinstance(vocab, dict):
        unk = model.get("unk_token")
        new = dict(vocab={name(piece, i): i for piece, i in vocab.items()}, unk_token=unk and name(unk, vocab.get(unk)))
    else:
        new = dict(vocab=[[name(piece, i), score] for i, (piece, score) in enumerate(vocab)])
    added = [token | dict(content=name(token["content"], token["id"])) for token in spec["added_tokens"]]
    return spec | dict(model=model | new, added_tokens=added, post_processor=None, truncation=None, padding=None)


class Tokenizer(tokenizers.Tokenizer):
    """`data`: one JSON line with the files that transformers' save_pretrained writes, the ids of special tokens, and W.

    Text is made NFC first, as everywhere. What the model's own rule drops is lost: spaces and line breaks in most,
    capitals in uncased ones. Matras and all other marks are kept. Special tokens written in a text stay plain text.
    never: ids that are no text, EOS left out, which no sampler may draw. sep_id: [SEP], or None.
    """

    kind = "hub"

    def __init__(self, data):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ValueError(f"this tokenizer needs the transformers library: {INSTALL}") from None
        head = json.loads(data)
        self.files, self.special, W = head["files"], head["special"], head["size"]
        spec = json.loads(self.files["tokenizer.json"])
        mask = self.special["mask"]
        self.moved = (W - 1, mask) if mask >= 0 else (-1, -1)  # transformers' last id, and what it is called here
        special = {i for i in self.special.values() if i >= 0} | {t["id"] for t in spec["added_tokens"] if t["special"]}
        table = pieces_to_bytes(spec, W)
        for i in special:
            table[i] = b""
        if mask >= 0:
            table[mask] = table[-1]
            table.pop()

        self.backend = Backend.from_str(json.dumps(hide(spec, special)))
        ours = {name: self.our(i) for name, i in self.special.items() if i >= 0}
        pick = lambda *names: next((ours[name] for name in names if name in ours), None)  # noqa: E731
        eos = pick("eos", "sep", "pad")
        if eos is None:
            raise ValueError("the tokenizer has no token that can end a text: no eos, sep or pad")
        pad = pick("pad", "eos", "sep")
        super().__init__(data, table, (pad, pick("bos", "cls", "eos", "sep"), eos, pick("unk", "pad", "eos", "sep")))
        self.sep_id = ours.get("sep")
        self.never = tuple(i for i, text in enumerate(table) if not text and i != eos)
        self.space_first = self.decode_bytes(self.encode("क"))[:1] == b" "

    def our(self, i):
        """transformers' id → ours."""
        return self.moved[1] if i == self.moved[0] else i

    def encode_chunk(self, text):
        ids = self.backend.encode(text.replace(NO_TEXT, "\ufffd"), add_special_tokens=False).ids
        return [self.our(i) for i in ids]

    def decode_bytes(self, ids):
        return b"".join(self.token_bytes(int(i)) for i in ids)

    def decode(self, ids):
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.space_first else text


def frame(theirs):
    """The tokens that a tokenizer of transformers puts around a text: {"first": id, "last": id}, -1 where none."""
    plain, whole = theirs("क", add_special_tokens=False)["input_ids"], theirs("क")["input_ids"]
    n = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    front, back = whole[:n], whole[n + len(plain) :]
    check(len(front) <= 1 and len(back) <= 1, f"the tokenizer puts {len(front)} and {len(back)} tokens around a text")
    return dict(first=[*front, -1][0], last=[*back, -1][0])


def read_tokenizer(name):
    """The Tokenizer of a model of the hub, or of a folder. Raises ValueError if it cannot keep matras."""
    transformers = library()
    theirs = fetch(transformers.AutoTokenizer, name)
    check(hasattr(theirs, "backend_tokenizer"), f"hub:{name} has a tokenizer of its own kind, not one of tokenizers")
    backend, mended = theirs.backend_tokenizer, {}
    lost = lost_marks(backend)
    if lost:
        spec = json.loads(backend.to_str())
        backend = type(backend).from_str(json.dumps(spec | dict(normalizer=keep_accents(spec["normalizer"]))))
        mended = dict(strip_accents=False, keep_accents=True)
        check(not lost_marks(backend), f"hub:{name} has a tokenizer that takes marks off letters ({''.join(lost)})")
    named = {key: getattr(theirs, f"{key}_token_id") for key in ("mask", "pad", "bos", "eos", "cls", "sep", "unk")}
    for key, usual in USUAL.items():  # a bare tokenizer.json does not say what its special tokens are for
        if named[key] is None and (key == "mask" or named["mask"] is not None):
            named[key] = next((i for i in map(backend.token_to_id, usual) if i is not None), None)
    special = {key: -1 if i is None else i for key, i in named.items()}
    special |= frame(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        backend.save(f"{folder}/tokenizer.json")
        path = Path(folder, "tokenizer_config.json")
        settings = json.loads(path.read_text("utf-8")) | mended
        for key in ("is_local", "local_files_only", "name_or_path", "trust_remote_code"):  # not the tokenizer's own
            settings.pop(key, None)
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        files = {
            p.name: p.read_text("utf-8") for p in sorted(Path(folder).iterdir()) if p.suffix in (".json", ".jinja")
        }
    W = fetch(transformers.AutoConfig, name).vocab_size
    check(len(theirs) <= W, f"hub:{name}: the tokenizer has {len(theirs):,} ids, the model {W:,}")
    head = dict(kind="hub", size=W, special=special, files=files)
    tokenizer = Tokenizer(json.dumps(head, ensure_ascii=False).encode())
    unknown = tokenizer.encode(PROBE).count(tokenizer.unk_id)
    if unknown:
        what = f"hub:{name} cannot write {unknown} words of a Hindi sentence"
        check(not mended, f"{what}: it was trained on text without matras; take a cased model")
        print(f"warning: {what}, its tokenizer lacks their letters", file=sys.stderr)
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# models


def build(config, auto):
    """A model of transformers with fresh weights, in fp32."""
    transformers = library()
    described = json.loads(config.architecture)
    theirs = transformers.AutoConfig.for_model(described.pop("model_type"), **described)
    return getattr(transformers, auto).from_config(theirs, dtype=torch.float32)


def positions(model):
    """Tokens that a model of transformers has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)  # RoBERTa counts from behind its padding's id
    return limit - (padding + 1 if padding is not None else 0)


@torch.enable_grad()  # the counter trips over DeBERTa's softmax without
def counted_flops(model, T, hidden):
    """Of a forward pass of one window: counted in the smallest windows; it grows with T, T² and `hidden` alone."""
    device, training = next(model.parameters()).device, model.training
    points = []
    for t, n in ((1, 0), (2, 0), (3, 0), (1, 1)):
        x, where = torch.zeros(1, t, dtype=torch.long, device=device), torch.arange(n, device=device)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # as products, which it counts
            model.eval().forward(x, where)
        points.append(counter.get_total_flops())
    model.train(training)
    one, two, three, head = points
    square = (three - 2 * two + one) / 2
    return one + (two - one - 3 * square) * (T - 1) + square * (T * T - 1) + (head - one) * hidden


class HubDenoiser(Denoiser):
    """A masked language model of transformers. Logits are its own, at the same tokens between [CLS] and [SEP]."""

    auto = "AutoModelForMaskedLM"

    def __init__(self, config, model=None):
        nn.Module.__init__(self)  # neither our embedding nor our norm
        self.config, self.mask_id = config, config.vocab_size
        self.model = build(config, self.auto) if model is None else model
        room = positions(self.model) - (config.first >= 0) - (config.last >= 0)
        check(0 < config.max_seq_len <= room, f"max_seq_len is {config.max_seq_len}, the model has {room} positions")
        self.where = None  # (N,) flat positions in the framed rows, while a forward runs
        self.model.base_model.register_forward_hook(self.pick)
        for name, p in self.named_parameters():  # for Muon: ModernBERT stacks q, k, v, and gate and up
            p.pieces = 3 if name.endswith("Wqkv.weight") else 2 if name.endswith("mlp.Wi.weight") else 1

    @property
    def activation_checkpointing(self):
        return self.model.is_activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on):
        name = type(self.model).__name__
        check(not on or self.model.supports_gradient_checkpointing, f"{name} knows no --activation_checkpointing")
        if on:
            self.model.activation_checkpointing_enable()
        elif self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_disable()

    def pick(self, module, args, output):
        """Hidden states (B, S, C) → (1, N, C): the head sees only what is asked for, whatever it is made of."""
        if self.where is None:  # somebody else asks the model
            return output
        hidden = output[0].flatten(0, 1)[self.where][None]
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output.last_hidden_state = hidden
        return output

    def framed(self, x_t, lengths):
        """x_t (B, T) in our ids -> transformers' ids (B, S), and which are real (B, S), None if all are."""
        c, V, front = self.config, self.mask_id, int(self.config.first >= 0)
        ids = torch.where(x_t == V, c.mask, torch.where(x_t == c.mask, V, x_t))
        ids = F.pad(ids, (front, int(c.last >= 0)), value=c.last)  # (B, S)
        if front:
            ids[:, 0] = c.first
        if lengths is None:
            return ids, None
        place, end = torch.arange(ids.shape[1], device=ids.device), front + lengths[:, None]
        ids = torch.where(place < end, ids, max(c.last, 0))
        return ids, place < end + (c.last >= 0)

    def forward(self, x_t, where=None, lengths=None):
        """As LanguageModel.forward: logits (B, T, V), or (N, V) at the flat positions `where` (N,)."""
        (B, T), limit = x_t.shape, self.config.max_seq_len
        check(T <= limit, f"{T} tokens are more than the model's {limit}")
        ids, inside = self.framed(x_t, lengths)  # (B, S)
        at = torch.arange(B * T, device=x_t.device) if where is None else where
        self.where = at // T * ids.shape[1] + at % T + int(self.config.first >= 0)
        logits = self.model(ids, attention_mask=None if inside is None else inside.long()).logits[0]  # (N, W)
        self.where = None
        V, m = self.mask_id, self.config.mask
        if m < V:  # the last id has the place of MASK's; in place, as these are the largest tensors there are
            logits[:, m] = logits[:, V]
        logits = logits[:, :V]
        return logits.view(B, T, V) if where is None else logits

    def flops(self, T, hidden):
        return counted_flops(self, T, hidden)


class HubGPT(GPT):
    """A causal language model of transformers. Behind BOS it reads x0[0], x0[1], ..., as the twin does."""

    auto = "AutoModelForCausalLM"
    activation_checkpointing = HubDenoiser.activation_checkpointing
    flops = HubDenoiser.flops

    def __init__(self, config, model=None):
        nn.Module.__init__(self)
        self.config, self.mask_id = config, config.vocab_size
        self.model = build(config, self.auto) if model is None else model
        room = positions(self.model)
        check(0 < config.max_seq_len <= room, f"max_seq_len is {config.max_seq_len}, the model has {room} positions")

    def forward(self, x0, where=None, lengths=None):
        """Logits (B, T, V) of each token given those before it, or (N, V). lengths: nothing behind is read."""
        check(x0.shape[1] <= self.config.max_seq_len, f"{x0.shape[1]} tokens are more than {self.config.max_seq_len}")
        logits = self.model(self.behind_bos(F.pad(x0, (1, -1), value=self.mask_id))).logits  # (B, T, V)
        return logits if where is None else logits.flatten(0, 1)[where]

    def behind_bos(self, x):
        return x.masked_fill(x == self.mask_id, self.config.first)

    def cache(self, B, T):
        check(T <= self.config.max_seq_len, f"{T} tokens are more than the model's {self.config.max_seq_len}")
        return library().DynamicCache(config=self.model.config)

    def extend(self, x, cache, start):
        """Logits (B, V) of the token behind x (B, N), which joins `cache` behind its first `start`."""
        if cache.get_seq_length() > start:
            cache.crop(start - cache.get_seq_length())
        return self.model(self.behind_bos(x), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


class HubSeq2Seq(HubGPT):
    """An encoder-decoder of transformers, such as FLAN-T5: the encoder reads what is given, the decoder writes on.

    One text at a time. It has no likelihood of a text alone: it judges and scores nothing.
    """

    auto = "AutoModelForSeq2SeqLM"

    def forward(self, x0, where=None, lengths=None):
        raise ValueError("an encoder-decoder answers a prompt, it has no likelihood of a text; choose another model")

    def cache(self, B, T):
        check(B == 1, f"an encoder-decoder writes one text at a time here, not {B}")
        check(T <= self.config.max_seq_len, f"{T} tokens are more than the model's {self.config.max_seq_len}")
        return dict(encoder_outputs=None, past_key_values=None)

    def extend(self, x, cache, start):
        """As HubGPT.extend. The first x is BOS and the prompt; then x is what was written since."""
        if start == 0:
            given = F.pad(x[:, 1:], (0, int(self.config.last >= 0)), value=self.config.last)  # (1, P) or (1, P + 1)
            cache["encoder_outputs"], x = self.model.get_encoder()(given), x[:, :1]
        out = self.model(decoder_input_ids=self.behind_bos(x), use_cache=True, **cache)
        cache["past_key_values"] = out.past_key_values
        return out.logits[:, -1]


def load(name, device="cpu"):
    """(denoiser in eval mode, Tokenizer, kind) of a model by its name in the hub or by its folder.

    kind: "hub", "hub_causal" or "hub_seq2seq". Raises ValueError if it is not here and cannot be fetched, is none of
    them, needs code of its own, lacks weights of its trunk, or has a tokenizer that cannot keep matras.
    """
    transformers = library()
    theirs = fetch(transformers.AutoConfig, name)
    tokenizer = read_tokenizer(name)
    special, made_for = tokenizer.special, " ".join(theirs.architectures or [])
    causal = special["mask"] < 0 or "CausalLM" in made_for or "LMHead" in made_for
    kind, model_class = ("hub_causal", HubGPT) if causal else ("hub", HubDenoiser)
    if theirs.is_encoder_decoder:
        kind, model_class = "hub_seq2seq", HubSeq2Seq
    auto = getattr(transformers, model_class.auto)
    model, info = fetch(auto, name, dtype=torch.float32, output_loading_info=True)
    lacking = sorted(info["missing_keys"])
    inside = [key for key in lacking if key.startswith(f"{model.base_model_prefix}.")]
    check(not inside, f"hub:{name} lacks weights of its trunk: {', '.join(inside[:3])}")
    if lacking:
        print(f"warning: hub:{name} has no trained head ({', '.join(lacking[:3])}); tune it first", file=sys.stderr)
    first = next(i for i in (special["first"], special["bos"], special["eos"]) if i >= 0 or not causal)
    last, frame = -1 if causal else special["last"], 0 if causal else sum(special[k] >= 0 for k in ("first", "last"))
    if theirs.is_encoder_decoder:
        first, last = theirs.decoder_start_token_id, special["last"]
    described = theirs.to_dict() | dict(architectures=[type(model).__name__])
    for key in ("_name_or_path", "transformers_version", "dtype"):  # the same model from another place is the same
        described.pop(key, None)
    config = HubConfig(
        vocab_size=tokenizer.vocab_size,
        max_seq_len=min(positions(model) - frame, LONGEST),
        architecture=json.dumps(described, sort_keys=True),
        mask=special["mask"],
        first=first,
        last=last,
    )
    return model_class(config, model).to(device).eval(), tokenizer, kind


# ---------------------------------------------------------------------------------------------------------------------
# back to transformers

CARD = """---
library_name: transformers
pipeline_tag: {task}
language: [hi, en]
license: {license}
---

# {name}

{what}, trained by {how} with nanoHinDi, {steps} steps, from `{init}`.

    from transformers import {auto}, AutoTokenizer
    model, tokenizer = {auto}.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")

nanoHinDi samples from it:

    python sample_diffusion.py --ckpt hub:{name} --prompt "..."

## Training

    {command}

Data: `{data}` (sha256 {sha}). Texts that it writes can be wrong or offensive, as those it learned from.

## Evaluation

{metrics}
"""


def save(loaded, folder, license="other", metrics=None):
    """Write a model of the hub kinds as transformers reads it: weights, config, tokenizer, and a model card README.md.

    loaded: a checkpoint.Loaded. license: of the new weights, as the hub names licences. metrics: {name: value}.
    Raises ValueError if the model is none of transformers, or if the folder holds one already.
    """
    folder, run = Path(folder), loaded.config
    check(hasattr(loaded.denoiser, "auto"), f"{loaded.path} is {loaded.kind}: transformers has no such model")
    check(not (folder / "config.json").exists(), f"{folder} holds a model already; take another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    loaded.denoiser.model.save_pretrained(folder)
    for name, text in loaded.tokenizer.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    given = {
        k: run[k] for k in ("init", "data_dir", "seq_len", "batch_size", "grad_accum", "max_steps", "lr") if k in run
    }
    masked = loaded.denoiser.auto == HubDenoiser.auto
    card = dict(
        task="fill-mask" if masked else "text-generation",
        how="masked diffusion (many masks, filled step by step)" if masked else "next-token prediction",
        license=license,
        name=folder.name,
        what=type(loaded.denoiser.model).__name__,
        steps=f"{loaded.step:,}",
        init=run.get("init") or "scratch",
        auto=loaded.denoiser.auto,
        command=" ".join(
            [f"python {run.get('script', 'train_diffusion.py')}", *(f"--{k} {v}" for k, v in given.items())]
        )
        if given
        else "none",
        data=run.get("data_dir", "none"),
        sha=run.get("data_sha256", "none"),
        metrics="\n".join(f"- {k}: {v}" for k, v in (metrics or {}).items()) or "None yet.",
    )
    (folder / "README.md").write_text(CARD.format(**card), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# what there is

OWN_CODE, SHIFTED = "no: its own code", "no: predicts one place on"
CARDS = "see its card"
# name, millions of parameters, licence, whether hub: loads it; from the models' cards and the sizes of their files
KNOWN = (
    ("google/muril-base-cased", 238, "apache-2.0", "yes"),
    ("google/muril-large-cased", 507, CARDS, "yes"),
    ("ai4bharat/IndicBERTv2-MLM-only", 278, "mit", "yes"),
    ("ai4bharat/indic-bert", 33, "mit", "yes"),
    ("FacebookAI/xlm-roberta-base", 278, "mit", "yes"),
    ("FacebookAI/xlm-roberta-large", 560, "mit", "yes"),
    ("google-bert/bert-base-multilingual-cased", 179, "apache-2.0", "yes"),
    ("jhu-clsp/mmBERT-small", 140, "mit", "yes"),
    ("jhu-clsp/mmBERT-base", 307, "mit", "yes"),
    ("answerdotai/ModernBERT-base", 150, "apache-2.0", "yes, English"),
    ("answerdotai/ModernBERT-large", 396, "apache-2.0", "yes, English"),
    ("kuleshov-group/mdlm-owt", 170, "apache-2.0", OWN_CODE),
    ("kuleshov-group/bd3lm-owt-block_size16", 170, "apache-2.0", OWN_CODE),
    ("diffusionfamily/diffugpt-s", 127, CARDS, SHIFTED),
    ("diffusionfamily/diffugpt-m", 355, CARDS, SHIFTED),
    ("diffusionfamily/diffullama", 6740, "apache-2.0, Llama 2", SHIFTED),
    ("Dream-org/Dream-v0-Instruct-7B", 7620, "apache-2.0", OWN_CODE),
    ("GSAI-ML/LLaDA-8B-Base", 8020, "mit", OWN_CODE),
    ("GSAI-ML/LLaDA-8B-Instruct", 8020, "mit", OWN_CODE),
    ("google/diffusiongemma-26B-A4B-it", 26000, CARDS, "no: its own sampler"),
)
# bytes a parameter: fp32, or bf16 as published; and gradient, AdamW's two, average
WRITE, TUNE = {True: 4, False: 2}, 20


def cached(name):
    """Whether weights of a model are in the hub's cache on this machine."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(any(folder.glob(f"*/{pattern}")) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def available(memory):
    """Lines of a table of KNOWN models, for a machine that has `memory` bytes."""
    lines = [
        f"{'model':<42}{'size':>7}  {'licence':<21}{'GiB to write':>12}{'to tune':>9}  {'fits':<7}{'here':<6}hub:NAME"
    ]
    for name, millions, license, loads in KNOWN:
        ours = loads.startswith("yes")
        write, tune = millions * 1e6 * WRITE[ours], millions * 1e6 * TUNE
        fits = "tune" if ours and tune < 0.8 * memory else "write" if write < 0.8 * memory else "no"
        size = f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions}M"
        lines.append(
            f"{name:<42}{size:>7}  {license:<21}{write / 2**30:>12.1f}{tune / 2**30 if ours else math.nan:>9.1f}"
            f"  {fits:<7}{'yes' if cached(name) else 'no':<6}{loads}".replace("nan", "  –")
        )
    return [
        *lines,
        "",
        f"This machine has {memory / 2**30:.1f} GiB; eight tenths are counted on. Memory is that of weights, fp32",
        "(bf16 where hub:NAME loads nothing), and to tune, of gradients, AdamW and average. Activations come on top.",
        "hf download NAME fetches one. Code that a model brings along is never run: it needs its own repository.",
    ]


def main():
    import checkpoint

    (cfg,) = parse(__doc__, HubExportConfig)
    loaded = checkpoint.load(cfg.ckpt or checkpoint.newest_run(), "cpu", cfg.ema)
    scores, metrics = loaded.path.parent / "eval.json", {}
    if scores.is_file():
        result = json.loads(scores.read_text("utf-8"))
        names = ("bits_per_byte", "nats_per_token")
        metrics = {n: f"{result[n]['mean']:.4f} ± {result[n]['standard_error']:.4f}" for n in names if n in result}
    save(loaded, cfg.output_dir, cfg.license, metrics)
    print(f"wrote {cfg.output_dir}: {loaded.denoiser.auto}.from_pretrained opens it, and --ckpt hub:{cfg.output_dir}")


if __name__ == "__main__":
    run_main(main)

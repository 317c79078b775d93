"""Text ↔ ids: SentencePiece, tiktoken and plain bytes behind the same few methods.

    python -c "import tokenizer; t = tokenizer.load('data/processed/tokenizer.model'); print(t.encode('मैं कल आया'))"

One file holds all of a tokenizer, so that a checkpoint can embed it: a SentencePiece model as its own library writes
it, else a JSON line that names the kind, followed for tiktoken by the ranks. decode(encode(t)) == normalize(t), always.
"""

import base64
import hashlib
import io
import json
import re
import tempfile
import unicodedata
from pathlib import Path

import numpy as np

SPECIALS = ("pad", "bos", "eos", "unk")
# tiktoken's o200k split: unlike cl100k's it keeps matras (\p{M}) with their consonant
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# text


def normalize(text):
    """Lone surrogates become U+FFFD, zero-width space and BOM go, then NFC. ZWJ and ZWNJ stay: they shape conjuncts."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", text).replace("\u200b", "").replace("\ufeff", "")
    return unicodedata.normalize("NFC", text)


def cut(text, start, limit):
    """Where to cut text[start:] after at most `limit` characters: before a newline, else a space, else a cluster edge.

    No piece reaches over a newline or into the space before a word, so these cuts change no SentencePiece encoding.
    """
    end = start + limit
    if end >= len(text):
        return len(text)
    edge = text.rfind("\n", start + 1, end + 1)
    edge = edge if edge > 0 else text.rfind(" ", start + 1, end + 1)
    if edge > 0:
        return edge
    for i in range(end, max(start, end - 64), -1):
        a, b = text[i - 1], text[i]
        joined = unicodedata.category(b)[0] in "MC" or a in "\u094d\u200c\u200d"  # marks, joiners; after a virama
        if not joined and normalize(a + b) == normalize(a) + normalize(b):
            return i
    return end


def chunks(text, limit):
    start = 0
    while start < len(text):
        end = cut(text, start, limit)
        yield text[start:end]
        start = end


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizers


class Tokenizer:
    """`data`: the file's bytes; `table`: the UTF-8 bytes each token stands for, b"" for specials."""

    kind = ""
    sep_id = None  # a token that parts two texts
    chunk = 1024  # characters encoded at once: the speed does not depend on the length of a line

    def __init__(self, data, table, specials):
        self.data, self.table, self.vocab_size = data, table, len(table)
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = specials
        self.never = (self.pad_id, self.bos_id, self.unk_id)  # no text and no end: no sampler draws them
        self.sha256 = hashlib.sha256(data).hexdigest()

    def to_bytes(self):
        return self.data

    def encode(self, text):
        return self.encode_normal(normalize(text))

    def encode_normal(self, text):
        """Ids of text that is normalised already."""
        ids = []
        for chunk in chunks(text, self.chunk):
            ids += self.encode_chunk(chunk)
        return ids

    def token_bytes(self, id):
        return self.table[id] if 0 <= id < self.vocab_size else b""  # MASK is id V and has no text

    def decode(self, ids):
        return b"".join(self.token_bytes(int(id)) for id in ids).decode("utf-8", "replace")

    def word_starts(self):
        """(V,) bool: tokens that begin a word, with the space or newline before it; EOS and BOS too."""
        starts = np.array([piece[:1] in (b" ", b"\n", b"\t", b"\r") for piece in self.table])  # (V,)
        starts[[self.bos_id, self.eos_id]] = True
        return starts


class Bytes(Tokenizer):
    kind = "bytes"

    def __init__(self, data=b'{"kind": "bytes"}\n'):
        super().__init__(data, [b""] * 4 + [bytes([b]) for b in range(256)], (0, 1, 2, 3))

    def encode_chunk(self, text):
        return [4 + b for b in text.encode()]


class SentencePiece(Tokenizer):
    kind = "sentencepiece"

    def __init__(self, data):
        import sentencepiece

        try:
            self.sp = sp = sentencepiece.SentencePieceProcessor()
            sp.load_from_serialized_proto(data)
        except Exception as e:
            raise RuntimeError(f"this is no tokenizer ({len(data)} bytes): {e}; prepare the data again") from None
        specials = sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()
        if min(specials) < 0:
            raise ValueError(
                f"the SentencePiece model lacks one of {SPECIALS} (ids {specials}); train one with all four"
            )
        table = [sp.id_to_piece(id).replace("▁", " ").encode() for id in range(sp.vocab_size())]
        for id in range(sp.vocab_size()):
            if sp.is_byte(id):
                table[id] = bytes([int(sp.id_to_piece(id)[3:5], 16)])  # <0x41>
            elif sp.is_control(id) or sp.is_unknown(id):
                table[id] = b""
        super().__init__(data, table, specials)
        # SentencePiece writes a space as ▁, so a real ▁ would come back as a space: it goes by its bytes
        self.underscore = [sp.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()]
        probe = " क़्\u200d ▁  \n\n\0a<s>\U0001f600 "
        if self.decode(self.encode(probe)) != normalize(probe):
            raise ValueError("the SentencePiece model changes text; it needs byte_fallback, the identity rule, no "
                             "dummy prefix and no removal of spaces")  # fmt: skip

    def encode_chunk(self, text):
        if "▁" not in text:
            return self.sp.encode(text)
        first, *rest = text.split("▁")
        ids = self.sp.encode(first)
        for part in rest:
            ids += self.underscore + self.sp.encode(part)
        return ids


class TikToken(Tokenizer):
    """n ranks, then pad, bos, eos, unk. `data`: a JSON line with name and pattern, then `base64 rank` lines."""

    kind = "tiktoken"

    def __init__(self, data):
        import tiktoken

        head, _, body = data.partition(b"\n")
        head = json.loads(head)
        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in body.splitlines())}
        except ValueError as e:
            raise ValueError(f"not a tiktoken rank file, whose lines are base64 and a number: {e}") from None
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing or min(ranks.values()) < 0 or len(set(ranks.values())) < len(ranks):
            raise ValueError(f"the rank file has {len(ranks)} tokens, of 256 single bytes {len(missing)} are missing; "
                             "each byte needs a rank and each rank one token")  # fmt: skip
        n = max(ranks.values()) + 1
        table = [b""] * (n + 4)
        for token, rank in ranks.items():
            table[rank] = token
        self.tiktoken = tiktoken.Encoding(
            head["name"], pat_str=head["pattern"], mergeable_ranks=ranks, special_tokens={}
        )
        super().__init__(data, table, tuple(range(n, n + 4)))

    def encode_chunk(self, text):
        return self.tiktoken.encode_ordinary(text)


def from_bytes(data):
    """A tokenizer out of the bytes of its file."""
    if not data.startswith(b"{"):
        return SentencePiece(data)
    kinds = {"bytes": Bytes, "tiktoken": TikToken}
    try:
        name = json.loads(data.partition(b"\n")[0])["kind"]
        if name == "hub":
            from hub import Tokenizer as kind  # which builds on this file
        else:
            kind = kinds[name]
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(f"this is no tokenizer ({len(data)} bytes); prepare the data again") from None
    return kind(data)


def load(path):
    return from_bytes(Path(path).read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# making one


def train_sentencepiece(texts, vocab_size, model_type="bpe"):
    """Trains on an iterator of strings; returns the model's bytes. `vocab_size` is an upper limit."""
    import sentencepiece

    def sentences():
        for text in texts:
            for line in re.split("[\0\n▁]", normalize(text)):  # what training would refuse or misread
                for chunk in chunks(line, 2048):
                    # a word of thousands of letters is no word, and costs the trainer quadratic time
                    yield from chunks(chunk, 64) if max(map(len, chunk.split(" "))) > 256 else (chunk,)

    # split_digits knows 0 to 9 only; symbols of their own keep १९४७ from becoming one piece
    symbols = ["\n", *"०१२३४५६७८९"]
    lines = [line for line in sentences() if line.strip()]
    if not lines:
        raise ValueError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    options = dict(
        normalization_rule_name="identity", byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        split_digits=True, user_defined_symbols=symbols, character_coverage=0.9995, required_chars="▁",
        hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, max_sentence_length=1 << 15,
        num_threads=4, minloglevel=3)  # fmt: skip
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type=model_type, **options
        )
    except RuntimeError as e:
        if "required_chars" in str(e):
            needed = re.search(r"(\d+) vs (\d+)", str(e))
            needed = f", at least {max(map(int, needed.groups()))}" if needed else ""
            raise ValueError(f"--vocab_size {vocab_size} has no room for the 256 bytes, the special tokens and the "
                             f"characters of this text; take a larger one{needed}") from None  # fmt: skip
        if model_type != "unigram":
            raise
        print(f"tokenizer: the text is too small for unigram ({e}), training bpe")
        return train_sentencepiece(lines, vocab_size, "bpe")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces < vocab_size:
        print(f"tokenizer: {pieces} pieces, not {vocab_size}: the text has no more")
    return model.getvalue()


def from_tiktoken(name):
    """`o200k_base` and its like by name, from tiktoken's cache or the network, or the path of a rank file."""
    import tiktoken

    path = Path(name)
    if path.is_file():
        data = path.read_bytes()
        if not data.startswith(b"{"):
            data = json.dumps({"kind": "tiktoken", "name": path.stem, "pattern": O200K}).encode() + b"\n" + data
        return TikToken(data)
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no tiktoken rank file {name}")
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:  # an unknown name: the message lists the known ones
        raise
    except Exception as e:  # whatever the network layer raises; it knows which address it was refused
        address = getattr(getattr(e, "request", None), "url", None)
        address = address or f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
        cache = Path(tempfile.gettempdir()) / "data-gym-cache" / hashlib.sha1(address.encode()).hexdigest()
        raise FileNotFoundError(
            f"tiktoken:{name} needs {address}, which cannot be fetched here ({type(e).__name__}); download it "
            f"elsewhere and store it as {cache}, or as $TIKTOKEN_CACHE_DIR/{cache.name} with that variable set, or "
            f"give tiktoken:PATH of the downloaded rank file") from None  # fmt: skip
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks]
    head = json.dumps({"kind": "tiktoken", "name": name, "pattern": encoding._pat_str}).encode()
    return TikToken(b"\n".join([head, *lines]) + b"\n")

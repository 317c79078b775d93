"""tokenizer.py: every kind through the same tests; what stands in a text comes back, byte for byte."""

import base64
import importlib.resources
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tokenizer as T

KINDS = ("bpe", "unigram", "bytes", "tiktoken")
NOVEL = (importlib.resources.files("idatasets") / "datasets/devdas.txt").read_text("utf-8")
PLAIN = "[MASK] <s> </s> <pad> <unk> <0x41> <|endoftext|> ▁ a▁b"
HARD = "क\u200dष क्\u200cष \0 \r\n\r\n\t  \n ▁ \u202eשלום\u202c 👩‍👩‍👧 é नऩ क़ \u00a0\u2028\x0c"
HARD += "\x85 <0x41> 0123 ।॥ \U0010ffff \ue000"
texts = st.text(st.characters() | st.sampled_from("कखिीािंँ़् \n▁\0\u200b\u200c\u200d\ufeff\ud800\udfff0"), max_size=60)


def ranks_file():
    """A rank file made by hand: the bytes, then some words and all their prefixes, so that merges reach them."""
    tokens = [bytes([b]) for b in range(256)]
    for word in (" है", " और", " देवदास", "ने"):
        data = word.encode()
        tokens += [data[:n] for n in range(2, len(data) + 1)]
    tokens = list(dict.fromkeys(tokens))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    path.write_bytes(ranks_file())
    trained = {kind: T.from_bytes(T.train_sentencepiece([NOVEL], 2000, kind)) for kind in ("bpe", "unigram")}
    return trained | {"bytes": T.Bytes(), "tiktoken": T.from_tiktoken(str(path))}


@pytest.fixture(params=KINDS)
def tok(request, tokenizers):
    return tokenizers[request.param]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text=HARD)
@example(text=PLAIN)
@example(text=" ")
@example(text="")
@example(text="लड़कियों" * 700)
def test_round_trip_and_conservation(tokenizers, kind, text):
    tok = tokenizers[kind]
    ids = tok.encode(text)
    assert tok.decode(ids) == T.normalize(text)
    assert b"".join(map(tok.token_bytes, ids)) == T.normalize(text).encode()
    assert all(0 <= id < tok.vocab_size for id in ids)
    assert not {tok.pad_id, tok.bos_id, tok.eos_id, tok.unk_id} & set(ids)  # T4: no text makes a special token


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(-5, 3000), max_size=30))
def test_any_ids_decode(tokenizers, kind, ids):  # T6
    tok = tokenizers[kind]
    text = tok.decode(np.array(ids, dtype=np.int64))
    assert text == b"".join(tok.token_bytes(id) for id in ids if 0 <= id < tok.vocab_size).decode("utf-8", "replace")
    text.encode()  # no surrogate comes out


def test_specials_and_mask_have_no_text(tok):
    specials = [tok.pad_id, tok.bos_id, tok.eos_id, tok.unk_id]
    assert len(set(specials)) == 4 and [tok.token_bytes(id) for id in specials] == [b""] * 4
    ids = tok.encode("कल")
    mixed = [tok.bos_id, *ids, tok.vocab_size, tok.eos_id, tok.pad_id, tok.unk_id, 10**9, -1]
    assert tok.decode(mixed) == "कल"


def test_layout(tokenizers):
    for kind in ("bpe", "unigram", "bytes"):
        t = tokenizers[kind]
        assert (t.pad_id, t.bos_id, t.eos_id, t.unk_id) == (0, 1, 2, 3)
    assert tokenizers["bytes"].vocab_size == 260 and tokenizers["bytes"].encode("aक") == [
        4 + 0x61,
        0xE0 + 4,
        0xA4 + 4,
        0x95 + 4,
    ]
    n = ranks_file().count(b"\n")
    t = tokenizers["tiktoken"]
    assert (t.pad_id, t.bos_id, t.eos_id, t.unk_id, t.vocab_size) == (n, n + 1, n + 2, n + 3, n + 4)
    assert len(t.encode(" है और देवदास")) == 3  # the merges of the rank file, found by its regex
    assert tokenizers["bpe"].vocab_size == 2000


def test_the_file_is_the_tokenizer(tok, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tok.to_bytes())
    again = T.load(path)
    assert (again.sha256, again.kind, again.vocab_size) == (tok.sha256, tok.kind, tok.vocab_size)
    assert again.encode(NOVEL[:5000] + HARD) == tok.encode(NOVEL[:5000] + HARD)


def test_word_starts_cut_text_into_whole_words(tok):
    text = "मैं कल बाज़ार गया था।\nक्या तुम  भी थे? हाँ, लड़कियाँ भी"
    words = regex.split(r"(?=[ \n])", T.normalize(text))  # said another way: a word begins with its space
    ids = tok.encode(text)
    starts = tok.word_starts()
    assert starts.shape == (tok.vocab_size,) and starts.dtype == bool
    assert starts[tok.eos_id] and starts[tok.bos_id] and not starts[tok.pad_id]
    groups = np.cumsum(starts[ids])
    found = [tok.decode(np.array(ids)[groups == g]) for g in np.unique(groups)]
    if tok.kind == "tiktoken":  # its pattern keeps runs of spaces together
        text = text.replace("  ", " ")
        words, ids = regex.split(r"(?=[ \n])", T.normalize(text)), tok.encode(text)
        groups = np.cumsum(starts[ids])
        found = [tok.decode(np.array(ids)[groups == g]) for g in np.unique(groups)]
    assert found == words


@pytest.mark.parametrize("text, expected", [
    ("a\ud800b\udc00", "a\ufffdb\ufffd"), ("\ufeffक\u200bख", "कख"), ("\u0958", "क\u093c"), ("न\u093c", "\u0929"),
    ("क\u200dष\u200c", "क\u200dष\u200c"), ("A\r\n\0 ﬁ①", "A\r\n\0 ﬁ①"), ("e\u200b\u0301", "é"), ("है।", "है।"),
])  # fmt: skip
def test_normalize(text, expected):
    assert T.normalize(text) == expected


@given(texts)
def test_normalize_is_idempotent_and_nfc(text):
    once = T.normalize(text)
    assert T.normalize(once) == once and unicodedata.is_normalized("NFC", once)
    once.encode()


@given(texts, st.integers(1, 20))
def test_chunks_are_exact_and_normalise_alone(text, limit):
    text = T.normalize(text)
    parts = list(T.chunks(text, limit))
    assert "".join(parts) == text and all(0 < len(part) <= limit for part in parts)
    if limit > 8:
        assert "".join(map(T.normalize, parts)) == text


def test_chunks_keep_clusters_and_words():
    word = regex.sub(r"\s", "", T.normalize(NOVEL[:8000]))  # one word of thousands of letters
    edges = {m.start() for m in regex.finditer(r"\X", word)} | {len(word)}
    at = 0
    for part in T.chunks(word, 50):
        at += len(part)
        assert at in edges
    for part in list(T.chunks(NOVEL[:8000], 200))[1:]:
        assert part[0] in " \n"


def test_chunk_size_changes_nothing(tokenizers):
    text = NOVEL[:30000] + HARD
    for kind in ("bpe", "unigram"):
        t = T.from_bytes(tokenizers[kind].to_bytes())
        encoded = []
        for t.chunk in (100, 1024, 4096):
            encoded.append(t.encode(text))
        assert encoded[0] == encoded[1] == encoded[2]


def test_newlines_digits_and_spaces_are_not_merged():
    text = " ".join([NOVEL[:20000], *(f"१९४७ 1947\n{n} 2024, है। है।\n" for n in range(300))])
    for kind in ("bpe", "unigram"):
        t = T.from_bytes(T.train_sentencepiece([text], 1000, kind))
        assert t.encode("\n") == [4] and len(t.encode("1947")) == 4 and len(t.encode("है।\nहै।")) < 6
        pieces = [t.token_bytes(id) for id in range(t.vocab_size)]
        assert b"\n" in pieces and not any(b"\n" in p and p != b"\n" for p in pieces)
        assert not any(len(regex.findall(r"\p{Nd}", p.decode("utf-8", "replace"))) > 1 for p in pieces)
        assert not any(b" " in p[1:] for p in pieces)


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
@pytest.mark.parametrize("text", ["क", "aaaaaaaa", "नमस्ते दुनिया", "a b c", "1", "\0▁x", "क" * 5000])
def test_tiny_texts_train(kind, text, capsys):
    t = T.from_bytes(T.train_sentencepiece([text], 8192, kind))
    assert 4 + 256 + 1 <= t.vocab_size < 8192 and t.decode(t.encode(text + HARD)) == T.normalize(text + HARD)
    assert f"{t.vocab_size} pieces, not 8192" in capsys.readouterr().out


def test_training_is_deterministic_and_says_what_it_lacks():
    for kind in ("bpe", "unigram"):
        assert T.train_sentencepiece([NOVEL[:40000]], 700, kind) == T.train_sentencepiece([NOVEL[:40000]], 700, kind)
    with pytest.raises(ValueError, match="at least") as e:
        T.train_sentencepiece([NOVEL], 300)
    least = int(str(e.value).split()[-1])
    assert T.from_bytes(T.train_sentencepiece([NOVEL], least)).vocab_size == least
    for nothing in ([], ["", " \n \0"]):
        with pytest.raises(ValueError, match="no text"):
            T.train_sentencepiece(nothing, 1000)


def test_foreign_and_broken_files_are_refused(tokenizers):
    import io

    import sentencepiece

    model = io.BytesIO()  # the library's defaults: NFKC, a dummy prefix, no byte fallback
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(NOVEL[:20000].split("\n")), model_writer=model, vocab_size=300, pad_id=3, minloglevel=3
    )
    with pytest.raises(ValueError, match="changes text"):
        T.from_bytes(model.getvalue())
    for data in (b"", b"nonsense", b'{"kind": "other"}\n', b"{", b'{"kind": []}', tokenizers["bpe"].to_bytes()[:5000]):
        with pytest.raises(RuntimeError, match="no tokenizer"):
            T.from_bytes(data)
    head, _, body = tokenizers["tiktoken"].to_bytes().partition(b"\n")
    for ranks in (body[30:], body + b"IOCkqA== 3\n", body + b"no rank\n", b""):
        with pytest.raises(ValueError, match="rank"):
            T.from_bytes(head + b"\n" + ranks)


def test_tiktoken_offline_names_the_file_and_the_place(tmp_path, monkeypatch):  # T7
    import tiktoken
    import tiktoken.load
    import tiktoken_ext.openai_public as public

    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(FileNotFoundError, match="o200k_base.tiktoken.*TIKTOKEN_CACHE_DIR/") as e:
        T.from_tiktoken("o200k_base")
    # a rank file stored under the name that the message gives is found
    name = regex.search(r"\$TIKTOKEN_CACHE_DIR/(\w+)", str(e.value))[1]
    (tmp_path / name).write_bytes(ranks_file())
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda data, expected: True)
    t = T.from_tiktoken("o200k_base")
    assert t.vocab_size == ranks_file().count(b"\n") + 4 and T.from_bytes(t.to_bytes()).encode(HARD) == t.encode(HARD)
    assert public.o200k_base()["pat_str"] == T.O200K
    with pytest.raises(ValueError, match="Unknown encoding"):
        T.from_tiktoken("o300k")
    with pytest.raises(FileNotFoundError, match="no tiktoken rank file"):
        T.from_tiktoken("/nowhere/small.tiktoken")

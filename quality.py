"""How good written text is: what a judge thinks of it, how varied it is, how much of it is no Hindi writing at all.

    import quality
    figures = quality.measure(texts, tokenizer, judge=checkpoint.load("checkpoints/twin"), given=32)

No figure means anything alone: a text of nothing but commas pleases a judge, and noise is varied. So they are read
together, beside those of as much real text (evaluate.py --judge does both).
"""

import collections
import functools
import itertools
import unicodedata

import regex
import torch

import sampling
from config import SampleConfig
from intervals import ratio
from traces import CLUSTER, characters

# ---------------------------------------------------------------------------------------------------------------------
# variety


def distinct(texts, n):
    """Share of the n-grams of lists of ids, taken together, that are not the repetition of another; 0 of none."""
    grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def spread(texts):
    """(distinct-2, repeated 4-grams) of lists of ids, taken together, as shares of all pairs and all 4-grams.

    A text that goes round in circles and the same text behind every prompt both show. Nothing written is the worst.
    """
    return distinct(texts, 2), 1 - distinct(texts, 4)


def entropy(texts):
    """Of one token drawn from lists of ids, taken together: nats."""
    counts = torch.tensor([*collections.Counter(itertools.chain(*texts)).values()], dtype=torch.float64)
    return float(torch.special.entr(counts / counts.sum()).sum())


# ---------------------------------------------------------------------------------------------------------------------
# spelling

# Devanagari by what Unicode says of its characters: letters (Lo) are consonants, vowels and signs that stand alone;
# marks (Mn, Mc) are the nukta, the virama, vowel signs (matras) and bindus. Other marks, Vedic ones too, and
# joiners are free.
CONSONANT, VOWEL, ALONE = "[\u0915-\u0939\u0978-\u097f]", "[\u0904-\u0914\u0960\u0961\u0972-\u0977]", "[\u093d\u0950]"
MATRA, BINDU = "[\u093a\u093b\u093e-\u094c\u094e\u094f\u0955-\u0957\u0962\u0963]", "[\u0900-\u0902]?\u0903?"
FREE = regex.compile("[^\\P{M}\u0900-\u0903\u093a-\u094f\u0955-\u0957\u0962\u0963]|[\u200c\u200d]")
DEVANAGARI = regex.compile("[\u0900-\u0950\u0955-\u0963\u0972-\u097f]")  # without accents, dandas and digits
DEAD = f"{CONSONANT}\u093c?\u094d"
BASE = f"(?:{CONSONANT}\u093c?{MATRA}?|{VOWEL}\u093c?|{ALONE}|[\u00a0\u25cc]{MATRA}?)"
AKSHARA = regex.compile(f"(?:{DEAD})+|(?:{DEAD})*{BASE}{BINDU}|[\u00a0\u25cc][\u093c\u094d]")


def possible(cluster):
    """Whether a grapheme cluster with Devanagari in it can be an akshara, in any order that NFC makes the same.

    Consonants joined by viramas, each with a nukta or not, carry at most one vowel sign, at most one of candrabindu and
    anusvara, a visarga; or the last one is dead. A vowel carries no vowel sign and no virama (आ is one character, not
    अ and ा: Unicode, table 12-1). So a mark is impossible behind a space, a digit, a Latin letter or at the start of a
    line, and so are ाे, ्ा, ा़ and ंं; but behind a no-break space or ◌ it is shown for itself. ZWJ and ZWNJ, Vedic
    accents and whatever else combines are not looked at.
    """
    return AKSHARA.fullmatch(FREE.sub("", unicodedata.normalize("NFC", cluster))) is not None


def spelling(text, tokenizer, given=0):
    """Of the ids `text` behind its first `given`: (impossible aksharas, aksharas, broken characters, characters).

    What the first ids began is read with them, so that a matra may stand behind their consonant; a character that the
    end of the text cuts is not counted. Ids without text (EOS) part what stands before and behind them.
    """
    total = torch.zeros(4, dtype=torch.long)
    pieces = [(at, tokenizer.token_bytes(i)) for at, i in enumerate(text)]
    for some, run in itertools.groupby(pieces, lambda piece: piece[1] != b""):
        if not some:
            continue
        run = list(run)
        start = sum(len(piece) for at, piece in run if at < given)  # bytes that were given
        chars = characters(b"".join(piece for _, piece in run))
        if chars[-1][3] == "no end" and run[-1][0] == len(text) - 1:
            chars.pop()
        new = [fault for _, _, end, fault in chars if end > start]
        found = [m.group() for m in CLUSTER.finditer("".join(c for c, *_ in chars)) if chars[m.end() - 1][2] > start]
        found = [possible(cluster) for cluster in found if DEVANAGARI.search(cluster)]
        total += torch.tensor([found.count(False), len(found), len(new) - new.count(""), len(new)])
    return total


# ---------------------------------------------------------------------------------------------------------------------
# writing it


def continued(loaded, rows, given, steps=0, seed=0, batch_size=32):
    """What a checkpoint writes behind the first `given` tokens of rows (samples, T): lists of T ids, and how: a dict.

    At most `steps` forwards, 0: one a token. EOS may come and a new document begin, as in the windows of training.
    """
    model, ids, T = loaded.denoiser, loaded.tokenizer, rows.shape[1]
    x = rows.masked_fill(torch.arange(T) >= given, model.mask_id).to(next(model.parameters()).device)
    drawing = dict(temperature=1.0, forbid=ids.never)
    drawing["generator"] = torch.Generator().manual_seed(seed)
    if hasattr(model, "extend"):
        how, write = dict(strategy="left_to_right", steps=T - given), functools.partial(sampling.write, model)
    else:
        how = dict(strategy=SampleConfig().strategy, steps=min(steps or T, T - given))
        write = functools.partial(sampling.denoise, model, **how)
    done = [collections.deque(write(some, **drawing), maxlen=1).pop() for some in x.split(batch_size)]  # last steps
    return [text for step in done for text in step.x.tolist()], how | {"temperature": 1.0, "given": given}


# ---------------------------------------------------------------------------------------------------------------------
# all of it


@torch.no_grad()
def judged(judge, texts, given, rows=8):
    """-log p of what stands in each text behind its first given[i] ids, under the judge: (texts,) nats.

    Raises ValueError if one is longer than the judge's window.
    """
    gpt, longest, nats = judge.denoiser, max(map(len, texts)), []
    if longest > gpt.config.max_seq_len:
        limit = gpt.config.max_seq_len
        raise ValueError(f"a text has {longest} tokens, the window of {judge.path} {limit}; write shorter ones")
    for i in range(0, len(texts), rows):
        some = texts[i : i + rows]
        x = torch.tensor([t + [0] * (max(map(len, some)) - len(t)) for t in some])  # a causal model sees no padding
        nll = gpt.token_nll(x).double().cpu()
        nats += [float(row[g : len(t)].sum()) for row, g, t in zip(nll, given[i:], some, strict=False)]
    return torch.tensor(nats, dtype=torch.float64)


def check_judge(judge, tokenizer):
    """Raises ValueError if the judge (checkpoint.Loaded) is not autoregressive or reads other tokens."""
    if not hasattr(judge.denoiser, "token_nll"):
        raise ValueError(f"{judge.path} cannot judge: it is a {judge.kind}; name an autoregressive run")
    if judge.tokenizer.sha256 != tokenizer.sha256:
        shas = f"({judge.tokenizer.sha256[:12]}) than the text's ({tokenizer.sha256[:12]})"
        raise ValueError(f"{judge.path} cannot judge: it has another tokenizer {shas}; train it on the same data")


def measure(texts, tokenizer, judge=None, given=0):
    """Figures of texts, lists of ids, behind the first `given` of each (a number, or one a text): a dict.

    judge: a checkpoint.Loaded whose model is autoregressive and has the same tokenizer, else ValueError. It reads what
    was given and scores what was written. Ids that the texts hold are counted, EOS too: cut them before if need be.
    """
    texts = [[int(i) for i in t] for t in texts]
    given = [given] * len(texts) if isinstance(given, int) else [*given]
    if any(not 0 <= g <= len(t) for g, t in zip(given, texts, strict=True)):
        raise ValueError(f"given is {given}, the texts have {[*map(len, texts)]} tokens")
    new = [t[g:] for t, g in zip(texts, given, strict=True)]
    tokens = torch.tensor([len(t) for t in new], dtype=torch.float64)
    result = {"samples": len(texts), "tokens": int(tokens.sum())}
    if judge is not None:
        check_judge(judge, tokenizer)
        mean, error = ratio(judged(judge, texts, given), tokens) if result["tokens"] else (None, None)
        result["judge_nats_per_token"] = {"mean": mean, "standard_error": error}
    counts = sum(spelling(t, tokenizer, g) for t, g in zip(texts, given, strict=True))
    impossible, aksharas, broken, chars = counts.tolist() if len(texts) else (0, 0, 0, 0)
    return result | {
        "unigram_entropy": entropy(new),
        "distinct_1": distinct(new, 1),
        "distinct_2": distinct(new, 2),
        "distinct_3": distinct(new, 3),
        "repeated_4grams": 1 - distinct(new, 4),
        "invalid_aksharas": impossible / max(1, aksharas),
        "invalid_utf8": broken / max(1, chars),
    }

"""Toy worlds, small enough to enumerate: V = 3 tokens, T = 4 places, 81 strings; and denoisers exact in them."""

import itertools
import math

import torch
from torch import nn

import checkpoint
from model import Denoiser

V, T = 3, 4
STRINGS = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (81, T)
MASKS = torch.tensor(list(itertools.product([False, True], repeat=T)))[1:]  # (15, T) all but the empty one
MASK_PROBS = torch.tensor([1 / (T * math.comb(T, int(m.sum()))) for m in MASKS], dtype=torch.float64)  # k uniform
KINDS = [kind for kind in checkpoint.OURS if issubclass(checkpoint.MODELS[kind][1], Denoiser)]

UNIGRAM = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STEP = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.2, 0.7], [0.6, 0.0, 0.4]], dtype=torch.float64)  # p(b | a), two never
IID = UNIGRAM[STRINGS].prod(1)  # (81,)
MARKOV = UNIGRAM[STRINGS[:, 0]] * STEP[STRINGS[:, :-1], STRINGS[:, 1:]].prod(1)  # (81,)
SOURCES = {"iid": IID, "markov": MARKOV}


class Toy(nn.Module):
    """A denoiser made of a function x_t (B, T) -> logits (B, T, V). `seen`: every x_t that it was shown."""

    def __init__(self, f, V=V):
        super().__init__()
        self.f, self.mask_id, self.seen = f, V, []
        self.anchor = nn.Parameter(torch.zeros(1))  # says where the model lives

    def forward(self, x_t, where=None, lengths=None):
        self.seen.append(x_t.clone())
        logits = self.f(x_t)
        return logits if where is None else logits.flatten(0, 1)[where]


def oracle(p, tilt=0.0):
    """The exact posterior of every place under p (81,), or, with tilt, one that is wrong in every state."""
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=T)))  # (256, T)
    fits = ((states[:, None] == V) | (states[:, None] == STRINGS)).all(2).double() * p  # (256, 81)
    places = torch.stack([(STRINGS == v).double() for v in range(V)], 2)  # (81, T, V)
    marginal = torch.einsum("sn,ntv->stv", fits, places)
    table = (marginal / marginal.sum(2, keepdim=True)).nan_to_num(1 / V).log().clamp(min=-200)  # (256, T, V)
    table = table + tilt * torch.randn(table.shape, generator=torch.Generator().manual_seed(0), dtype=table.dtype)
    powers = (V + 1) ** torch.arange(T - 1, -1, -1)
    return Toy(lambda x_t: table[(x_t * powers).sum(1)])


def fixed(*logits):
    """The same logits at every place, whatever is shown."""
    return Toy(lambda x_t: torch.tensor(logits).expand(*x_t.shape, -1), V=len(logits))


def costs(denoiser, x0):
    """Mean cross-entropy of x0's (B, T) hidden places under each of the 15 masks: (B, 15), from dense logits."""
    out = []
    for mask in MASKS:
        logp = denoiser(x0.masked_fill(mask, V)).log_softmax(2).gather(2, x0[:, :, None]).squeeze(2)  # (B, T)
        out.append(-logp[:, mask].mean(1))
    return torch.stack(out, 1)


def by_count(cost):
    """costs (B, 15) -> mean and variance over the masks that hide k = 1..T: two (B, T)."""
    groups = [cost[:, MASKS.sum(1) == k] for k in range(1, T + 1)]
    return (torch.stack([f(g) for g in groups], 1) for f in (lambda g: g.mean(1), lambda g: g.var(1, correction=0)))


def surprise(counts, probs):
    """How many standard deviations the chi-square of counts lies above what probs let expect (Wilson-Hilferty)."""
    counts, probs = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (counts, probs))
    assert counts[probs == 0].sum() == 0, "what cannot happen has happened"
    counts, expected = counts[probs > 0], probs[probs > 0] / probs.sum() * counts.sum()
    df = len(expected) - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    return ((chi2 / df) ** (1 / 3) - 1 + 2 / (9 * df)) / (2 / (9 * df)) ** 0.5


def code(x):
    """Strings (B, T) -> their place in STRINGS (B,)."""
    return (x * V ** torch.arange(T - 1, -1, -1)).sum(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind, noise=0.2, **sizes):
    """A small model of the kind, every parameter moved away from where it starts, so that no gate is shut."""
    config, model = checkpoint.MODELS[kind]
    sizes = dict(vocab_size=11, max_seq_len=16, d_model=16, n_layers=2, n_heads=2, d_ff=24) | sizes
    torch.manual_seed(0)
    model = model(config(**sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model

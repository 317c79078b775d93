"""Optimizers: Muon for the blocks' matrices with AdamW for the rest, or AdamW alone; and the averaged weights.

    optimizers = make_optimizers(model, "muon", lr=4e-3, weight_decay=0.1, beta2=0.95)

Weight decay falls on the blocks' matrices only, never on norms, biases or embeddings, identically for every model.
"""

import contextlib

import torch
from torch import nn


def orthogonalize(G, steps=5):
    """Newton–Schulz: bring every singular value of G (..., R, C) near 1 (Muon, Jordan 2024). R <= C, batched.

    The quintic's coefficients are Muon's: fast rather than exact, the values end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalized, scaled to AdamW's update size (arXiv 2502.16982, eq. 4).

    Ours and not torch.optim.Muon, which works in bf16 always (a hundred times slower where a CPU has none) and one
    matrix at a time; here matrices of one shape go through Newton–Schulz together. A weight that stacks several
    matrices (qkv, gate and up) is cut into its `pieces`.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for piece, u in zip(p.chunk(pieces(p)), update.chunk(pieces(p)), strict=True):
                    wide = u if u.shape[0] <= u.shape[1] else u.mT
                    by_shape.setdefault(wide.shape, []).append((piece if wide is u else piece.mT, wide))
            for shape, pairs in by_shape.items():
                stack = torch.stack([u for _, u in pairs])  # (matrices, R, C)
                stack = orthogonalize(stack.bfloat16() if stack.is_cuda else stack)
                for (piece, _), u in zip(pairs, stack, strict=True):
                    piece.add_(u.to(piece.dtype), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def pieces(p):
    return getattr(p, "pieces", 1)


def make_optimizers(model, name, lr, weight_decay, beta2):
    """List of optimizers that together own every parameter once."""
    tied = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # a head can be the embedding itself
    # transformers' GPT-2 has linear layers of its own, transposed
    linear = lambda m: isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"  # noqa: E731
    inside = {m.weight for m in model.modules() if linear(m) and m.weight.dim() == 2} - tied
    matrices = [p for p in model.parameters() if p in inside]
    rest = [p for p in model.parameters() if p not in inside]
    adam = dict(lr=lr, betas=(0.9, beta2), eps=1e-10, foreach=True)
    if name == "adamw":
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        return [torch.optim.AdamW(groups, **adam)]
    return [Muon(matrices, lr, weight_decay), torch.optim.AdamW(rest, weight_decay=0.0, **adam)]


class EMA:
    """fp32 average of a model's weights; `shadow` is its state dict. Its first steps average less far back."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [v.detach() for v in model.state_dict().values()]
        torch._foreach_lerp_(list(self.shadow.values()), now, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model):
        """Inside, the model holds the averaged weights."""
        now = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(now)

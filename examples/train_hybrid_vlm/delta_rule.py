"""The gated delta rule in few operators, for training.

transformers' function solves a triangular system in each chunk. Here its inverse comes from matrix products
alone: they run at full speed on many small matrices, and CUDA graphs can hold them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32


class UnitLowerInverse(torch.autograd.Function):
    """The inverse of ``1 + L`` for strictly lower triangular ``L [..., n, n]``; ``n`` is a power of two.

    The inverse of ``[[P, 0], [Q, R]]`` has ``-R^-1 Q P^-1`` below its diagonal blocks: inverses of blocks of
    1, 2, 4, ... rows follow from each other. Powers of ``L``, the shorter way, overflow where keys are alike.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        """Compute the inverse."""
        size = lower.shape[-1]
        index = torch.arange(size, device=lower.device)
        inverse = torch.eye(size, device=lower.device, dtype=lower.dtype).expand_as(lower)
        rows = 1
        while rows < size:
            block = index // rows
            below = (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)
            corner = lower.masked_fill(~below, 0.0)
            inverse = inverse - (corner if rows == 1 else inverse @ corner @ inverse)
            rows *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Map the gradient of the inverse to that of ``L``."""
        (inverse,) = ctx.saved_tensors
        turned = inverse.mT
        grad: Tensor = -(turned @ grads[0] @ turned).tril(-1)
        return grad


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Rows that transformers' ``torch_chunk_gated_delta_rule`` computes with normed queries and keys.

    Args:
        query: [batch, tokens, heads, d_k].
        key: the same.
        value: [batch, tokens, heads, d_v].
        decay: logarithms, [batch, tokens, heads].
        beta: the same shape.
        chunk: tokens of a chunk, a power of two.

    Returns:
        [batch, tokens, heads, d_v], float32.
    """
    tokens, size = query.shape[1], query.shape[-1]
    missing = -tokens % chunk
    query, key, value = (_chunks(x, missing, chunk) for x in (query, key, value))
    decay, beta = (_chunks(x[..., None], missing, chunk) for x in (decay, beta))
    query, key = _normed(query) * size**-0.5, _normed(key)
    total = decay.cumsum(-2)
    grown, left = total.exp(), (total[..., -1:, :] - total).exp()
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    between = (total - total.mT).masked_fill(later, float("-inf")).exp()
    scaled = key * beta
    inverse: Tensor = UnitLowerInverse.apply((scaled @ key.mT * between).tril(-1))  # type: ignore[no-untyped-call]
    solved = inverse @ torch.cat([value * beta, scaled * grown], -1)
    values, reads = torch.split(solved, [value.shape[-1], size], -1)
    states, written = [], []
    state = values.new_zeros(*values.shape[:2], size, values.shape[-1])
    parts = (values, reads, grown[..., -1:, :], (key * left).mT)
    for new, read, kept, write in zip(*(part.unbind(2) for part in parts), strict=True):
        states.append(state)
        written.append(new - read @ state)
        state = state * kept + write @ written[-1]
    rows = (query * grown) @ torch.stack(states, 2) + (query @ key.mT * between) @ torch.stack(written, 2)
    return rows.flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def _chunks(x: Tensor, missing: int, chunk: int) -> Tensor:
    """[batch, tokens, heads, d] -> float32 [batch, heads, chunks, chunk, d], padded at the end."""
    x = F.pad(x.float(), (0, 0, 0, 0, 0, missing)).transpose(1, 2)
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

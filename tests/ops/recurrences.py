"""Random inputs of ``vlcache.recur``, for tests of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vlcache_fx.ops  # noqa: F401 (defines the operators)

recur = torch.ops.vlcache.recur

KINDS = ["delta", "linear", "kda", "gla"]
"""With and without a delta rule; the decay per head, or per key channel."""


def inputs(
    rows: int,
    *,
    batch: int = 1,
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    width: int = 6,
    kind: str = "delta",
    strength: float = 0.2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return q, k, v, g, a state and, where ``kind`` has a delta rule, beta.

    Args:
        rows: number of rows.
        batch: number of samples.
        heads: heads of v.
        groups: heads of q and k.
        dim: dk.
        width: dv.
        kind: one of ``KINDS``.
        strength: about the size of a row's log decay; that of every fifth row is 50 times as large.
        dtype: of all.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, generator=generator, dtype=torch.float64)

    q, k, v = normal(rows, groups, dim), normal(rows, groups, dim), normal(rows, heads, width)
    per_channel = (rows, heads, dim) if kind in ("kda", "gla") else (rows, heads)
    g = -normal(*per_channel).abs() * strength
    g[:, 3::5] *= 50
    result = {"q": q, "k": k / k.norm(dim=-1, keepdim=True), "v": v, "g": g}
    if kind in ("delta", "kda"):
        result["beta"] = normal(rows, heads).sigmoid()
    result["state"] = normal(heads, dim, width)
    return {name: tensor.to(dtype) for name, tensor in result.items()}


def sliced(tensors: dict[str, Tensor], first: int, end: int) -> dict[str, Tensor]:
    """Return the inputs of rows ``first`` to ``end``, without a state."""
    return {name: tensor[:, first:end] for name, tensor in tensors.items() if name != "state"}


def error(got: Tensor, want: Tensor, scale: float | None = None) -> float:
    """Return the largest deviation, relative to ``scale`` or else to the largest element."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    scale = max(want.abs().max().item(), 1e-30) if scale is None else scale
    return (got.double() - want.double()).abs().max().item() / scale


def table(*rows: list[int]) -> Tensor:
    """Return an int64 table, a row for each sample."""
    return torch.tensor(rows, dtype=torch.int64)


def errors(got: Any, want: Any) -> list[float]:
    """Return the error of each result of ``recur``.

    Errors of A are relative to A of no rows, the identity, because what is left of a state is rounded
    relative to the state. Errors of others are relative to themselves.
    """
    scales = (None, None, None, 1.0, None)
    return [error(*pair, scale) for *pair, scale in zip(got, want, scales, strict=True)]

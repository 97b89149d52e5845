"""Attention as models write it, in every form that this package knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

HEADS, ROWS, DIM = 4, 6, 8

Product = Literal["matmul", "grouped", "shared key", "bmm", "baddbmm", "einsum", "grouped einsum"]
Mask = Literal["none", "added", "two added", "filled", "filled lowest", "where", "where hidden"]


@dataclass(frozen=True)
class Written:
    """Attention of [1, heads, rows, dim] to [1, key heads, rows, dim] as separate operators.

    Attributes:
        product: operator of the products.
        scale: operand of the scale 1/3.
        mask: application of the mask [rows, rows], which is True where a row reads a token.
        softcap: bound of the scores, or None.
        sinks: end of the row with the sinks, after the subtraction of the largest logit.
        key_heads: number of key heads.
        wide: True for float32 scores.
    """

    product: Product = "matmul"
    scale: Literal["scores", "divided", "query", "key", "both"] = "scores"
    mask: Mask = "filled"
    softcap: float | None = None
    sinks: Literal["none", "last", "first", "last, shifted"] = "none"
    key_heads: int = 2
    wide: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        key = self._repeated(key)
        if self.scale == "query":
            query = query / 3
        if self.scale == "key":
            key = key * (1 / 3)
        if self.scale == "both":
            query, key = query * math.sqrt(1 / 3), key * math.sqrt(1 / 3)
        scores = self._scores(query, key)
        scores = scores.float() if self.wide else scores
        if self.scale == "divided":
            scores = scores / 3
        if self.scale == "scores" and self.product != "baddbmm":
            scores = scores * (1 / 3)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = self._masked(scores, mask)
        weights = self._softmax(scores, sinks).to(value.dtype)
        return self._values(weights, value)

    @property
    def repeats(self) -> bool:
        """Return key heads repeated for the product."""
        return self.product in ("matmul", "bmm", "baddbmm", "einsum") and self.key_heads < HEADS

    def _repeated(self, x: Tensor) -> Tensor:
        if not self.repeats:
            return x
        groups = HEADS // self.key_heads
        return x[:, :, None].expand(1, self.key_heads, groups, ROWS, DIM).reshape(1, HEADS, ROWS, DIM)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        match self.product:
            case "grouped":
                return query.view(1, self.key_heads, -1, ROWS, DIM) @ key[:, :, None].transpose(-1, -2)
            case "grouped einsum":
                grouped = query.view(1, self.key_heads, -1, ROWS, DIM)
                return torch.einsum("bngqd,bnkd->bngqk", grouped, key)
            case "bmm":
                return torch.bmm(query[0], key[0].transpose(1, 2))
            case "baddbmm":
                unread = torch.empty(1, ROWS, ROWS, dtype=query.dtype)
                return torch.baddbmm(unread, query[0], key[0].transpose(1, 2), beta=0, alpha=1 / 3)
            case "einsum":
                return torch.einsum("bqhd,bkhd->bhqk", query.transpose(1, 2), key.transpose(1, 2))
        return torch.matmul(query, key.transpose(2, 3))

    def _masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        lowest = torch.finfo(scores.dtype).min
        match self.mask:
            case "added":
                return scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)
            case "two added":
                bias = torch.arange(ROWS, dtype=scores.dtype) / 7
                return scores + bias + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)
            case "filled":
                return scores.masked_fill(~mask, -math.inf)
            case "filled lowest":
                return scores.masked_fill(mask == 0, lowest)
            case "where":
                return torch.where(mask, scores, -1e9)
            case "where hidden":
                return torch.where(~mask, torch.full((), -1e9, dtype=scores.dtype), scores)
        return scores

    def _softmax(self, scores: Tensor, sinks: Tensor) -> Tensor:
        if self.sinks == "none":
            return torch.softmax(scores, -1, dtype=torch.float32)
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)
        parts = [column, scores] if self.sinks == "first" else [scores, column]
        logits = torch.cat(parts, -1)
        if self.sinks == "last, shifted":
            logits = logits - logits.max(-1, keepdim=True).values
        weights = torch.softmax(logits, -1)
        return weights[..., 1:] if self.sinks == "first" else weights[..., :-1]

    def _values(self, weights: Tensor, value: Tensor) -> Tensor:
        value = self._repeated(value)
        match self.product:
            case "grouped":
                return (weights @ value[:, :, None]).reshape(1, HEADS, ROWS, DIM)
            case "grouped einsum":
                return torch.einsum("bngqk,bnkd->bngqd", weights, value).reshape(1, HEADS, ROWS, DIM)
            case "bmm" | "baddbmm":
                return torch.bmm(weights, value[0])
            case "einsum":
                return torch.einsum("bhqk,bkhd->bqhd", weights, value.transpose(1, 2))
        return torch.matmul(weights, value)


def operands(
    key_heads: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return query, key, value, a causal mask and sinks."""
    generator = torch.Generator().manual_seed(seed)

    def one(heads: int) -> Tensor:
        return torch.randn(1, heads, ROWS, DIM, generator=generator).to(dtype)

    sinks = torch.randn(HEADS, generator=generator).to(dtype)
    causal = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    return one(HEADS), one(key_heads), one(key_heads), causal, sinks


def one_result(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """Return the function with a tuple of results, as in graphs."""
    return lambda *arguments: (function(*arguments),)

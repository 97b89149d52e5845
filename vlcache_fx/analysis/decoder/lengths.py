"""Sizes of a decoder's graph that are lengths of the call: graphs of one model express them differently."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.decoder.facts import DecoderFacts
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.sizes import is_one

ANY = "*"
"""Stands for a length in any form."""


class Lengths:
    """Numbers of samples and tokens of a call, and sizes computed from them.

    Args:
        facts: facts about the graph.
    """

    def __init__(self, facts: DecoderFacts) -> None:
        self._facts = facts
        self._batch, self._tokens = batch, tokens = shape_of(facts.stream.boundaries[0])[:2]
        past = [size for node in facts.past for size in sizes_of(node)]
        self._joined = {str(length): length for length in (tokens + size for size in past)}.values()
        self._numbers = {1, *(size for size in (batch, tokens, batch * tokens) if isinstance(size, int))}

    def token_dim(self, node: Node) -> int | None:
        """Return the dimension over the call's tokens, or over a cache's and these; None unless unique."""
        sizes = sizes_of(node)
        found = _equal_to(self._tokens, sizes)
        found = found or [dim for length in self._joined for dim in _equal_to(length, sizes)]
        return found[0] if len(found) == 1 else None

    def batch_dim(self, node: Node, token_dim: int | None) -> int | None:
        """Return the batch dimension: the one before the tokens (``[3, batch, tokens]``), or the first."""
        if is_one(self._batch):
            return None
        found = [dim for dim in _equal_to(self._batch, sizes_of(node)) if dim != token_dim]
        if token_dim is not None and token_dim - 1 in found:
            return token_dim - 1
        return 0 if 0 in found else None

    def has_number(self, node: Node) -> bool:
        """Return True for a value over the call's tokens in a graph with static lengths."""
        return any(self.is_number(size) for size in sizes_of(node))

    def is_number(self, value: Any) -> bool:
        """Return True for a number that is a length in a graph with static lengths."""
        return value in self._numbers and not is_one(value)

    def expression(self, node: Node) -> str | None:
        """Return the text of a size computed from the call's lengths alone; None for others."""
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt):
            return None
        lengths: list[tuple[Any, str]] = [(self._tokens, "tokens"), (self._batch, "batch")]
        names = {length.node.expr: name for length, name in lengths if isinstance(length, torch.SymInt)}
        expression = size.node.expr
        if expression in names:
            return ANY
        if not expression.free_symbols or not expression.free_symbols <= names.keys():
            return None
        return str(expression.subs(names))

    def shape(self, node: Node) -> str:
        """Return the text of a shape without leading lengths: samples and tokens may share a dimension."""
        sizes = [ANY if self._is_length(node, dim, size) else size for dim, size in enumerate(shape_of(node))]
        first = next((index for index, size in enumerate(sizes) if size != ANY), len(sizes))
        return str(sizes[first:])

    def _is_length(self, node: Node, dim: int, size: Any) -> bool:
        if not isinstance(size, int) or size == 1:
            return True
        flow = self._facts.flows.get(node)
        if flow is None or flow.axis.dim is None:
            return self.is_number(size)
        # A static width may equal a length; here the dimensions of both are known.
        return dim in (flow.axis.dim, (self._facts.batch_dims or {}).get(node))


def sizes_of(node: Node) -> list[Any]:
    """Return the shape of a tensor; empty for other values."""
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else []


def _equal_to(length: Any, sizes: Iterable[Any]) -> Sequence[int]:
    """Return the dimensions with size ``length``, compared as expressions, not as values."""
    return [dim for dim, size in enumerate(sizes) if str(size) == str(length)]

"""Attention written as products and a softmax: ``softmax(query @ key.T * scale + mask) @ value``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.attention.products import Operand, Product, Step, product_of
from vlcache_fx.analysis.attention.scores import (
    NonCanonicalAttentionError,
    Scores,
    Term,
    is_cast,
    largest_of,
    number_of,
    only_reader,
    scores_of,
)
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.dataflow import data_inputs
from vlcache_fx.ir.nodes import CASTS, COPIES, LAYOUT, NO_BOUND, packet_of, slice_bounds
from vlcache_fx.ir.sizes import equal

aten = torch.ops.aten

SOFTMAX = frozenset({aten.softmax, aten._softmax, aten._safe_softmax})


@dataclass(frozen=True)
class EagerAttention:
    """An eager attention.

    Attributes:
        node: the product with the values.
        query, key, value: [batch, heads, tokens, dim]; keys and values may have fewer heads.
        terms: masks and biases, first to last.
        sinks: logit per head, [heads], or None.
        scale, softcap: see ``Scores``.
        steps: layout operators from [batch, heads, rows, value dim] to the value of ``node``.
        rank: number of dimensions of the scores in the graph.
    """

    node: Node
    query: Operand
    key: Operand
    value: Operand
    terms: tuple[Term, ...]
    sinks: Operand | None
    scale: float
    softcap: float | None
    steps: tuple[Step, ...]
    rank: int


def eager_attention(node: Node) -> EagerAttention | None:
    """Return the attention whose result ``node`` computes; None if it does not resemble one.

    Raises:
        NonCanonicalAttentionError: it resembles an attention, but has no canonical form.
    """
    values = product_of(node)
    if values is None or not _looks_like_attention(values):
        return None
    softmax, first_column = _back_to_softmax(values)
    logits, sinks = _before_sinks(softmax, first_column)
    found = scores_of(logits, _root)
    if found is None:
        raise NonCanonicalAttentionError(f"its scores are not a product of queries and keys ({logits.name})")
    product = product_of(found.root)
    assert product is not None
    return _in_heads(values, product, found, sinks)


def _looks_like_attention(values: Product) -> bool:
    """Return True if the left factor comes from a softmax of a product by elementwise operators alone."""
    softmax = _nearest(values.left.node, lambda node: packet_of(node) in SOFTMAX)
    return softmax is not None and _nearest(softmax, lambda node: product_of(node) is not None) is not None


def _nearest(start: Node, is_wanted: Any) -> Node | None:
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop(0)
        if is_wanted(node) and packet_of(node) not in LAYOUT:
            return node
        packet = packet_of(node)
        elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        others = (*SOFTMAX, aten.cat, aten.dropout, aten._to_copy, aten.to, aten.masked_fill, aten.where)
        if elementwise or packet in LAYOUT or packet in others:
            for parent in data_inputs(node):
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
    return None


def _back_to_softmax(values: Product) -> tuple[Node, int | None]:
    """Return the softmax, and the index of the column that is dropped from it (0, -1 or None)."""
    if values.left.steps or values.factor != 1.0 or values.added is not None:
        raise NonCanonicalAttentionError(
            "its probabilities are reordered or scaled before the product with the values"
        )
    reader, node, dropped = values.node, values.left.node, None
    while packet_of(node) not in SOFTMAX:
        only_reader(node, reader)
        packet, args = packet_of(node), node.args
        if packet is aten.slice and dropped is None and _drops_column(node) is not None:
            dropped = _drops_column(node)
        elif packet is aten.dropout and args[1] and args[2]:
            raise NonCanonicalAttentionError("dropout is applied to its probabilities")
        elif packet not in (aten.clone, aten.contiguous, aten.dropout) and not is_cast(node):
            raise NonCanonicalAttentionError(f"its probabilities go through {node.target}")
        reader, node = node, args[0]  # type: ignore[assignment]
        assert isinstance(node, Node)
    only_reader(node, reader)
    if node.args[1] not in (-1, len(shape_of(node)) - 1):
        raise NonCanonicalAttentionError("its softmax does not run over the keys")
    return node, dropped


def _drops_column(node: Node) -> int | None:
    source = node.args[0]
    assert isinstance(source, Node)
    dim, start, end, step = slice_bounds(node)
    width, left = shape_of(source)[-1], shape_of(node)[-1]
    if dim not in (-1, len(shape_of(source)) - 1) or step != 1 or not equal(left + 1, width):
        return None
    if start in (None, 0):
        return -1
    return 0 if start == 1 and end in (None, NO_BOUND) else None


def _before_sinks(softmax: Node, dropped: int | None) -> tuple[Node, Operand | None]:
    """Return the softmax's input without the column of sinks, and the sinks."""
    logits, readers = softmax.args[0], [softmax]
    assert isinstance(logits, Node)
    while dropped is not None and packet_of(logits) is not aten.cat:
        only_reader(logits, *readers)
        source = logits.args[0] if logits.args else None
        largest = largest_of(source, logits.args[1]) if packet_of(logits) is aten.sub else None
        if not isinstance(source, Node) or (largest is None and not is_cast(logits)):
            raise NonCanonicalAttentionError("its softmax drops a column that is not a sink")
        readers = [logits] if largest is None else [logits, largest]
        logits = source
    only_reader(logits, *readers)
    if dropped is None:
        return logits, None
    parts, dim = (*logits.args, 0)[:2]
    rank = len(shape_of(logits))
    if not isinstance(parts, list | tuple) or len(parts) != 2 or dim not in (-1, rank - 1):
        raise NonCanonicalAttentionError("its softmax drops a column that is not a sink")
    column, scores = (parts[1], parts[0]) if dropped == -1 else (parts[0], parts[1])
    assert isinstance(column, Node)
    assert isinstance(scores, Node)
    only_reader(scores, logits)
    sinks = _per_head(column, shape_of(scores)[-3])
    if sinks is None:
        raise NonCanonicalAttentionError(f"its sinks are not one number per head ({column.name})")
    return scores, sinks


def _per_head(column: Node, heads: Any) -> Operand | None:
    """Return ``column`` as [heads] if it is equal for all samples and rows; else None."""
    while packet_of(column) in COPIES | CASTS:
        column = column.args[0]  # type: ignore[assignment]
    if packet_of(column) is aten.expand and isinstance(column.args[0], Node):
        column = column.args[0]
    shape = (1, 1, 1, *shape_of(column))[-4:]
    if not isinstance(heads, int) or [*shape[:-3], *shape[-2:]] != [1, 1, 1] or shape[-3] != heads:
        return None
    while packet_of(column) in LAYOUT - {aten.slice, aten.expand} or is_cast(column):
        source = column.args[0]
        if not isinstance(source, Node) or shape_of(source).numel() != heads:
            break
        column = source
    found = Operand.of(column)
    return found if found.shape == (heads,) else found.viewed([heads], (heads,))


def _root(node: Node) -> Scores | None:
    product = product_of(node)
    if product is None:
        return None
    if product.order is not None:
        raise NonCanonicalAttentionError(f"its scores are reordered in {node.name}")
    if product.added is None:
        return Scores(node, inner=product.factor)
    added, factor = product.added
    return Scores(node, inner=product.factor, terms=(Term("added", added, factor),))


def _in_heads(values: Product, product: Product, found: Scores, sinks: Operand | None) -> EagerAttention:
    """Return the attention with the four dimensions of an attention call."""
    query, factor = _unscaled(product.left, found.root)
    key, value = product.right.transposed(), values.right
    swap = product.right.node if key.node is not product.right.node else found.root
    key, key_factor = _unscaled(key, swap)
    found = replace(found, inner=found.inner * factor * key_factor)
    rank, shape = len(query.shape), shape_of(values.node)
    ordered = tuple(shape) if values.order is None else _before(shape, values.order)
    back: list[Step] = []
    if rank == 3:
        query, key, value = (operand.unsqueezed(0) for operand in (query, key, value))
        back.append((aten.squeeze.dim, (0,)))
    elif rank == 5:
        query, key, value = _grouped(query, key, value)
        sizes = [*ordered[:3], -1, ordered[4]]
        back.append((aten.reshape.default, (sizes,)))
    elif rank != 4:
        raise NonCanonicalAttentionError(f"its scores have {rank} dimensions")
    _check_heads(query, key, value)
    _check_masks(found.terms, rank)
    if values.order is not None:
        back.append((aten.permute.default, (list(values.order),)))
    return EagerAttention(
        values.node, query, key, value, found.terms, sinks, found.scale, found.softcap, tuple(back), rank
    )


def _before(shape: torch.Size, order: tuple[int, ...]) -> tuple[Any, ...]:
    result: list[Any] = [None] * len(order)
    for dim, source in enumerate(order):
        result[source] = shape[dim]
    return tuple(result)


def _grouped(query: Operand, key: Operand, value: Operand) -> tuple[Operand, Operand, Operand]:
    """Return operands of four dimensions for grouped heads of five.

    ``query`` is [batch, key heads, group, rows, dim]; ``key`` and ``value`` are [batch, key heads, 1, tokens,
    dim].
    """
    heads = query.shape[1:3]
    if not all(isinstance(size, int) for size in query.shape[:3]) or key.shape[2] != 1 or value.shape[2] != 1:
        raise NonCanonicalAttentionError("its five dimensions are not groups of heads that share a key")
    joined = heads[0] * heads[1]
    batch, rows, dim = query.shape[0], query.shape[3], query.shape[4]
    query = query.viewed([batch, joined, -1, dim], (batch, joined, rows, dim))
    return query, key.squeezed(2), value.squeezed(2)


def _check_heads(query: Operand, key: Operand, value: Operand) -> None:
    same = all(equal(key.shape[dim], value.shape[dim]) for dim in (0, 1))
    heads, key_heads = query.shape[1], key.shape[1]
    if not equal(heads, key_heads):
        same = same and isinstance(heads, int) and isinstance(key_heads, int) and heads % key_heads == 0
    if not same or not equal(query.shape[0], key.shape[0]):
        raise NonCanonicalAttentionError("its queries, keys and values differ in samples or heads")


def _check_masks(terms: tuple[Term, ...], rank: int) -> None:
    for term in terms:
        value = term.node.meta["val"]
        if value.is_floating_point() != (term.kind == "added"):
            raise NonCanonicalAttentionError(f"its mask {term.node.name} is of type {value.dtype}")
        if rank == 5 and any(size != 1 for size in value.shape[-4:-2]):
            raise NonCanonicalAttentionError(f"its mask {term.node.name} differs from head to head")


def _unscaled(operand: Operand, reader: Node) -> tuple[Operand, float]:
    """Return the operand without constant factors, and their product."""
    node, factor = operand.node, 1.0
    while packet_of(node) in (aten.mul, aten.div) and list(node.users) == [reader]:
        number, source = number_of(node.args[1]), node.args[0]
        if not number or not isinstance(source, Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            break
        factor = factor / number if packet_of(node) is aten.div else factor * number
        reader, node = node, source
    return replace(operand, node=node), factor

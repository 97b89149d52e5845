"""Operations on attention scores between the product and the softmax: scale, cap, biases and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from vlcache_fx.ir.nodes import CASTS, COPIES, attribute, packet_of
from vlcache_fx.ir.sizes import equal

aten = torch.ops.aten

LEAST_HIDING = -1e4
"""Largest fill value that masks a score; a larger one is a value."""


class NonCanonicalAttentionError(Exception):
    """An attention has no canonical form; the message says why."""


@dataclass(frozen=True)
class Term:
    """One mask or bias.

    Attributes:
        kind: ``added`` to the scores; or a bool tensor, true where scores are ``hidden`` or ``visible``.
        node: the tensor.
        number: factor of an added tensor, or fill value of hidden scores.
    """

    kind: Literal["added", "hidden", "visible"]
    node: Node
    number: float


@dataclass(frozen=True)
class Scores:
    """``outer * tanh(inner * product)``, tanh being optional, and then ``terms``.

    Attributes:
        root: the node that computes the product.
        inner: factor of the product, inside tanh.
        is_capped: tanh is applied.
        outer: factor after tanh.
        terms: masks and biases, first to last.
    """

    root: Node
    inner: float = 1.0
    is_capped: bool = False
    outer: float = 1.0
    terms: tuple[Term, ...] = ()

    @property
    def scale(self) -> float:
        """Factor of the product, before the cap."""
        return self.inner * self.outer

    @property
    def softcap(self) -> float | None:
        """Bound of the scores' magnitude."""
        return self.outer if self.is_capped else None


Root = Callable[[Node], Scores | None]


def scores_of(node: Node, root: Root) -> Scores | None:
    """Follow ``node`` back to a product that ``root`` recognises; return None if there is none.

    Raises:
        NonCanonicalAttentionError: an operation on the way has no canonical form.
    """
    found = root(node)
    if found is not None or node.op != "call_function":
        return found
    packet, args = packet_of(node), node.args
    if packet in (aten.clone, aten.tanh, aten.contiguous) or is_cast(node):
        found = _inside(node, args[0], root)
        return _capped(found) if found is not None and packet is aten.tanh else found
    if packet in (aten.mul, aten.div) and len(args) == 2:
        return _scaled(node, root)
    if packet in (aten.add, aten.sub) and len(args) == 2:
        return _added(node, root)
    if packet is aten.masked_fill:
        found = _inside(node, args[0], root)
        return found and _with(found, Term("hidden", _tensor(args[1]), _hiding(args[2])))
    if packet is aten.where and len(args) == 3:
        found = _inside(node, args[1], root)
        if found is not None:
            return _with(found, Term("visible", _tensor(args[0]), _hiding(args[2])))
        found = _inside(node, args[2], root)
        return found and _with(found, Term("hidden", _tensor(args[0]), _hiding(args[1])))
    return None


def is_cast(node: Node) -> bool:
    """Return True for a cast between floating-point dtypes on one device."""
    source = node.args[0] if node.args else None
    if packet_of(node) not in (aten._to_copy, aten.to) or not isinstance(source, Node):
        return False
    before, after = source.meta["val"], node.meta["val"]
    return bool(before.is_floating_point() and after.is_floating_point() and before.device == after.device)


def number_of(value: Any) -> float | None:
    """Return the value of a literal or of a constant 0-d tensor; None for other arguments."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value.target in (aten.full.default, aten.scalar_tensor.default):
        fake = value.meta.get("val")
        return number_of(value.args[-1]) if isinstance(fake, torch.Tensor) and fake.dim() == 0 else None
    if packet_of(value) in COPIES | CASTS:
        return number_of(value.args[0])
    if value.op == "get_attr":
        owner = value.graph.owning_module
        constant = None if owner is None else attribute(owner, value)
        if type(constant) is torch.Tensor and constant.dim() == 0:
            return float(constant)
    return None


def only_reader(node: Node, *readers: Node) -> None:
    """Check that ``readers`` alone read ``node``.

    Raises:
        NonCanonicalAttentionError: others do.
    """
    others = [user for user in node.users if user not in readers]
    if others:
        how = "returned" if others[0].op == "output" else f"read by {others[0].name}"
        raise NonCanonicalAttentionError(f"{node.name}, part of its softmax, is {how} too")


def _inside(node: Node, operand: Any, root: Root, *others: Node) -> Scores | None:
    found = scores_of(operand, root) if isinstance(operand, Node) and _same_shape(node, operand) else None
    if found is not None:
        only_reader(operand, node, *others)
    return found


def _same_shape(node: Node, operand: Node) -> bool:
    value, other = node.meta["val"], operand.meta.get("val")
    if not isinstance(other, torch.Tensor) or other.dim() != value.dim():
        return False
    return all(equal(left, right) for left, right in zip(value.shape, other.shape, strict=True))


def _capped(found: Scores) -> Scores:
    if found.is_capped or found.terms:
        raise NonCanonicalAttentionError("tanh follows a cap or a mask")
    return replace(found, is_capped=True)


def _scaled(node: Node, root: Root) -> Scores | None:
    first, second = node.args
    if number_of(second) is None and packet_of(node) is aten.mul:
        first, second = second, first
    found, number = _inside(node, first, root), number_of(second)
    if found is None:
        found = _inside(node, second, root)
    if found is None:
        return None
    if number is None or number == 0.0:
        raise NonCanonicalAttentionError(f"its scores are scaled by a tensor in {node.name}")
    if found.terms:
        raise NonCanonicalAttentionError(f"its scores are scaled after a mask in {node.name}")
    factor = 1.0 / number if packet_of(node) is aten.div else number
    if found.is_capped:
        return replace(found, outer=found.outer * factor)
    return replace(found, inner=found.inner * factor)


def _added(node: Node, root: Root) -> Scores | None:
    sign = -1.0 if packet_of(node) is aten.sub else 1.0
    alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    first, second = node.args
    largest = largest_of(first, second) if sign < 0 else None
    if largest is not None:  # does not change a softmax
        return _inside(node, first, root, largest)
    found = _inside(node, first, root)
    if found is not None:
        return _with(found, Term("added", _tensor(second), sign * alpha))
    found = _inside(node, second, root) if sign * alpha == 1.0 else None
    return found and _with(found, Term("added", _tensor(first), 1.0))


def largest_of(scores: Any, other: Any) -> Node | None:
    """Return the node of the row maximum of ``scores`` if ``other`` is that maximum; else None."""
    if not isinstance(other, Node):
        return None
    is_part = packet_of(other) is not aten.amax
    found = other.args[0] if is_part and other.args and other.args[1:] == (0,) else other
    if not isinstance(found, Node) or packet_of(found) not in (aten.max, aten.amax) or len(found.args) < 3:
        return None
    source, dims, kept = found.args[:3]
    last = dims in (-1, [-1], scores.meta["val"].dim() - 1, [scores.meta["val"].dim() - 1])
    return found if source is scores and last and kept is True else None


def _with(found: Scores, term: Term) -> Scores:
    return replace(found, terms=(*found.terms, term))


def _tensor(value: Any) -> Node:
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        raise NonCanonicalAttentionError("a number is added to its scores")
    return value


def _hiding(value: Any) -> float:
    number = number_of(value)
    if number is None or math.isnan(number) or number > LEAST_HIDING:
        raise NonCanonicalAttentionError(
            f"scores are replaced by {'a tensor' if number is None else number}, not hidden"
        )
    return number

"""Batched matrix products: ``matmul``, ``bmm``, ``baddbmm`` and ``einsum``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import shape_of

aten = torch.ops.aten

Step: TypeAlias = tuple[Any, tuple[Any, ...]]
"""A layout operator and its arguments after the tensor."""


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph in another layout.

    Attributes:
        node: the tensor.
        steps: layout operators, not in the graph, that are applied to it in order.
        shape: shape after them.
    """

    node: Node
    steps: tuple[Step, ...]
    shape: tuple[Any, ...]

    @classmethod
    def of(cls, node: Node) -> Operand:
        """Return ``node`` as an operand without steps."""
        return cls(node, (), tuple(shape_of(node)))

    def permuted(self, order: tuple[int, ...]) -> Operand:
        """Return the operand with its dimensions in another order."""
        if order == tuple(range(len(order))):
            return self
        return self._then(aten.permute.default, (list(order),), [self.shape[dim] for dim in order])

    def unsqueezed(self, dim: int) -> Operand:
        """Return the operand with a new dimension of size 1; ``dim >= 0``."""
        return self._then(aten.unsqueeze.default, (dim,), [*self.shape[:dim], 1, *self.shape[dim:]])

    def squeezed(self, dim: int) -> Operand:
        """Return the operand without a dimension of size 1; ``dim >= 0``."""
        return self._then(aten.squeeze.dim, (dim,), [*self.shape[:dim], *self.shape[dim + 1 :]])

    def viewed(self, sizes: list[Any], shape: tuple[Any, ...]) -> Operand:
        """Return the operand in another shape; ``sizes`` is ``shape`` with -1 for a symbolic size."""
        return self._then(aten.reshape.default, (sizes,), list(shape))

    def transposed(self) -> Operand:
        """Return the operand with its last two dimensions swapped; a swap in the graph is undone instead."""
        rank = len(self.shape)
        node = self.node
        if not self.steps and node.target is aten.transpose.int:
            swapped = {int(dim) % rank for dim in node.args[1:3]}  # type: ignore[arg-type]
            if swapped == {rank - 1, rank - 2} and isinstance(node.args[0], Node):
                return Operand.of(node.args[0])
        if not self.steps and node.target is aten.mT.default and isinstance(node.args[0], Node):
            return Operand.of(node.args[0])
        if not self.steps and node.target is aten.permute.default and isinstance(node.args[0], Node):
            order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
            return Operand.of(node.args[0]).permuted((*order[:-2], order[-1], order[-2]))
        return self.permuted((*range(rank - 2), rank - 1, rank - 2))

    def _then(self, target: Any, arguments: tuple[Any, ...], shape: list[Any]) -> Operand:
        return Operand(self.node, (*self.steps, (target, arguments)), tuple(shape))


@dataclass(frozen=True)
class Product:
    """``factor * (left @ right)``, permuted by ``order``, plus ``added``.

    Attributes:
        node: the node that computes it.
        left: [..., rows, inner].
        right: [..., inner, columns].
        order: permutation of the product's dimensions in the result of ``node``; None for none.
        factor: factor of the product.
        added: a tensor that is added, and its factor; or None.
    """

    node: Node
    left: Operand
    right: Operand
    order: tuple[int, ...] | None = None
    factor: float = 1.0
    added: tuple[Node, float] | None = None


def product_of(node: Node) -> Product | None:
    """Return the product that ``node`` computes of two tensors of one rank >= 3; None for other nodes."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if node.target in (aten.matmul.default, aten.bmm.default):
        return _plain(node, node.args[0], node.args[1])
    if node.target is aten.baddbmm.default:
        product = _plain(node, node.args[1], node.args[2])
        beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
        if product is None or not all(isinstance(number, int | float) for number in (beta, alpha)):
            return None
        added = (node.args[0], float(beta)) if beta else None  # type: ignore[arg-type]
        factor = float(alpha)  # type: ignore[arg-type]
        return Product(node, product.left, product.right, None, factor, added)  # type: ignore[arg-type]
    return _einsum(node) if node.target is aten.einsum.default else None


def _plain(node: Node, left: Any, right: Any) -> Product | None:
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    if len(shape_of(left)) != len(shape_of(right)) or len(shape_of(left)) < 3:
        return None
    return Product(node, Operand.of(left), Operand.of(right))


def _einsum(node: Node) -> Product | None:
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, out = equation.partition("->")
    parts = inputs.split(",")
    if not arrow or "." in equation or len(parts) != 2 or not isinstance(tensors, list | tuple):
        return None
    first, second = (Operand.of(tensor) for tensor in tensors if isinstance(tensor, Node))
    if any(len(set(labels)) != len(labels) for labels in (*parts, out)) or len(out) < 3:
        return None
    if out[-1] in parts[0]:
        parts, first, second = parts[::-1], second, first
    left, right = parts
    inner = [label for label in left if label in right and label not in out]
    if len(inner) != 1 or out[-1] in left or set(left + right) != {*out, *inner}:
        return None
    columns, rows = out[-1], out[-2]
    order = out
    if rows in right or rows not in left:  # a product with values: rows come before the inner label
        index = left.index(inner[0])
        rows, order = (left[index - 1] if index else ""), left
        if not rows or rows in right:
            return None
    batch = [label for label in order if label not in (rows, columns, *inner)]
    if not set(right) <= {*batch, columns, *inner} or any(label not in out for label in batch):
        return None
    canonical = [*batch, rows, columns]
    permutation = tuple(canonical.index(label) for label in out)
    return Product(
        node,
        _aligned(first, left, [*batch, rows, *inner]),
        _aligned(second, right, [*batch, *inner, columns]),
        None if permutation == tuple(range(len(permutation))) else permutation,
    )


def _aligned(operand: Operand, labels: str, wanted: list[str]) -> Operand:
    operand = operand.permuted(tuple(labels.index(label) for label in wanted if label in labels))
    for dim, label in enumerate(wanted):
        if label not in labels:
            operand = operand.unsqueezed(dim)
    return operand

"""Compute masks for the active rows only."""

from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten
SELECT, TAKE = aten.index_select.default, torch.ops.vlcache.take_rows.default
UNTAGGED = frozenset({aten._to_copy.default, aten.__and__.Tensor, aten.__or__.Tensor})
"""Pointwise operators without torch's tag."""


class RestrictMasks(Pass):
    """Moves a gather of rows of a bool mask [.., tokens, tokens] to the vectors from which it is computed.

    Models build masks by comparing vectors of positions, so no tensor of size tokens x tokens is created. A
    mask that is an input keeps its gather.
    """

    name: ClassVar[str] = "restrict_masks"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "kv_only"})

    def run(self, program: Program) -> bool:
        """Rewrite each gather of rows of a mask, and drop unused masks."""
        changed = False
        for gather in list(program.graph.nodes):
            if gather.target not in (SELECT, TAKE):
                continue
            restriction = _Restriction(program, gather)
            if not restriction.pays():
                continue
            with program.graph.inserting_before(gather):
                restricted = restriction.of(restriction.mask, restriction.dim)
            gather.replace_all_uses_with(restricted)
            program.graph.erase_node(gather)
            changed = True
        if changed:
            program.graph.eliminate_dead_code()
        return changed


def _is_one(value: torch.Tensor, dim: int) -> bool:
    return isinstance(value.shape[dim], int) and value.shape[dim] == 1


def _is_pointwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (torch.Tag.pointwise in tags or node.target in UNTAGGED)


class _Restriction:
    """The restriction of a gather's operand to the gathered rows, inserted before the gather."""

    def __init__(self, program: Program, gather: Node) -> None:
        self._graph, self._gather = program.graph, gather
        is_select = gather.target is SELECT
        self.mask: Any = gather.args[0]
        self.dim: Any = gather.args[1 if is_select else 2]
        self._index: Any = gather.args[2 if is_select else 1]
        # Rows of several samples need a batch dimension, which vectors of lower rank lack.
        value = None if is_select else self._mask_value()
        self._least_rank = 0 if value is None else value.dim()
        self._made: dict[tuple[Node, int], Node] = {}

    def pays(self) -> bool:
        """Return True for a mask [.., rows, tokens] computed from vectors with one value per row."""
        value = self._mask_value()
        if value is None or value.dtype != torch.bool:
            return False
        if self.dim != value.dim() - 2 or _is_one(value, self.dim):
            return False
        return self._operands(self.mask, self.dim) is not None and self._is_thin(self.mask, self.dim)

    def _mask_value(self) -> torch.Tensor | None:
        value: Any = self.mask.meta.get("val")
        return value if isinstance(value, torch.Tensor) else None

    def _is_thin(self, node: Node, dim: int) -> bool:
        operands = self._operands(node, dim)
        if operands is None:
            value = node.meta["val"]
            return all(other == dim or _is_one(value, other) for other in range(value.dim()))
        return all(self._is_thin(*operand) for operand in operands)

    def _operands(self, node: Node, dim: int) -> list[tuple[Node, int]] | None:
        """Return the operands with dim ``dim`` of ``node``, and their dim; None if ``node`` is gathered."""
        rank = node.meta["val"].dim()
        if node.target is aten.unsqueeze.default:
            source, added = node.args[:2]
            assert isinstance(source, Node)
            assert isinstance(added, int)
            candidates = [(source, dim - (added % rank < dim))]
        elif _is_pointwise(node) or node.target is aten.expand.default:
            values = [(operand, operand.meta.get("val")) for operand in node.all_input_nodes]
            candidates = [
                (operand, dim - rank + value.dim())
                for operand, value in values
                if isinstance(value, torch.Tensor)
            ]
        else:
            return None
        found = [
            (operand, at) for operand, at in candidates if at >= 0 and not _is_one(operand.meta["val"], at)
        ]
        return None if any(operand.meta["val"].dim() < self._least_rank for operand, _ in found) else found

    def of(self, node: Node, dim: int) -> Node:
        """Return ``node`` at the gathered rows of its dim ``dim``."""
        if (node, dim) not in self._made:
            self._made[node, dim] = self._restricted(node, dim)
        return self._made[node, dim]

    def _restricted(self, node: Node, dim: int) -> Node:
        operands = self._operands(node, dim)
        if operands is None:
            if self._gather.target is SELECT:
                return self._call(SELECT, (node, dim, self._index))
            return self._call(TAKE, (node, self._index, dim, self._gather.args[3]))
        dims = dict(operands)

        def moved(operand: Node) -> Node:
            return self.of(operand, dims[operand]) if operand in dims else operand

        args: Any = map_arg(node.args, moved)
        if node.target is aten.expand.default:
            sizes = list(args[1])
            sizes[dim] = -1 if operands else self._call(aten.sym_size.int, (self._index, self._index_dim()))
            args = (args[0], sizes)
        return self._call(node.target, args, map_arg(node.kwargs, moved))

    def _index_dim(self) -> int:
        return 0 if self._gather.target is SELECT else 1

    def _call(self, target: Any, args: Any, kwargs: Any = None) -> Node:
        made = self._graph.call_function(target, args, kwargs)
        made.meta.update(
            {name: self._gather.meta[name] for name in ("segment",) if name in self._gather.meta}
        )
        return made

"""Compute the inverse of a permutation by a sort."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.nodes import packet_of
from vlcache_fx.ir.sizes import equal, product
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten


class InvertPermutations(Pass):
    """``x[p] = arange(n)`` for a permutation ``p`` becomes ``argsort(p)``.

    Mixtures of experts restore the order of sorted tokens in this way. A sort has no explicit size, so it
    stays right when only some rows are computed.
    """

    name: ClassVar[str] = "invert_permutations"

    def run(self, program: Program) -> bool:
        """Replace every write of an ``arange`` to indices from a sort."""
        changed = False
        for node in list(program.graph.nodes):
            if packet_of(node) is not aten.index_put or not _inverts(node):
                continue
            permutation: Any = node.args[1][0]
            with program.graph.inserting_before(node):
                inverse = program.graph.call_function(aten.argsort.default, (permutation,))
            inverse.meta.update(node.meta)
            node.replace_all_uses_with(inverse)
            program.graph.erase_node(node)
            changed = True
        return changed


def _inverts(node: Node) -> bool:
    base, indices, values = node.args[:3]
    accumulates = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    if accumulates or not isinstance(indices, list | tuple) or len(indices) != 1:
        return False
    (permutation,) = indices
    if not isinstance(permutation, Node) or not _is_permutation(permutation) or not isinstance(base, Node):
        return False
    count = shape_of(permutation)[0]
    whole = len(shape_of(base)) == 1 and equal(shape_of(base)[0], count)
    same_dtype = node.meta["val"].dtype == permutation.meta["val"].dtype
    return bool(whole and same_dtype and isinstance(values, Node) and _counts(values, count))


def _is_permutation(node: Node) -> bool:
    if len(shape_of(node)) != 1:
        return False
    source = node.args[0] if node.args else None
    taken = isinstance(source, Node) and packet_of(source) is aten.sort and node.args[1] == 1
    return bool(taken or packet_of(node) is aten.argsort)


def _counts(node: Node, count: Any) -> bool:
    """Return True for ``arange(count)``."""
    plain = node.target is aten.arange.default
    return plain and len(shape_of(node)) == 1 and equal(product(shape_of(node)), count)

"""Drop nodes that compute nothing: metadata assertions, detach, alias, full slices."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.ir.nodes import keeps_last, slice_bounds
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten

ASSERTIONS = frozenset({aten._assert_tensor_metadata.default})
IDENTITIES = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default})


class DropNoops(Pass):
    """Forwards identities, and erases assertions of dtype and device, which hold since capture."""

    name: ClassVar[str] = "drop_noops"

    def run(self, program: Program) -> bool:
        """Forward identities and erase assertions."""
        changed = False
        for node in list(program.graph.nodes):
            if node.target in ASSERTIONS:
                program.graph.erase_node(node)
            elif node.target in IDENTITIES or (node.target is aten.slice.Tensor and _keeps_all(node)):
                source = node.args[0]
                assert isinstance(source, Node)
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
            else:
                continue
            changed = True
        return changed


def _keeps_all(node: Node) -> bool:
    source: Any = node.args[0]
    return keeps_last(node, source.meta["val"].shape[slice_bounds(node)[0]])

"""Remove block masks from flex attention before capture.

A block mask lists the blocks of scores that are not all masked; its ``mask_mod`` alone defines the mask. A
model that builds the blocks inside ``forward`` does so with ``vmap`` and mutations, which pre-dispatch
tracing refuses.
"""

import operator
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir.subgraph import needed_for

FLEX = torch.ops.higher_order.flex_attention
FACTORIES = frozenset(
    {"new_zeros", "new_ones", "new_empty", "new_full", torch.zeros, torch.ones, torch.empty, torch.full}
)
"""Calls that return a tensor with memory of its own."""


def drop_block_masks(module: fx.GraphModule) -> None:
    """Remove the blocks of flex attention calls from a Dynamo graph, and the nodes that compute them alone.

    The graph then still defines what is masked, but cannot run flex attention.
    """
    graph, blocks = module.graph, set()
    for call in graph.find_nodes(op="call_function", target=FLEX):
        mask = call.args[4]
        assert isinstance(mask, tuple | list)
        blocks |= {entry for entry in mask if isinstance(entry, Node) and _is_tensor(entry)}
        call.update_arg(4, tuple(None if entry in blocks else entry for entry in mask))
    if blocks:
        block_nodes = needed_for(blocks)
        kept = [node for node in graph.nodes if not (node.users or _is_block_only(node, block_nodes))]
        needed = needed_for(kept)
        if not any(_is_transform(node) for node in needed):
            for node in reversed(graph.nodes):
                if node not in needed and node.op != "placeholder":
                    graph.erase_node(node)
        module.recompile()


def refuse_transforms(graph: fx.Graph) -> None:
    """Refuse transforms of ``torch.func``, which pre-dispatch tracing cannot resolve.

    Raises:
        UnsupportedGraphError: CAPTURE_FAILED.
    """
    for node in graph.nodes:
        if _is_transform(node):
            raise UnsupportedGraphError(
                Reason.CAPTURE_FAILED, "transforms of torch.func (vmap, grad) cannot be traced", node.name
            )


def _is_block_only(node: Node, block_nodes: set[Node]) -> bool:
    """Return True for a call without users whose only effect, if any, is on tensors of the blocks."""
    if node in block_nodes or _is_transform(node):
        return True
    written: Any = node.args[0] if node.target is operator.setitem else None
    return written in block_nodes and written.target in FACTORIES


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _is_transform(node: Node) -> bool:
    return getattr(node.target, "__module__", None) == "torch._functorch.predispatch"

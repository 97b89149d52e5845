"""Flex attention on its way through capture: without the blocks of its mask.

A block mask says which blocks of scores hold anything; what is masked is said by a function, which comes with
it. Where a model makes the blocks inside its ``forward``, the graph does so by ``vmap`` and by writes, which
torch does not trace before dispatch. Nothing here needs them.
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
"""What gives a tensor that shares its memory with no other."""


def drop_block_masks(module: fx.GraphModule) -> None:
    """Take the blocks out of the calls of flex attention in a Dynamo graph, and what only made them.

    The graph then serves to find out what is masked, not to run flex attention.
    """
    graph, blocks = module.graph, set()
    for call in graph.find_nodes(op="call_function", target=FLEX):
        mask = call.args[4]
        assert isinstance(mask, tuple | list)
        blocks |= {one for one in mask if isinstance(one, Node) and _is_tensor(one)}
        call.update_arg(4, tuple(None if one in blocks else one for one in mask))
    if blocks:
        made_for_blocks = needed_for(blocks)
        kept = [node for node in graph.nodes if not (node.users or _serves(node, made_for_blocks))]
        needed = needed_for(kept)
        if not any(_is_transform(node) for node in needed):
            for node in reversed(graph.nodes):
                if node not in needed and node.op != "placeholder":
                    graph.erase_node(node)
        module.recompile()


def refuse_transforms(graph: fx.Graph) -> None:
    """Tracing would not see through them.

    Raises:
        UnsupportedGraphError: CAPTURE_FAILED, where transforms of ``torch.func`` remain.
    """
    for node in graph.nodes:
        if _is_transform(node):
            raise UnsupportedGraphError(
                Reason.CAPTURE_FAILED, "transforms of torch.func (vmap, grad) cannot be traced", node.name
            )


def _serves(node: Node, made_for_blocks: set[Node]) -> bool:
    """True for a call without readers that does something to tensors of the blocks alone, if at all."""
    if node in made_for_blocks or _is_transform(node):
        return True
    written: Any = node.args[0] if node.target is operator.setitem else None
    return written in made_for_blocks and written.target in FACTORIES


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _is_transform(node: Node) -> bool:
    return getattr(node.target, "__module__", None) == "torch._functorch.predispatch"

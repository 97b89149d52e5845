"""Attention that is not in canonical form, and why."""

from collections.abc import Iterator

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from vlcache_fx.analysis.attention.eager import eager_attention
from vlcache_fx.analysis.attention.scores import NonCanonicalAttentionError
from vlcache_fx.analysis.attention.sites import site_of

ATEN_KERNELS = ("_flash_attention", "_efficient_attention", "_cudnn_attention", "_scaled_dot_product_")
"""Prefixes of the names of ATen's attention kernels."""

FLEX = torch.ops.higher_order.flex_attention


def noncanonical_attention(graph: Graph) -> Iterator[tuple[Node, str]]:
    """Yield every attention that is not in canonical form, in graph order, with the reason."""
    for node in graph.nodes:
        if node.op != "call_function" or site_of(node) is not None:
            continue
        kernel = _kernel(node)
        if kernel is not None:
            yield (
                node,
                f"{kernel} is a fused kernel that takes no mask of rows: use sdpa or eager attention",
            )
        elif node.target is FLEX:
            yield node, "flex attention was not converted to a call with a mask"
        else:
            try:
                found = eager_attention(node)
            except NonCanonicalAttentionError as error:
                yield node, f"eager attention: {error}"
            else:
                if found is not None:
                    yield node, "eager attention that no pass has fused"


def _kernel(node: Node) -> str | None:
    """Return the name of a fused attention kernel: in its schema, query, key and value come first."""
    for target in (node.target, *node.args[:1]):  # functionalisation wraps an operator that writes
        if not isinstance(target, OpOverload):
            continue
        if target.namespace == "aten":
            return str(target) if target._opname.startswith(ATEN_KERNELS) else None
        leading = target._schema.arguments[:3]
        tensors = [argument.name for argument in leading if isinstance(argument.type, torch.TensorType)]
        is_ours = target.namespace == "vlcache"
        if not is_ours and len(tensors) == 3 and [name[0] for name in tensors] == ["q", "k", "v"]:
            return str(target)
    return None

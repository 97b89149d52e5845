"""Replace products and a softmax by one attention call."""

from typing import ClassVar

import torch
from torch.fx import Node

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis.attention.eager import EagerAttention, eager_attention
from vlcache_fx.analysis.attention.products import Operand
from vlcache_fx.analysis.attention.scores import NonCanonicalAttentionError
from vlcache_fx.analysis.attention.sites import ATTEND, SDPA
from vlcache_fx.ir.sizes import equal
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.utility.attention import views_to_reshapes
from vlcache_fx.passes.utility.insert import insert_call
from vlcache_fx.passes.utility.masks import Masks


class FuseAttention(Pass):
    """``softmax(query @ key.T * scale + mask) @ value`` becomes one call.

    The call is ``aten.scaled_dot_product_attention`` where possible, else ``vlcache.attend`` (capped scores,
    sinks, a mask or values of another dtype). Results agree within rounding, except for fully masked rows
    with the fill value -inf: zeros instead of NaN. An attention with other readers of its scores or
    probabilities is not changed.
    """

    name: ClassVar[str] = "fuse_attention"
    ensures: ClassVar[frozenset[str]] = frozenset({"attention_fused"})

    def run(self, program: Program) -> bool:
        """Replace every match of ``eager_attention``."""
        program.graph.eliminate_dead_code()  # dead readers do not count
        changed, masks = False, Masks(program)
        for node in list(program.graph.nodes):
            try:
                found = eager_attention(node)
            except NonCanonicalAttentionError:  # analysis refuses the graph if it matters
                continue
            if found is not None:
                _replace(program, found, masks)
                changed = True
        return changed


def _replace(program: Program, found: EagerAttention, masks: Masks) -> None:
    graph, node = program.graph, found.node
    with graph.inserting_before(node):
        operands = (found.query, found.key, found.value)
        query, key, value = (_inserted(program, operand, node) for operand in operands)
        mask = masks.joined(found.terms, query.meta["val"].dtype, found.rank, node)
        sinks = None if found.sinks is None else _inserted(program, found.sinks, node)
        gqa = not equal(found.query.shape[1], found.key.shape[1])
        dtypes = [operand.meta["val"].dtype for operand in (query, key, value, mask) if operand is not None]
        plain = sinks is None and found.softcap is None
        if plain and set(dtypes) <= {dtypes[0], torch.bool}:
            named = {"scale": found.scale, "enable_gqa": gqa}
            result = insert_call(graph, SDPA, query, key, value, mask, origin=node, **named)
        else:
            rest = (mask, sinks, False, found.scale, found.softcap, gqa)
            result = insert_call(graph, ATTEND, query, key, value, *rest, origin=node)
        for target, arguments in found.steps:
            result = insert_call(graph, target, result, *arguments, origin=node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    views_to_reshapes(result)


def _inserted(program: Program, operand: Operand, origin: Node) -> Node:
    node = operand.node
    for target, arguments in operand.steps:
        node = insert_call(program.graph, target, node, *arguments, origin=origin)
    return node

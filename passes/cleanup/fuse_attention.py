"""Make one attention call of products and a softmax."""

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
from vlcache_fx.passes.utility.attention import loosen_views
from vlcache_fx.passes.utility.insert import insert_call
from vlcache_fx.passes.utility.masks import Masks


class FuseAttention(Pass):
    """``softmax(query @ key.T * scale + mask) @ value`` becomes one call.

    ``aten.scaled_dot_product_attention`` where that expresses it, else ``vlcache.attend`` (capped scores,
    sinks, a mask or values of another dtype). Results agree within rounding; only a row that reads nothing,
    for which minus infinity makes the written form give NaN, gives zeros. An attention whose scores or
    probabilities are read by anything else stays as it is.
    """

    name: ClassVar[str] = "fuse_attention"
    ensures: ClassVar[frozenset[str]] = frozenset({"attention_fused"})

    def run(self, program: Program) -> bool:
        """Replace what ``eager_attention`` finds."""
        program.graph.eliminate_dead_code()  # a dead reader is none
        changed, masks = False, Masks(program)
        for node in list(program.graph.nodes):
            try:
                found = eager_attention(node)
            except NonCanonicalAttentionError:  # analysis says so, should it matter
                continue
            if found is not None:
                _replace(program, found, masks)
                changed = True
        return changed


def _replace(program: Program, found: EagerAttention, masks: Masks) -> None:
    graph, node = program.graph, found.node
    with graph.inserting_before(node):
        query, key, value = (_made(program, one, node) for one in (found.query, found.key, found.value))
        mask = masks.joined(found.terms, query.meta["val"].dtype, found.rank, node)
        sinks = None if found.sinks is None else _made(program, found.sinks, node)
        gqa = not equal(found.query.shape[1], found.key.shape[1])
        given = [one.meta["val"].dtype for one in (query, key, value, mask) if one is not None]
        plain = sinks is None and found.softcap is None
        if plain and set(given) <= {given[0], torch.bool}:
            named = {"scale": found.scale, "enable_gqa": gqa}
            result = insert_call(graph, SDPA, query, key, value, mask, origin=node, **named)
        else:
            rest = (mask, sinks, False, found.scale, found.softcap, gqa)
            result = insert_call(graph, ATTEND, query, key, value, *rest, origin=node)
        for target, arguments in found.steps:
            result = insert_call(graph, target, result, *arguments, origin=node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    loosen_views(result)


def _made(program: Program, operand: Operand, origin: Node) -> Node:
    node = operand.node
    for target, arguments in operand.steps:
        node = insert_call(program.graph, target, node, *arguments, origin=origin)
    return node

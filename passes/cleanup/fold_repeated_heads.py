"""Let attention calls read key and value heads unrepeated, with ``enable_gqa``."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.attention.sites import find_sites
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.nodes import COPIES, RESHAPES, packet_of
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.utility.attention import gqa_needs_math_kernel, update_call

aten = torch.ops.aten


class FoldRepeatedHeads(Pass):
    """Removes the repetition of key and value heads where only the attention call reads it.

    Query head h reads key head h // group in both cases, so this is exact. The warm program has keys and
    values of every token: repeated, they would be its largest tensors. Does nothing where ``enable_gqa`` is
    slower (CUDA with a mask).
    """

    name: ClassVar[str] = "fold_repeated_heads"
    requires: ClassVar[frozenset[str]] = frozenset({"attention_fused"})

    def run(self, program: Program) -> bool:
        """Fold where keys and values have the same number of repetitions."""
        changed = False
        for site in find_sites(program.graph):
            key, value = _before_repeat(site.key, site.node), _before_repeat(site.value, site.node)
            if key is None or value is None or shape_of(key)[1] != shape_of(value)[1]:
                continue
            if gqa_needs_math_kernel(site.node.target, value.meta["val"], site.mask):
                continue
            update_call(replace(site, key=key, value=value, enable_gqa=True))
            changed = True
        return changed


def _before_repeat(repeated: Node, reader: Node) -> Node | None:
    """Return the tensor [batch, heads, tokens, dim] whose heads ``repeated`` repeats for ``reader`` only.

    Matches ``repeat_interleave`` along the heads, and an expanded dimension after the heads that is flattened
    into them. None for other nodes.
    """
    if list(repeated.users) != [reader] or len(shape_of(repeated)) != 4:
        return None
    if repeated.target is aten.repeat_interleave.self_int:
        source, _, dim = (*repeated.args, None)[:3]
        return source if isinstance(source, Node) and dim in (1, -3) else None
    if packet_of(repeated) not in RESHAPES:
        return None
    expanded = _source(repeated, COPIES)
    if expanded is None or packet_of(expanded) is not aten.expand:
        return None
    widened = expanded.args[0]
    if not isinstance(widened, Node) or packet_of(widened) is not aten.unsqueeze:
        return None
    source, dim = widened.args[0], widened.args[1]
    assert isinstance(source, Node)
    before, between, after = shape_of(source), shape_of(expanded), shape_of(repeated)
    if len(before) != 4 or dim not in (2, -3) or not _is_joined(between, after):
        return None
    return source if between[1] == before[1] else None


def _source(node: Node, through: frozenset[object]) -> Node | None:
    source = node.args[0]
    while isinstance(source, Node) and packet_of(source) in through:
        source = source.args[0]
    return source if isinstance(source, Node) else None


def _is_joined(between: torch.Size, after: torch.Size) -> bool:
    """Return True for a view that flattens dims 1 and 2, of static sizes, and keeps all others."""
    if not all(isinstance(size, int) for size in (between[1], between[2], after[1])):
        return False
    kept = [str(size) for size in (between[0], *between[3:])] == [
        str(size) for size in (after[0], *after[2:])
    ]
    return kept and between[1] * between[2] == after[1]

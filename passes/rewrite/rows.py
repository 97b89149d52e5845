"""What the rewriting passes share: gathers, and one node restricted to a set of rows."""

from dataclasses import replace

import torch
from torch.fx import Node

from vlcache_fx.analysis import RowStep, Site
from vlcache_fx.analysis.sites import site_of
from vlcache_fx.passes.attention import write_site
from vlcache_fx.passes.base import Program

aten = torch.ops.aten


def gather(program: Program, operand: Node, dim: int, index: Node, before: Node, segment: str) -> Node:
    """``operand`` at the given rows of ``dim``, inserted before ``before``."""
    with program.graph.inserting_before(before):
        node = program.graph.call_function(aten.index_select.default, (operand, dim, index))
    node.meta.update(gathers=(operand, dim), segment=segment)
    return node


def restrict_node(program: Program, node: Node, step: RowStep, rows: Node, site: Site, segment: str) -> None:
    """Make ``node`` compute only ``rows``, whatever rows it was made for before.

    Its operands from the residual stream are expected to hold those rows already. Operands with a full token
    axis are gathered, a size argument that spells out the number of tokens becomes the number of rows, and an
    attention that masks later tokens by itself gets the mask rows of its queries.
    """
    for operand, dim in step.gathers:
        for current in node.all_input_nodes:
            if current is operand or current.meta.get("gathers") == (operand, dim):
                node.replace_input_with(current, gather(program, operand, dim, rows, node, segment))
    if step.size_argument is not None:
        _set_size(program, node, step.size_argument, rows, segment)
    if node is site.node and site.mask is None:
        _set_row_mask(program, site, rows, segment)


def _set_size(program: Program, node: Node, place: tuple[int, int], rows: Node, segment: str) -> None:
    argument, entry = place
    sizes = node.args[argument]
    assert isinstance(sizes, list | tuple)
    if sizes[entry] == -1:
        return
    with program.graph.inserting_before(node):
        count = program.graph.call_function(aten.sym_size.int, (rows, 0))
    count.meta["segment"] = segment
    node.update_arg(argument, [count if index == entry else size for index, size in enumerate(sizes)])


def _set_row_mask(program: Program, site: Site, rows: Node, segment: str) -> None:
    """``is_causal`` for a subset of queries: key position <= row position, bool [rows, tokens]."""
    graph = program.graph
    device = site.node.meta["val"].device
    with graph.inserting_before(site.node):
        count = graph.call_function(aten.sym_size.int, (site.node.args[1], site.node.meta["val"].dim() - 2))
        keys = graph.call_function(aten.arange.default, (count,), {"device": device})
        queries = graph.call_function(aten.unsqueeze.default, (rows, 1))
        mask = graph.call_function(aten.le.Tensor, (keys, queries))
    for made in (count, keys, queries, mask):
        made.meta["segment"] = segment
    now = site_of(site.node)  # its keys and values may have been spliced
    assert now is not None
    write_site(replace(now, mask=mask, is_causal=False))

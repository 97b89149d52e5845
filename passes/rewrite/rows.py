"""Helpers of rewriting passes: gathers of rows, and restriction of a node to rows."""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis import Site, TokenFlow
from vlcache_fx.analysis.attention.sites import site_of
from vlcache_fx.analysis.decoder.batch import operand_batch_dim
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.sizes import expressions, quotient
from vlcache_fx.passes.base import Program
from vlcache_fx.passes.utility.attention import update_call

aten = torch.ops.aten
SAMPLES = 0
"""Dimension of samples in the rows of convolutions and recurrences."""


def index_rows(program: Program, operand: Node, dim: int, index: Node) -> Node:
    """Gather rows of a convolution or recurrence, at the graph's insertion point; see ``gather``."""
    if program.is_batched:
        args = (operand, index, dim, SAMPLES)
        return program.graph.call_function(torch.ops.vlcache.take_rows.default, args)
    return program.graph.call_function(aten.index_select.default, (operand, dim, index))


def gather(
    program: Program,
    operand: Node,
    dim: int,
    index: Node,
    before: Node,
    segment: str,
    batch_dim: int | None = None,
) -> Node:
    """Insert a gather of rows of ``operand`` before the node ``before``.

    Args:
        program: the program.
        operand: a node of the residual stream, or an operand of such a node with all tokens.
        dim: token dim of ``operand``.
        index: rows, int64 [rows]; [batch, rows] where the program computes several samples.
        before: the node after the gather.
        segment: segment of the gather.
        batch_dim: batch dim of ``operand``, by default the one that analysis found. -n means that ``operand``
            lacks n leading dims.
    """
    dims = program.decoder.batch_dims
    with program.graph.inserting_before(before):
        if dims is None:
            node = program.graph.call_function(aten.index_select.default, (operand, dim, index))
        else:
            source = operand
            batch_dim = sample_dim(program, operand) if batch_dim is None else batch_dim
            missing = max(0, -batch_dim)
            for _ in range(missing):
                source = program.graph.call_function(aten.unsqueeze.default, (source, 0))
                source.meta["segment"] = segment
            node = program.graph.call_function(
                torch.ops.vlcache.take_rows.default, (source, index, dim + missing, batch_dim + missing)
            )
    node.meta.update(gathers=(operand, dim), segment=segment)
    return node


def sample_dim(program: Program, node: Node) -> int:
    """Return the batch dim of a node of the residual stream, or of a gather of such a node."""
    assert program.decoder.batch_dims is not None
    while "gathers" in node.meta:
        node = node.meta["gathers"][0]
    return program.decoder.batch_dims[node]


def restrict_node(
    program: Program, node: Node, flow: TokenFlow, rows: Node, site: Site | None, segment: str
) -> None:
    """Restrict ``node`` to ``rows``, also if it was restricted to other rows before.

    Its operands from the residual stream must have these rows already. Operands with all tokens are gathered,
    a size argument with the number of tokens becomes the number of rows, and an attention with ``is_causal``
    gets a mask for its rows.
    """
    dims = program.decoder.batch_dims
    for operand, dim in flow.gathers:
        batch_dim = None if dims is None else operand_batch_dim(node, operand, dims)
        for current in node.all_input_nodes:
            if current is operand or current.meta.get("gathers") == (operand, dim):
                taken = gather(program, operand, dim, rows, node, segment, batch_dim)
                node.replace_input_with(current, taken)
    if flow.size_argument is not None:
        _set_size(program, node, flow, rows, segment)
    if site is not None and node is site.node and site.mask is None:
        _set_row_mask(program, site, rows, segment)


def _set_size(program: Program, node: Node, flow: TokenFlow, rows: Node, segment: str) -> None:
    assert flow.size_argument is not None
    argument, entry = flow.size_argument
    sizes = node.args[argument]
    assert isinstance(sizes, list | tuple)
    if sizes[entry] == -1:
        return
    factor = flow.axis.entries.outer * flow.axis.entries.inner

    def call(target: Any, *args: Any) -> Node:
        made = program.graph.call_function(target, args)
        made.meta["segment"] = segment
        return made

    with program.graph.inserting_before(node):
        count = call(aten.sym_size.int, rows, int(program.is_batched))
        if not isinstance(factor, int):  # a symbolic number of samples is flattened with the rows
            start = program.decoder.stream.boundaries[0]
            factor = quotient(factor, *expressions(shape_of(start)[:1]))
            count = call(operator.mul, count, call(aten.sym_size.int, rows, 0))
        if factor != 1:
            count = call(operator.mul, count, factor)
    node.update_arg(argument, [count if index == entry else size for index, size in enumerate(sizes)])


def _set_row_mask(program: Program, site: Site, rows: Node, segment: str) -> None:
    """Replace ``is_causal`` by a mask for the rows: key position <= row position.

    The mask is bool [rows, tokens], or [batch, 1, rows, tokens] for several samples.
    """
    graph = program.graph
    device = site.node.meta["val"].device
    with graph.inserting_before(site.node):
        count = graph.call_function(aten.sym_size.int, (site.node.args[1], site.node.meta["val"].dim() - 2))
        keys = graph.call_function(aten.arange.default, (count,), {"device": device})
        queries = graph.call_function(aten.unsqueeze.default, (rows, -1 if program.is_batched else 1))
        made = [count, keys, queries]
        if program.is_batched:
            queries = graph.call_function(aten.unsqueeze.default, (queries, 1))
            made.append(queries)
        mask = graph.call_function(aten.le.Tensor, (keys, queries))
    for node in (*made, mask):
        node.meta["segment"] = segment
    current = site_of(site.node)  # its keys and values may be spliced by now
    assert current is not None
    update_call(replace(current, mask=mask, is_causal=False))

"""What the rewriting passes share: gathers, and one node restricted to a set of rows."""

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
from vlcache_fx.passes.utility.attention import write_site

aten = torch.ops.aten


def gather(
    program: Program,
    operand: Node,
    dim: int,
    index: Node,
    before: Node,
    segment: str,
    batch_dim: int | None = None,
) -> Node:
    """``operand`` at the given rows of ``dim``, inserted before ``before``.

    Args:
        program: what is rewritten.
        operand: of the stream, or an operand of it that runs over all tokens.
        dim: its dimension over tokens.
        index: rows, int64 [rows]; [batch, rows] where the program computes several samples.
        before: where the gather stands.
        segment: where it belongs.
        batch_dim: the operand's dimension over samples; by default what analysis found. A negative one says
            how many dimensions the operand lacks.
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
    """The dimension over samples of a node of the stream, or of a gather of one."""
    assert program.decoder.batch_dims is not None
    while "gathers" in node.meta:
        node = node.meta["gathers"][0]
    return program.decoder.batch_dims[node]


def restrict_node(
    program: Program, node: Node, flow: TokenFlow, rows: Node, site: Site, segment: str
) -> None:
    """Make ``node`` compute only ``rows``, whatever rows it was made for before.

    Its operands from the residual stream are expected to hold those rows already. Operands with a full token
    axis are gathered, a size argument that spells out the number of tokens becomes the number of rows, and an
    attention that masks later tokens by itself gets the mask rows of its queries.
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
    if node is site.node and site.mask is None:
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
        if not isinstance(factor, int):  # samples of an open number are merged with their rows
            start = program.decoder.stream.boundaries[0]
            factor = quotient(factor, *expressions(shape_of(start)[:1]))
            count = call(operator.mul, count, call(aten.sym_size.int, rows, 0))
        if factor != 1:
            count = call(operator.mul, count, factor)
    node.update_arg(argument, [count if index == entry else size for index, size in enumerate(sizes)])


def _set_row_mask(program: Program, site: Site, rows: Node, segment: str) -> None:
    """``is_causal`` for a subset of queries: key position <= row position, bool [rows, tokens].

    Of several samples [batch, 1, rows, tokens].
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
    for one in (*made, mask):
        one.meta["segment"] = segment
    now = site_of(site.node)  # its keys and values may have been spliced
    assert now is not None
    write_site(replace(now, mask=mask, is_causal=False))

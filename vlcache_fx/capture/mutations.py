"""Input mutations of traced code, as results of the functional graph.

A static KV cache is a mutated input. Its functionalised graph returns the whole new buffer; returning the
written rows alone avoids a copy of the buffer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Write
from vlcache_fx.ir.scatters import scattered_rows

aten = torch.ops.aten


def split_writes(graph: fx.Graph, targets: Sequence[Node]) -> tuple[Write, ...]:
    """Move the outputs for input mutations to the end of the outputs; return what is written where.

    Args:
        graph: functional, from ``aot_export_module``; changed in place.
        targets: the mutated inputs; their new values are the first outputs, in this order.

    Raises:
        UnsupportedGraphError: MUTATED_INPUTS, if a result is a view of a mutated input.
    """
    output = graph.output_node()
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    index = {node: number for number, node in enumerate(graph.find_nodes(op="placeholder"))}
    written = dict(zip(targets, returned, strict=False))
    results: list[Any] = list(returned[len(targets) :])
    alike = {target: _take_out(results, value) for target, value in written.items()}
    for result in results:
        if isinstance(result, Node) and _base(result) in {*written, *written.values()}:
            raise UnsupportedGraphError(
                Reason.MUTATED_INPUTS,
                "a result is a view of an input that the graph writes to",
                node=result.name,
            )
    writes = []
    for target, value in written.items():
        dim, outputs = _rows(target, value, written)
        if _base(outputs[0]) in written:
            raise UnsupportedGraphError(
                Reason.MUTATED_INPUTS,
                "a value written to one input is a view of another that is written to",
                node=value.name,
            )
        positions = len(results) + 1 if dim is not None else None
        writes.append(Write(index[target], len(results), dim, positions, alike[target]))
        results += outputs
    output.args = (tuple(results),)
    graph.eliminate_dead_code()
    return tuple(writes)


def _take_out(results: list[Any], value: Node) -> tuple[int, ...]:
    """Replace ``value`` by None in ``results``; return its indices there."""
    indices = tuple(index for index, result in enumerate(results) if result is value)
    for index in indices:
        results[index] = None
    return indices


def _rows(target: Node, value: Node, written: Mapping[Node, Node]) -> tuple[int | None, list[Node]]:
    """Return ``(dim, [rows, positions])`` where only rows of ``target`` change, else ``(None, [value])``.

    A view of an input that is written to is not returned: its memory may be overwritten before it is read.
    """
    if not value.args or value.args[0] is not target:
        return None, [value]
    if value.target is aten.copy.default:
        source = value.args[1]
        assert isinstance(source, Node)
        return None, [value if _base(source) in written else source]
    found = scattered_rows(value)
    if found is None:
        return None, [value]
    source, dim, positions = found
    return (
        (None, [value]) if {_base(source), _base(positions)} & written.keys() else (dim, [source, positions])
    )


def _base(node: Node) -> Node:
    """Return the node whose memory ``node`` is a view of."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], Node):
        returns = node.target._schema.returns
        if not (returns and returns[0].alias_info):
            break
        node = node.args[0]
    return node

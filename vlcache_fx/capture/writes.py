"""What traced code writes to its inputs, as results of the functional graph.

A key-value cache of fixed size is such an input. Functionalised, its graph gives the whole new buffer; to
return the rows that were written, and to write only those, spares a copy of the buffer.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.capture.captured import Write
from vlcache_fx.errors import Reason, UnsupportedGraphError

aten = torch.ops.aten
TO_THE_END = 2**63 - 1


def split_writes(graph: fx.Graph, targets: Sequence[Node]) -> tuple[Write, ...]:
    """Move what ``graph`` returns for inputs that it writes to behind its own results.

    Args:
        graph: functional, as ``aot_export_module`` gives it; changed in place.
        targets: the inputs whose values it returns first, in their order.

    Raises:
        UnsupportedGraphError: MUTATED_INPUTS, where a result is a part of an input that is written to.
    """
    output = graph.output_node()
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    index = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
    written = dict(zip(targets, returned, strict=False))
    results: list[Any] = list(returned[len(targets) :])
    alike = {target: _take_out(results, value) for target, value in written.items()}
    for result in results:
        if isinstance(result, Node) and _base(result) in {*written, *written.values()}:
            raise UnsupportedGraphError(
                Reason.MUTATED_INPUTS,
                "a result is a part of an input that the graph writes to",
                node=result.name,
            )
    writes = []
    for target, value in written.items():
        dim, returned_for_it = _rows(target, value, written)
        if _base(returned_for_it[0]) in written:
            raise UnsupportedGraphError(
                Reason.MUTATED_INPUTS,
                "what the graph writes to an input is a part of another one that it writes to",
                node=value.name,
            )
        places = len(results) + 1 if dim is not None else None
        writes.append(Write(index[target], len(results), dim, places, alike[target]))
        results += returned_for_it
    output.args = (tuple(results),)
    graph.eliminate_dead_code()
    return tuple(writes)


def _take_out(results: list[Any], value: Node) -> tuple[int, ...]:
    """The places at which ``value`` is returned, None from now on."""
    places = tuple(place for place, result in enumerate(results) if result is value)
    for place in places:
        results[place] = None
    return places


def deliver(
    writes: Sequence[Write], args: Sequence[Any], outputs: Sequence[Any], count: int
) -> Sequence[Any]:
    """Repeat the writes on the caller's tensors; the traced code's results.

    Args:
        writes: of the graph.
        args: what it was called with.
        outputs: what it gave.
        count: number of the traced code's results, the first of ``outputs``.
    """
    results = list(outputs[:count])
    with torch.no_grad():
        for write in writes:
            target, value = args[write.input], outputs[write.value]
            if value is None:
                pass  # written already
            elif write.dim is None or write.places is None:
                target.copy_(value)
            else:
                target[(*[slice(None)] * write.dim, outputs[write.places])] = value
            for place in write.results:
                results[place] = target
    return results


def _rows(target: Node, value: Node, written: Mapping[Node, Node]) -> tuple[int | None, list[Node]]:
    """``(dimension, [rows, places])`` where ``value`` is ``target`` but for some rows, else ``(None, [it])``.

    What lies in memory that is written to as well may be gone when its turn comes, so it is not returned.
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
    source, dim, places = found
    return (None, [value]) if {_base(source), _base(places)} & written.keys() else (dim, [source, places])


def scattered_rows(node: Node) -> tuple[Node, int, Node] | None:
    """``(rows, dimension, places)`` of a node that replaces rows of its first operand along one dimension.

    Places are int64 [rows], the dimension is one of the node's. None for any other node.
    """
    if node.target is aten.index_copy.default:
        _, dim, places, source = node.args
    elif node.target is aten.index_put.default and not any(node.args[3:]):
        indices, source = node.args[1:3]
        assert isinstance(indices, Sequence)
        dim, places = len(indices) - 1, indices[-1]
        if any(other is not None for other in indices[:-1]):
            return None
    else:
        return None
    assert isinstance(dim, int)
    if not isinstance(places, Node) or not isinstance(source, Node):
        return None
    rows, whole = source.meta["val"], node.meta["val"]
    if places.meta["val"].dim() != 1 or places.meta["val"].dtype != torch.int64:
        return None
    dim %= whole.dim()
    missing = ["1"] * (whole.dim() - rows.dim())  # leading dimensions of size 1 may be left out
    sizes = [*missing, *map(str, rows.shape)]
    same = [
        str(size) == own or at == dim for at, (size, own) in enumerate(zip(whole.shape, sizes, strict=True))
    ]
    return (source, dim, places) if all(same) else None  # else a value that is repeated


def settle_scatters(graph: fx.Graph) -> None:
    """Bring writes to parts of tensors to one form: consecutive rows become ``index_copy`` too.

    Functionalisation writes ``x[:, a:b] = y`` as slices, a copy and one ``slice_scatter`` per dimension.
    """
    if not any(node.target in (aten.slice_scatter.default, aten.copy.default) for node in graph.nodes):
        return
    for node in list(graph.nodes):
        replacement = None
        if node.target is aten.slice.Tensor and _keeps_everything(node.args[1:]):
            replacement = node.args[0]
        elif node.target is aten.slice_scatter.default:
            replacement = node.args[1] if _keeps_everything(node.args[2:]) else _as_index_copy(graph, node)
        elif node.target is aten.copy.default and node.args[0].op != "placeholder":
            old, new = (argument.meta["val"] for argument in node.args[:2])
            same = (old.dtype, old.device, str(old.shape)) == (new.dtype, new.device, str(new.shape))
            replacement = node.args[1] if same else None
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)


def _as_index_copy(graph: fx.Graph, node: Node) -> Node | None:
    """``slice_scatter`` as ``index_copy``; places depend on the slice and the target's size, not on what is
    written, which would have to be computed to know its size."""
    target, source = node.args[:2]
    dim, start, end, step = _slice_settings(node.args[2:])
    assert isinstance(source, Node)
    if step != 1:
        return None
    value, whole = source.meta["val"], node.meta["val"]
    dim %= value.dim()

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        made = graph.call_function(target, args, kwargs)
        args = fx.map_arg(args, lambda argument: argument.meta["val"])
        made.meta["val"] = target(*args, **kwargs)
        return made

    with graph.inserting_before(node), value.fake_mode:
        size: Any = (
            whole.shape[dim] if isinstance(whole.shape[dim], int) else call(aten.sym_size.int, target, dim)
        )
        first = 0 if start is None else _from_front(call, start, size)
        after = size if end in (None, TO_THE_END) else _from_front(call, end, size)
        count = _difference(call, after, first)
        if str(_known(count)) != str(value.shape[dim]):
            return None  # the slice is cut at the end of its tensor, or not known to be as long
        places = call(aten.arange.default, count, device=value.device)
        if first != 0:
            places = call(aten.add.Tensor, places, first)
        made = graph.call_function(aten.index_copy.default, (target, dim, places, source))
    made.meta.update(node.meta, val=whole)
    return made


def _from_front(call: Any, bound: Any, size: Any) -> Any:
    negative = isinstance(bound, int) and bound < 0
    return _difference(call, size, -bound) if negative else bound


def _difference(call: Any, left: Any, right: Any) -> Any:
    if right == 0 or (isinstance(left, int) and isinstance(right, int)):
        return left - right if right != 0 else left
    return call(operator.sub, left, right)


def _known(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size


def _keeps_everything(arguments: Sequence[Any]) -> bool:
    """True for ``(dim, 0, end, 1)`` of a slice over a whole dimension."""
    _, start, end, step = _slice_settings(arguments)
    return start in (None, 0) and (end is None or end == TO_THE_END) and bool(step == 1)


def _slice_settings(arguments: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """``(dim, start, end, step)``, those left out included."""
    defaults: list[Any] = [0, None, None, 1]
    dim, start, end, step = [*arguments, *defaults[len(arguments) :]]
    return dim, start, end, step


def _base(node: Node) -> Node:
    """The node whose memory the value of ``node`` lies in."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], Node):
        returns = node.target._schema.returns
        if not (returns and returns[0].alias_info):
            break
        node = node.args[0]
    return node


def overlapping(writes: Sequence[Write], args: Sequence[Any], data: Sequence[int]) -> bool:
    """True where an input that is written to shares memory with another of ``data``: the graph knows of none.

    Args:
        writes: of the graph.
        args: its inputs.
        data: indices of those that belong to the request.
    """
    written = {write.input for write in writes}
    ranges = sorted(
        (*_memory(args[index]), index in written) for index in data if isinstance(args[index], Tensor)
    )
    end, last_written = 0, False
    for first, after, is_written in ranges:
        if first < end and (is_written or last_written):
            return True
        if after > end:
            end, last_written = after, is_written
    return False


def _memory(value: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    first = value.data_ptr()
    return first, first + (last + 1) * value.element_size() if value.numel() else first

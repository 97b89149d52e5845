"""Rewrite deepstack additions at masked tokens as additions to all tokens."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.decoder.merge import SCATTER_ROWS
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.nodes import packet_of
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten


class DenseDeepstack(Pass):
    """``x[mask] = x[mask] + features`` becomes ``where(mask, x + scatter_rows(features, mask), x)``.

    The write is an ``index_put`` or a ``masked_scatter``.

    Deepstack features then enter the residual stream token by token, without a size that depends on data, and
    a single node maps features to rows.
    """

    name: ClassVar[str] = "dense_deepstack"

    def run(self, program: Program) -> bool:
        """Replace every write of a sum to the tokens from which it was read."""
        changed = False
        for node in list(program.graph.nodes):
            parts = _deepstack(node)
            if parts is None:
                continue
            stream, mask, read, features = parts
            call, values = program.graph.call_function, node.meta["val"]
            with program.graph.inserting_before(node):
                dense = call(SCATTER_ROWS, (features, mask))
                total = call(aten.add.Tensor, (stream, dense))
                rows = call(aten.unsqueeze.default, (mask, -1))
                result = call(aten.where.self, (rows, total, stream))
            with values.fake_mode:
                dense.meta["val"] = features.meta["val"].new_empty(values.shape)
                rows.meta["val"] = mask.meta["val"].unsqueeze(-1)
            total.meta["val"] = result.meta["val"] = values
            for made in (dense, total, rows, result):
                made.meta["stack_trace"] = node.meta.get("stack_trace")
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
            for reader in [user for user in read.users if user.target is aten.sym_size.int]:
                reader.replace_input_with(read, features)  # the number of rows is the same
            changed = True
        return changed


def _deepstack(node: Node) -> tuple[Node, Node, Node, Node] | None:
    """Match a write of ``read + features`` to ``x`` at ``mask``, with ``read = index(x, [mask])``.

    Returns:
        ``(x, mask, read, features)``, or None.
    """
    stream, mask, total = _write(node)
    if mask is None or not isinstance(stream, Node) or not isinstance(total, Node):
        return None
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    for read, features in (total.args, total.args[::-1]):
        if not isinstance(read, Node) or packet_of(read) is not aten.index or not isinstance(features, Node):
            continue
        given = only_mask(read.args[1])
        if read.args[0] is stream and given is not None and by_token(given) is by_token(mask):
            return (stream, given, read, features) if _fits(stream, features) else None
    return None


def _write(node: Node) -> tuple[object, Node | None, object]:
    """Match ``index_put(x, [mask], rows)`` or ``masked_scatter(x, mask [batch, tokens, 1], rows)``.

    Returns:
        ``(x, mask, rows)``; no mask if the node is no such write.
    """
    if packet_of(node) is aten.index_put:
        accumulates = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
        return node.args[0], None if accumulates else only_mask(node.args[1]), node.args[2]
    if packet_of(node) is not aten.masked_scatter:
        return None, None, None
    stream, mask, rows = node.args
    assert isinstance(mask, Node)
    while isinstance(rows, Node) and packet_of(rows) in (aten.view, aten.reshape):
        rows = rows.args[0]
    shape = shape_of(mask)
    return stream, mask if len(shape) == 3 and shape[-1] == 1 else None, rows


def by_token(mask: Node) -> Node:
    """Return the tensor of which ``mask`` is a view with or without a last dimension of size 1."""
    while True:
        source = mask.args[0] if mask.args else None
        if not isinstance(source, Node) or packet_of(mask) not in (aten.squeeze, aten.unsqueeze):
            return mask
        smaller, larger = sorted((shape_of(source), shape_of(mask)), key=len)
        if [str(size) for size in larger] != [*map(str, smaller), "1"]:
            return mask
        mask = source


def only_mask(indices: object) -> Node | None:
    """Return the mask [batch, tokens] of an index that is a mask and nothing else; else None."""
    given = indices if isinstance(indices, list | tuple) else ()
    if not given or not isinstance(given[0], Node) or any(index is not None for index in given[1:]):
        return None
    mask = given[0]
    return mask if mask.meta["val"].dtype == torch.bool and len(shape_of(mask)) == 2 else None


def _fits(stream: object, features: Node) -> bool:
    """Return True for features [rows, width] of the stream's width and dtype."""
    if not isinstance(stream, Node) or len(shape_of(stream)) != 3 or len(shape_of(features)) != 2:
        return False
    same_width = str(shape_of(stream)[-1]) == str(shape_of(features)[-1])
    return same_width and stream.meta["val"].dtype == features.meta["val"].dtype

"""What a graph returns of a layer's recurrences and convolutions, for calls that continue from it."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from vlcache_fx.analysis.recurrences import Convolution, Recurrence
from vlcache_fx.errors import Reason
from vlcache_fx.ir.dataflow import NodeSet, data_inputs
from vlcache_fx.ir.nodes import CASTS, COPIES, NO_BOUND, packet_of, slice_bounds
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.sizes import equal, expression

aten = torch.ops.aten


def check_states(
    states: NodeSet,
    convolutions: Sequence[Convolution],
    recurrences: Sequence[Recurrence],
    inside: NodeSet,
) -> None:
    """Check that states to return are those of recurrences, and the last few inputs of convolutions.

    Warm programs have these for all tokens, and of other rows the computed ones.

    Raises:
        UnsupportedGraphError: TOKEN_MIXING, otherwise.
    """
    sources = {convolution.source: convolution for convolution in convolutions}
    known = {recurrence.node for recurrence in recurrences}
    for node in states:
        for parent in data_inputs(node):
            if parent in sources:
                _check_memory(node, parent, sources[parent])
            elif parent in inside and parent not in states and parent not in known:
                raise refuse(Reason.TOKEN_MIXING, node, f"rows of {parent.name} are returned")


def _check_memory(reader: Node, source: Node, convolution: Convolution) -> None:
    """Check that ``reader`` keeps, of a convolution's inputs, the last ones alone.

    Args:
        reader: a node of the states.
        source: the inputs, in the layout of the convolution, possibly behind those of earlier calls.
        convolution: the convolution.
    """
    dim = convolution.dim
    if packet_of(reader) is aten.slice:
        given, start, end, step = slice_bounds(reader)
        if isinstance(start, Node):
            is_last = _replaces_earlier(reader, start, convolution)
        else:
            is_last = isinstance(start, int) and -convolution.width <= start < 0
        if given % (dim + 1) == dim and is_last and end in (None, NO_BOUND) and step == 1:
            return
    elif packet_of(reader) in COPIES | CASTS or _is_behind(source, reader, dim):
        readers = list(reader.users)
        for user in readers:
            _check_memory(user, reader, convolution)
        if readers:
            return
    raise refuse(Reason.TOKEN_MIXING, reader, "more inputs of the convolution than it reads")


def _replaces_earlier(reader: Node, start: Node, convolution: Convolution) -> bool:
    """Return True for a number of inputs that is no constant, but that of the earlier calls' inputs.

    A cache has it as an attribute. Each call is checked for more than the convolution reads
    (``DecoderSpec.most_inputs``).
    """
    if convolution.before is None or convolution.before.op != "placeholder":
        return False
    kept = reader.meta["val"].shape[convolution.dim]
    earlier = convolution.before.meta["val"].shape[convolution.dim]
    return equal(kept, -expression(start.meta["val"])) and equal(kept, earlier)


def _is_behind(source: Node, node: Node, dim: int) -> bool:
    """Return True if ``node`` joins earlier inputs and ``source``."""
    if packet_of(node) is not aten.cat:
        return False
    parts, *axis = node.args
    assert isinstance(parts, list | tuple)
    given = axis[0] if axis else 0
    return parts[-1] is source and list(parts).count(source) == 1 and given in (dim, -1)

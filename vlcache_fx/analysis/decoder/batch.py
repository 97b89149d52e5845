"""Batch dimensions of a decoder that computes several samples at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Node

from vlcache_fx.analysis.decoder.layers import LayerSplit
from vlcache_fx.analysis.decoder.outputs import TailRows
from vlcache_fx.analysis.decoder.rows import Carried
from vlcache_fx.analysis.decoder.stream import Stream
from vlcache_fx.analysis.tokens.axis import TokenAxis, TokenFlow, rank_of, shape_of
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir.refusal import refuse


def find_batch_dims(stream: Stream, layers: Sequence[LayerSplit], tail_rows: TailRows) -> dict[Node, int]:
    """Return the batch dimension of every node of the layers that has one.

    Samples are followed with the rules for tokens: a token-wise operator is sample-wise too.
    """
    axes = {stream.boundaries[0]: TokenAxis(0)}
    attended = {layer.site.node: layer.site.query for layer in layers if layer.site is not None}
    full = {node for layer in layers for node in layer.full_part}
    nodes = [node for members in stream.members for node in members if node not in full]
    for node in (*nodes, *tail_rows.flows):
        try:
            flow = TokenFlow(axes[attended[node]]) if node in attended else follow_tokens(node, axes)
        except (UnsupportedGraphError, KeyError):
            continue  # rows are not selected there, or ``check_batch_dims`` refuses
        axes[node] = flow.axis
    return {
        node: axis.token_dim
        for node, axis in axes.items()
        if axis.dim is not None and axis.entries.are_tokens
    }


def check_batch_dims(
    dims: Mapping[Node, int],
    layers: Sequence[LayerSplit],
    flows: Mapping[Node, TokenFlow],
    carried: Iterable[Carried],
) -> None:
    """Check that rows can be selected sample by sample wherever passes do.

    Raises:
        UnsupportedGraphError: BATCHED, otherwise.
    """
    needed = [node for layer in layers for node in (layer.key_frontier, layer.value_frontier) if node]
    needed += [layer.site.node for layer in layers if layer.site is not None]
    needed += [value.operand for value in carried]
    for layer in layers:
        needed += [convolution.node for convolution in layer.convolutions]
        needed += [recurrence.node for recurrence in layer.recurrences]
    for node in needed:
        if node not in dims:
            raise refuse(Reason.BATCHED, node, "it has no dimension over samples")
    for layer in layers:
        for convolution in layer.convolutions:
            if convolution.before is not None:
                raise refuse(
                    Reason.BATCHED,
                    convolution.node,
                    "inputs of earlier calls stand before rows of several prompts",
                )
    for node, flow in flows.items():
        for operand, dim in flow.gathers:
            if node not in dims or operand_batch_dim(node, operand, dims) == dim:
                shape = tuple(shape_of(operand))
                raise refuse(Reason.BATCHED, node, f"{operand.name} {shape} has no dimension over samples")


def operand_batch_dim(node: Node, operand: Node, dims: Mapping[Node, int]) -> int:
    """Return the dimension of an operand that meets the samples of ``node``; negative for none."""
    return dims[node] - (rank_of(node) - rank_of(operand))

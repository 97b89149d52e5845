"""Operators of a graph, besides attention, in which a token depends on earlier tokens.

Both carry a state from token to token: a recurrence a matrix per head, a convolution its last inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import getitem
from typing import TypeAlias

import torch
from torch.fx import Graph, Node

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis.attention.sites import Site
from vlcache_fx.analysis.tokens.axis import rank_of, shape_of
from vlcache_fx.errors import Reason
from vlcache_fx.ir.dataflow import NodeSet, data_users, reachable
from vlcache_fx.ir.refusal import refuse

RECUR = torch.ops.vlcache.recur.default
CONV = torch.ops.vlcache.causal_conv1d.default

NUM_OPERANDS = 5
"""Arguments of ``RECUR`` with a row per token: q, k, v, g, beta. The incoming state follows."""


@dataclass(frozen=True)
class Recurrence:
    """A call of ``vlcache.recur``.

    Attributes:
        node: the call.
        operands: q, k, v, g and possibly beta, each [batch, tokens, heads, ..].
        state: the state that earlier calls left, [batch, heads, key width, value width]; None for zeros.
    """

    node: Node
    operands: tuple[Node, ...]
    state: Node | None

    @property
    def sources(self) -> tuple[Node, ...]:
        """The operands with a row per token."""
        return self.operands

    @property
    def state_sizes(self) -> tuple[int, int, int]:
        """Heads, width of keys and width of values."""
        heads, value_width = shape_of(self.operands[2])[-2:]
        return int(heads), int(shape_of(self.operands[0])[-1]), int(value_width)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the state."""
        return torch.promote_types(self.operands[0].meta["val"].dtype, torch.float32)


@dataclass(frozen=True)
class Convolution:
    """A call of ``vlcache.causal_conv1d``.

    Attributes:
        node: the call.
        source: its input, [batch, channels, tokens].
        before: inputs of earlier calls, [batch, channels, n]; None for zeros.
        width: tokens that a result depends on, its own included.
    """

    node: Node
    source: Node
    before: Node | None
    width: int

    @property
    def sources(self) -> tuple[Node, ...]:
        """The operands with a row per token."""
        return (self.source,)

    @property
    def dim(self) -> int:
        """The token dimension of ``source``."""
        return rank_of(self.source) - 1


Mixer: TypeAlias = Site | Recurrence | Convolution
"""An operator that mixes tokens."""


def find_mixers(graph: Graph, sites: Iterable[Site], within: NodeSet | None) -> tuple[Mixer, ...]:
    """Return ``sites`` and the recurrences and convolutions among ``within``, in graph order.

    Raises:
        UnsupportedGraphError: TOKEN_MIXING, for a recurrence with jumps, records or padding of its own.
    """
    by_node: dict[Node, Mixer] = {site.node: site for site in sites}
    for node in graph.nodes:
        found = recurrence_of(node) or convolution_of(node)
        if found is not None and (within is None or node in within):
            if isinstance(found, Recurrence) and any(
                extra is not None for extra in node.args[NUM_OPERANDS + 1 :]
            ):
                raise refuse(
                    Reason.TOKEN_MIXING, node, "a recurrence with jumps, records or padding of its own"
                )
            by_node[node] = found
    return tuple(by_node[node] for node in graph.nodes if node in by_node)


def recurrence_of(node: Node) -> Recurrence | None:
    """Return the recurrence of ``node``; None for another operator."""
    if node.op != "call_function" or node.target is not RECUR:
        return None
    arguments = [*node.args, *[None] * (NUM_OPERANDS + 1 - len(node.args))]
    operands = [argument for argument in arguments[:NUM_OPERANDS] if isinstance(argument, Node)]
    state = arguments[NUM_OPERANDS]
    return Recurrence(node, tuple(operands), state if isinstance(state, Node) else None)


def convolution_of(node: Node) -> Convolution | None:
    """Return the convolution of ``node``; None for another operator."""
    if node.op != "call_function" or node.target is not CONV:
        return None
    source, weight = node.args[:2]
    before = node.args[3] if len(node.args) > 3 else None
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    return Convolution(node, source, before if isinstance(before, Node) else None, int(shape_of(weight)[-1]))


def is_state(node: Node) -> bool:
    """Return True for a result of a recurrence that has no row per token."""
    if node.target is not getitem or not isinstance(node.args[0], Node):
        return False
    return node.args[0].target is RECUR and bool(node.args[1] != 0)


def rows_after(node: Node) -> NodeSet:
    """Return ``node`` and all that is computed from its rows, not from its last state."""
    return reachable([node], lambda found: (user for user in data_users(found) if not is_state(user)))

"""Values of the request that stored rows depend on; each call's keys contain them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.decoder.facts import DecoderFacts
from vlcache_fx.analysis.decoder.lengths import Lengths
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.nodes import COPIES, VIEWS, packet_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Leaf:
    """A value of the request that stored rows depend on; each call's keys contain it.

    Attributes:
        node: an integer value computed from the request alone, or a float input.
        token_dim: dimension over the call's tokens, or over a cache's tokens followed by the call's; None if
            there is none or several match. Determined at compile time, never guessed from a request's sizes.
        batch_dim: dimension over samples; None for a single sample.
        is_index: values index a table, as token ids do; other integers are positions, and rows without
            positions depend on their differences alone.
        is_beside: layers read it besides the residual stream. Values that enter token embeddings alone are
            replaced at merged media tokens.
    """

    node: Node
    token_dim: int | None
    batch_dim: int | None
    is_index: bool
    is_beside: bool

    @property
    def kind(self) -> tuple[str, bool, bool, bool]:
        """Leaves of the same kind may have the same value."""
        value = self.node.meta.get("val")
        dtype = str(value.dtype) if isinstance(value, Tensor) else "number"
        return dtype, self.token_dim is not None, self.is_index, self.is_beside


class LeafFinder:
    """Finds the leaves of the computation of stored rows.

    Args:
        captured, facts: the graph and its facts.
        lengths: lengths of the graph's calls.

    Attributes:
        found: the leaves so far, in order.
    """

    def __init__(self, captured: Captured, facts: DecoderFacts, lengths: Lengths) -> None:
        self._facts, self._lengths = facts, lengths
        self._weights = set(captured.inputs_of(InputKind.WEIGHT))
        self._depends = _integer_values(captured)
        self.found: dict[Node, Leaf] = {}

    def is_leaf(self, node: Node) -> bool:
        """Return True for an input of the request, and for integers computed from such inputs alone."""
        if node.op == "placeholder":
            return node not in self._weights and node not in self._facts.past
        if node not in self._depends:
            return False
        # Samples and tokens share a dimension: the value before that view separates them.
        joined = packet_of(node) in COPIES | VIEWS and self._lengths.token_dim(node) is None
        return not joined and (self._depends[node] or self._lengths.has_number(node))

    def number(self, node: Node, *, is_beside: bool) -> int:
        """Return the index of a leaf in ``found``; a new leaf is appended with ``is_beside``."""
        if node not in self.found:
            token_dim = self._lengths.token_dim(node)
            batch_dim = self._lengths.batch_dim(node, token_dim)
            is_index = any(
                user.target is aten.embedding.default and user.args[1] is node for user in node.users
            )
            self.found[node] = Leaf(node, token_dim, batch_dim, is_index, is_beside)
        return list(self.found).index(node)


def _integer_values(captured: Captured) -> dict[Node, bool]:
    """Return integer nodes computed from integers alone; the value is True if they need the request."""
    kinds = dict(zip(captured.placeholders, captured.kinds, strict=True))
    found: dict[Node, bool] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op == "output" or not _is_integral(node.meta.get("val")):
            continue
        if node.op in ("placeholder", "get_attr"):
            found[node] = node.op == "placeholder" and kinds[node] is not InputKind.WEIGHT
        elif node.target is aten.sym_size.int:
            found[node] = True
        elif node.op == "call_function" and all(parent in found for parent in node.all_input_nodes):
            found[node] = any(found[parent] for parent in node.all_input_nodes)
    return found


def _is_integral(value: object) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, int | torch.SymInt | torch.SymBool)

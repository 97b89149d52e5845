"""Values of the request that stored rows depend on: keys hold them, call by call."""

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
    """A value of the request that stored rows depend on; keys hold what it is in each call.

    Attributes:
        node: of whole numbers, made of nothing but the request; or a float input.
        token_dim: the dimension that runs over the call's tokens, or over a cache's and then these; None
            where there is none, or more than one it could be. Known when the graph is compiled, never guessed
            from the sizes of a request.
        batch_dim: the dimension that runs over samples; None for a single sample.
        is_index: its values name rows of a table, as token ids do; otherwise whole numbers are positions,
            of which a row without positions sees the differences alone.
        is_beside: layers read it beside the residual stream. What only the token embeddings are made of is
            replaced where an item's features are merged.
    """

    node: Node
    token_dim: int | None
    batch_dim: int | None
    is_index: bool
    is_beside: bool

    @property
    def kind(self) -> tuple[str, bool, bool, bool]:
        """Leaves of one kind may have one value."""
        value = self.node.meta.get("val")
        dtype = str(value.dtype) if isinstance(value, Tensor) else "number"
        return dtype, self.token_dim is not None, self.is_index, self.is_beside


class LeafFinder:
    """Tells where the computation of stored rows ends at values of the request.

    Args:
        captured, facts: of the graph.
        lengths: of the graph's calls.

    Attributes:
        found: the leaves that were asked for, in order.
    """

    def __init__(self, captured: Captured, facts: DecoderFacts, lengths: Lengths) -> None:
        self._facts, self._lengths = facts, lengths
        self._weights = set(captured.inputs_of(InputKind.WEIGHT))
        self._depends = _made_of_whole_numbers(captured)
        self.found: dict[Node, Leaf] = {}

    def is_leaf(self, node: Node) -> bool:
        """True for an input of the request, and for whole numbers that are made of such inputs alone."""
        if node.op == "placeholder":
            return node not in self._weights and node not in self._facts.past
        if node not in self._depends:
            return False
        # Samples and tokens in one dimension: the value before they were joined says which token is which.
        joined = packet_of(node) in COPIES | VIEWS and self._lengths.token_dim(node) is None
        return not joined and (self._depends[node] or self._lengths.has_number(node))

    def number(self, node: Node, *, is_beside: bool) -> int:
        """The index of a leaf among those found; ``is_beside`` as in ``Leaf``, where it is new."""
        if node not in self.found:
            token_dim = self._lengths.token_dim(node)
            batch_dim = self._lengths.batch_dim(node, token_dim)
            is_index = any(
                user.target is aten.embedding.default and user.args[1] is node for user in node.users
            )
            self.found[node] = Leaf(node, token_dim, batch_dim, is_index, is_beside)
        return list(self.found).index(node)


def _made_of_whole_numbers(captured: Captured) -> dict[Node, bool]:
    """Tensors of whole numbers, and sizes, that no floating-point value enters: whether a request does."""
    kinds = dict(zip(captured.placeholders, captured.kinds, strict=True))
    found: dict[Node, bool] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op == "output" or not _is_whole(node.meta.get("val")):
            continue
        if node.op in ("placeholder", "get_attr"):
            found[node] = node.op == "placeholder" and kinds[node] is not InputKind.WEIGHT
        elif node.target is aten.sym_size.int:
            found[node] = True
        elif node.op == "call_function" and all(parent in found for parent in node.all_input_nodes):
            found[node] = any(found[parent] for parent in node.all_input_nodes)
    return found


def _is_whole(value: object) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, int | torch.SymInt | torch.SymBool)

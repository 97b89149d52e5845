"""What stored rows depend on: how they are computed, from which inputs and which weights.

A stored row may serve only where all of it is equal. The computation is written as a canonical digest, from
the graph's inputs to the stored rows: every operator, every constant, and the order of dataflow. Left out is
what changes no value, because a model's graphs differ in it: copies, chains of views, names, the order of
independent operators, and whether a length is a number or a symbol.

Three things are left out because their *values* are part of keys, call by call:

- whole numbers that are made of the request alone (positions, token ids): ``Leaf``;
- attention masks (``runtime.requests.masks``);
- what a merge puts in the place of token embeddings: spans and the bytes of their features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.analysis.attention.sites import Site, site_of
from vlcache_fx.analysis.decoder.facts import DecoderFacts
from vlcache_fx.analysis.decoder.layers import packet_of
from vlcache_fx.analysis.decoder.merge import MERGE_OPS
from vlcache_fx.analysis.tokens.axis import is_one, rank_of, shape_of
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.dataflow import carries_data
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.subgraph import attribute
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.spec.decoder import Digests

aten = torch.ops.aten

COPIES = frozenset({aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy})
CASTS = frozenset({aten.to, aten._to_copy, aten.type_as})
RESHAPES = frozenset(
    {aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten}
)
PERMUTES = frozenset({aten.transpose, aten.permute, aten.t, aten.numpy_T, aten.movedim, aten.swapaxes})
LAYOUTS = COPIES | RESHAPES | PERMUTES | {aten.expand}
SIZED = frozenset(
    {aten.full, aten.zeros, aten.ones, aten.empty, aten.new_full, aten.new_zeros, aten.new_ones, aten.arange}
    | {aten.new_empty, aten.repeat, aten.constant_pad_nd, aten.split, aten.split_with_sizes, aten.narrow}
)
"""Operators of which an argument may spell out a length."""

DROPOUTS = frozenset({aten.dropout, aten.alpha_dropout, aten.feature_dropout, aten.native_dropout})
WITHOUT_EFFECT = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"})
"""Keyword arguments that change no value."""

ANY = "*"
"""A length, in whatever way the graph spells it."""


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


@dataclass(frozen=True)
class Computation:
    """Everything that stored rows depend on beside masks and merged features.

    Attributes:
        digests: how they are computed, from token ids on, or from the embeddings that the graph is given.
        leaves: in the order in which ``digests.separate`` numbers them.
        weights: weights that ``facts.weights`` does not list: of token embeddings, of rotary tables.
    """

    digests: Digests
    leaves: tuple[Leaf, ...]
    weights: tuple[Node, ...]


def computation_of(captured: Captured, facts: DecoderFacts) -> Computation:
    """How the rows that ``facts`` stores are computed.

    Raises:
        UnsupportedGraphError: RANDOM, where they depend on random numbers.
    """
    beside = [*(one.node for one in facts.frontiers), facts.stream.boundaries[-1]]

    def write(writer: _Writer) -> str:
        rows = [writer.text(node) for node in beside]
        if not facts.merges:  # the embeddings are an input; keys hold their rows in another way
            return content_digest(rows)
        writer.uncut()
        return content_digest([*rows, writer.text(facts.stream.boundaries[0])])

    first, second = _Writer(captured, facts), _Writer(captured, facts, unifies=True)
    digests = Digests(write(first), write(second))
    return Computation(digests, tuple(first.leaves.values()), tuple(first.more_weights))


class _Writer:
    """Writes nodes as text, each from the texts of those that it reads.

    The token embeddings that enter the first layer are one word until ``uncut``: what lies before them is not
    read beside them.

    Args:
        captured, facts: of the graph.
        unifies: leaves of one kind are written alike.

    Attributes:
        leaves: those that were met, in order.
        more_weights: weights that were met and that ``facts.weights`` does not list, in order.
    """

    def __init__(self, captured: Captured, facts: DecoderFacts, *, unifies: bool = False) -> None:
        self._module, self._facts, self._unifies = captured.graph_module, facts, unifies
        self._start: Node | None = facts.stream.boundaries[0]
        self._texts: dict[Node, str] = {}
        self._weights = {node: index for index, node in enumerate(facts.weights)}
        self._is_weight = set(captured.inputs_of(InputKind.WEIGHT))
        self._additions = {one.node: index for index, one in enumerate(facts.additions)}
        self._own_rows = {
            move.node: move.own
            for pair in facts.caches
            for path in pair
            if path is not None
            for move in path.moves
        }
        batch, tokens = shape_of(facts.stream.boundaries[0])[:2]
        self._batch, self._tokens = batch, tokens
        past = [size for node in facts.past for size in _sizes_of(node)]
        self._joined = {str(length): length for length in (tokens + size for size in past)}.values()
        self._lengths = {1, *(size for size in (batch, tokens, batch * tokens) if isinstance(size, int))}
        self._depends = _made_of_whole_numbers(captured)
        self._request = self._depends.keys()
        self.leaves: dict[Node, Leaf] = {}
        self.more_weights: list[Node] = []

    def uncut(self) -> None:
        """From now on, what the token embeddings are made of is written too."""
        if self._start is not None:
            self._texts.pop(self._start, None)
        self._start = None

    def text(self, result: Node) -> str:
        """The digest of how ``result`` is computed."""
        stack = [result]
        while stack:
            node = stack[-1]
            if node in self._texts:
                stack.pop()
                continue
            waiting = [one for one in self._reads(node) if one not in self._texts]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                self._texts[node] = self._write(stack.pop())
        return self._texts[result]

    def _reads(self, node: Node) -> Sequence[Node]:
        """The nodes whose texts the text of ``node`` is made of, in order."""
        if (
            node is self._start
            or self._is_leaf(node)
            or node in self._additions
            or node.op != "call_function"
        ):
            return ()
        if node in self._own_rows:
            return (self._own_rows[node],)
        if node.target in MERGE_OPS:
            return (self._first(node),)
        site = site_of(node) if carries_data(node) else None
        if site is not None:
            return [one for one in (site.query, site.key, site.value, site.sinks) if one is not None]
        if packet_of(node) in LAYOUTS | CASTS:
            return (self._first(node),)
        sized = packet_of(node) in SIZED or packet_of(node) in (aten.slice, aten.select)
        return [
            one
            for one in node.all_input_nodes
            if carries_data(one) or not (sized and self._length(one) is not None)
        ]

    @staticmethod
    def _first(node: Node) -> Node:
        first = node.args[0]
        assert isinstance(first, Node)
        return first

    def _is_leaf(self, node: Node) -> bool:
        if node.op == "placeholder":
            return node not in self._is_weight and node not in self._facts.past
        if node not in self._request:
            return False
        # Samples and tokens in one dimension: the value before they were joined says which token is which.
        joined = packet_of(node) in LAYOUTS and self._token_dim(node) is None
        return not joined and (self._depends[node] or self._has_length(node))

    def _write(self, node: Node) -> str:
        if node is self._start:
            return "embeddings"
        if self._is_leaf(node):
            return self._leaf(node)
        if node in self._additions:
            return f"addition {self._additions[node]}"
        if node.op == "placeholder":
            return self._weight(node) if node in self._is_weight else f"past {self._form(node)}"
        if node.op == "get_attr":
            return self._constant(attribute(self._module, str(node.target)))
        if node in self._own_rows:
            return self._texts[self._own_rows[node]]
        if node.target in MERGE_OPS:
            # However many modalities are merged: which tokens they fill, and with what, is known by value.
            embeddings = self._first(node)
            text = self._texts[embeddings]
            return text if embeddings.target in MERGE_OPS else content_digest(["merged", text])
        site = site_of(node) if carries_data(node) else None
        return self._site(node, site) if site is not None else self._operator(node)

    def _leaf(self, node: Node) -> str:
        if node not in self.leaves:
            token_dim = self._token_dim(node)
            sizes = _sizes_of(node)
            self.leaves[node] = Leaf(
                node,
                token_dim,
                None if is_one(self._batch) else _batch_dim(_equal_to(self._batch, sizes), token_dim),
                any(user.target is aten.embedding.default and user.args[1] is node for user in node.users),
                self._start is not None,
            )
        leaf = self.leaves[node]
        number = "" if self._unifies else list(self.leaves).index(node)
        return f"leaf {number} {leaf.kind}"

    def _token_dim(self, node: Node) -> int | None:
        sizes = _sizes_of(node)
        found = _equal_to(self._tokens, sizes)
        # Or over the keys of a cache, those of this call last.
        return _only(found or [dim for length in self._joined for dim in _equal_to(length, sizes)])

    def _has_length(self, node: Node) -> bool:
        """True for a value over the call's tokens, in a graph of one length."""
        return any(size in self._lengths and not is_one(size) for size in _sizes_of(node))

    def _weight(self, node: Node) -> str:
        if node in self._weights:
            return f"weight {self._weights[node]}"
        if node not in self.more_weights:
            self.more_weights.append(node)
        return f"other weight {self.more_weights.index(node)}"

    @staticmethod
    def _constant(value: Any) -> str:
        if isinstance(value, fx.GraphModule):
            return content_digest([value.code, *(c for _, c in value.named_buffers())])
        return content_digest([value]) if isinstance(value, Tensor) else repr(value)

    def _site(self, node: Node, site: Site) -> str:
        if draws_numbers(node):
            raise refuse(Reason.RANDOM, node, "attention drops weights at random")
        width = shape_of(site.query)[-1]
        scale = site.scale
        if scale is None and isinstance(width, int):
            scale = 1 / math.sqrt(width)
        sinks = "" if site.sinks is None else self._texts[site.sinks]
        operands = [self._texts[one] for one in (site.query, site.key, site.value)]
        return content_digest(["attention", *operands, sinks, repr(scale), repr(site.softcap)])

    def _operator(self, node: Node) -> str:
        packet = packet_of(node)
        if packet in COPIES:
            return self._texts[self._first(node)]
        if draws_numbers(node):
            raise refuse(Reason.RANDOM, node, f"{node.target} draws random numbers")
        if packet in DROPOUTS:
            return self._texts[self._first(node)]
        if packet in CASTS:
            before, after = (one.meta["val"].dtype for one in (self._first(node), node))
            text = self._texts[self._first(node)]
            return text if before == after else content_digest(["cast", str(after), text])
        if packet in RESHAPES or packet is aten.expand:
            return self._view(node, "expand" if packet is aten.expand else "view")
        if packet in PERMUTES:
            return content_digest(["permute", _order(node), self._texts[self._first(node)]])
        if packet is aten.slice:
            return self._slice(node)
        return content_digest([str(node.target), self._form(node), self._arguments(node)])

    def _view(self, node: Node, kind: str) -> str:
        """A chain of views is what it gives in the end."""
        source = self._first(node)
        while kind == "view" and packet_of(source) in RESHAPES | COPIES and not self._is_leaf(source):
            source = self._first(source)
        shape = self._sizes(node)
        if shape == self._sizes(source):
            return self._texts[source]
        return content_digest([kind, shape, self._texts[source]])

    def _slice(self, node: Node) -> str:
        source = self._first(node)
        given: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
        dim, start, end, step = given
        size = shape_of(source)[dim]
        if isinstance(size, int) and isinstance(end, int) and end >= size:
            end = None
        if isinstance(end, int) and end >= 2**62:
            end = None
        bounds = [self._bound(one) for one in (start or 0, end)]
        if bounds == [0, None] and step == 1:
            return self._texts[source]
        place = dim % rank_of(source)
        return content_digest(["slice", place, repr(bounds), repr(step), self._texts[source]])

    def _bound(self, value: Any) -> Any:
        """A length as an argument spells it; another number that the request brings by its leaf."""
        if not isinstance(value, Node):
            return ANY if value in self._lengths and value != 1 else value
        return self._texts[value] if value in self._texts else self._length(value)

    def _length(self, node: Node) -> str | None:
        """A size that is made of the call's lengths alone; None for any other."""
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt):
            return None
        lengths: list[tuple[Any, str]] = [(self._tokens, "tokens"), (self._batch, "batch")]
        known = {one.node.expr: name for one, name in lengths if isinstance(one, torch.SymInt)}
        expression = size.node.expr
        if expression in known:
            return ANY
        if not expression.free_symbols or not expression.free_symbols <= known.keys():
            return None
        return str(expression.subs(known))

    def _sizes(self, node: Node) -> str:
        """What a shape says beside lengths. Leading ones are left out: samples and tokens may be joined."""
        sizes = [ANY if self._is_length(node, dim, size) else size for dim, size in enumerate(shape_of(node))]
        first = next((index for index, size in enumerate(sizes) if size != ANY), len(sizes))
        return str(sizes[first:])

    def _is_length(self, node: Node, dim: int, size: Any) -> bool:
        if not isinstance(size, int) or size == 1:
            return True
        step = self._facts.steps.get(node)
        if step is None or step.axis.dim is None:
            return size in self._lengths
        # In a graph of one length, a width may be as large; here it is known which is which.
        return dim in (step.axis.dim, (self._facts.batch_dims or {}).get(node))

    def _form(self, node: Node) -> str:
        """What results look like: tells operators apart whose sizes are spelled out in arguments."""
        value = node.meta.get("val")
        return f"{value.dtype} {self._sizes(node)}" if isinstance(value, Tensor) else type(value).__name__

    def _arguments(self, node: Node) -> str:
        sized = packet_of(node) in SIZED

        def form(value: Any) -> str:
            match value:
                case Node():
                    return str(self._bound(value))
                case list() | tuple():
                    return f"[{', '.join(map(form, value))}]"
                case bool() | float() | str() | None | torch.dtype():
                    return repr(value)
                case int():
                    return ANY if sized and value in self._lengths and value > 1 else repr(value)
                case slice():
                    return f"{form(value.start)}:{form(value.stop)}:{form(value.step)}"
                case torch.device() | torch.layout() | torch.memory_format():
                    return ""
            return repr(value)

        named = {key: form(value) for key, value in node.kwargs.items() if key not in WITHOUT_EFFECT}
        return f"{[form(one) for one in node.args]} {sorted(named.items())}"


def _made_of_whole_numbers(captured: Captured) -> dict[Node, bool]:
    """Tensors of whole numbers, and sizes, that no floating-point value enters: whether a request does."""
    kinds = dict(zip(captured.placeholders, captured.kinds, strict=True))
    found: dict[Node, bool] = {}
    for node in captured.graph_module.graph.nodes:
        value = node.meta.get("val")
        is_number = isinstance(value, int | torch.SymInt | torch.SymBool)
        if node.op == "output" or not (is_number or _is_whole_tensor(node)):
            continue
        if node.op in ("placeholder", "get_attr"):
            found[node] = node.op == "placeholder" and kinds[node] is not InputKind.WEIGHT
        elif node.target is aten.sym_size.int:
            found[node] = True
        elif node.op == "call_function" and all(parent in found for parent in node.all_input_nodes):
            found[node] = any(found[parent] for parent in node.all_input_nodes)
    return found


def _sizes_of(node: Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else []


def _is_whole_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _equal_to(length: Any, sizes: Sequence[Any]) -> list[int]:
    """The dimensions whose size is ``length``, as expressions: two lengths of one value are not the same."""
    return [dim for dim, size in enumerate(sizes) if str(size) == str(length)]


def _only(dims: Sequence[int]) -> int | None:
    return dims[0] if len(dims) == 1 else None


def _batch_dim(dims: Iterable[int], token_dim: int | None) -> int | None:
    """Samples are the dimension in front of the tokens (``[3, batch, tokens]``), or the first one."""
    found = [dim for dim in dims if dim != token_dim]
    if token_dim is not None and token_dim - 1 in found:
        return token_dim - 1
    return 0 if 0 in found else None


def _order(node: Node) -> str:
    """The order of dimensions that the node gives, counted from the first."""
    probe = torch.empty(tuple(range(2, 2 + rank_of(node))), device="meta")
    call: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    moved = call(probe, *node.args[1:], **node.kwargs)
    return str([size - 2 for size in moved.shape])


def draws_numbers(node: Node) -> bool:
    """True for a call whose result depends on random numbers."""
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    if packet_of(node) in DROPOUTS:
        rate, trains = (*node.args[1:], True)[:2]
        return bool(rate and trains)
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())

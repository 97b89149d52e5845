"""Cuts a flat program graph into its segments, so that equal layers become equal graphs.

Every node carries the name of its segment in `meta["segment"]`: "prelude", "layer.0", "layer.1", ...,
"tail". The cut is correct for any tags: a node runs in the segment that its tag names, or in a later one
where it needs a value of a later one (so a chain of segments is never cyclic). A node without a tag runs
where its last tensor input is computed, in the prelude if it has none.

Sizes never travel between segments where a tensor input tells them: each use is written anew as sizes of the
segment's own inputs, so that two layers have the same graph wherever the program happened to read the length.
Nor do vectors that are made of sizes alone, such as places of tokens: each segment counts for itself, and can
see that it is counting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from vlcache_fx.lowering.expressions import is_scalar
from vlcache_fx.lowering.values import ProgramValues, TensorMeta

__all__ = ["Segment", "outline"]

_SIZE_READERS = frozenset({
    torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default,
    torch.ops.aten.sym_storage_offset.default,
})  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """One part of a program.

    Attributes:
        name: its tag.
        module: the graph; takes `inputs` and returns the tuple of `outputs`.
        inputs: per placeholder the program node (a tensor) or the expression (an int that no tensor input
        tells).
        values: per placeholder its form or expression.
        outputs: the program nodes that other segments or the caller need.
    """

    name: str
    module: GraphModule
    inputs: tuple[Node | sympy.Expr, ...]
    values: tuple[Any, ...]
    outputs: tuple[Node, ...]


def outline(program: GraphModule, values: ProgramValues) -> list[Segment]:
    """Splits a program, in the order in which its segments run. Nodes that nothing needs are dropped.

    Args:
        program: functional graph, but for writes to inputs that nothing else reads; all tensor inputs
            placeholders or `get_attr` constants.
        values: of every node (`values.program_values`).

    Raises:
        ValueError: a size depends on tensor data in a way that cannot cross a segment.
    """
    live = _live(program.graph)
    vectors = _vectors_of_sizes(live, values)
    names = _order(node.meta["segment"] for node in live if "segment" in node.meta)
    rank: dict[Node, int] = {}
    members: dict[int, list[Node]] = {}
    for node in live:
        if node.op != "call_function" or node in vectors or is_scalar(values[node]):
            continue
        needed = max((rank[n] for n in _tensor_sources(node, values) if n in rank), default=0)
        wanted = names.get(node.meta.get("segment", ""), needed)
        source = node.args[0] if node.args else None
        # The parts of a tuple are taken out where the tuple is made: tuples do not cross segments.
        is_part = isinstance(source, Node) and isinstance(values[source], (tuple, list))
        rank[node] = needed if is_part else max(needed, wanted)
        members.setdefault(rank[node], []).append(node)

    wanted_later: set[Node] = set()
    for node in live:
        if not is_scalar(values[node]):
            wanted_later.update(
                n for n in _tensor_sources(node, values) if rank.get(n, rank.get(node)) != rank.get(node)
            )
    title = {index: name for name, index in names.items()}
    return [
        _Builder(program, values, members[index], vectors).build(title.get(index, "prelude"), wanted_later)
        for index in sorted(members)
    ]


def _live(graph: Graph) -> list[Node]:
    """The nodes that an output or a check of values needs, in order. Checks of metadata hold by
    construction."""
    roots = [n for n in graph.nodes if n.op == "output" or "_assert_async" in str(n.target)]
    seen: set[Node] = set()
    while roots:
        node = roots.pop()
        if node not in seen:
            seen.add(node)
            roots.extend(node.all_input_nodes)
    return [n for n in graph.nodes if n in seen]


def _order(tags: Iterable[str]) -> dict[str, int]:
    """Ranks the tags: the prelude, then families by first appearance and number, then the tail."""
    family: dict[str, int] = {}
    keys: dict[str, tuple[int, int, int]] = {}
    for tag in tags:
        stem, number = tag, 0
        if match := re.fullmatch(r"(.*?)[._]?(\d+)", tag):
            stem, number = match[1], int(match[2])
        place = {"prelude": 0, "tail": 2}.get(tag, 1)
        keys[tag] = (place, family.setdefault(stem, len(family)), number)
    keys.setdefault("prelude", (0, 0, 0))
    return {tag: index for index, tag in enumerate(sorted(keys, key=keys.__getitem__))}


def _vectors_of_sizes(live: Sequence[Node], values: ProgramValues) -> set[Node]:
    """The tensors that sizes and numbers tell, of one dimension at most (others being 1)."""
    found: set[Node] = set()
    returned = {used for node in live if node.op == "output" for used in node.all_input_nodes}
    for node in live:
        form = values[node]
        if node.op != "call_function" or not isinstance(form, TensorMeta) or node in returned:
            continue
        is_drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        is_vector = sum(size != 1 for size in form.sizes) <= 1
        if is_vector and not is_drawn and all(source in found for source in _tensor_sources(node, values)):
            found.add(node)
    return found


def _tensor_sources(node: Node, values: ProgramValues) -> list[Node]:
    """The tensor nodes that a node reads, not counting those of which only the size matters."""
    return [n for n in node.all_input_nodes if not is_scalar(values[n])]


class _Builder:
    """Builds the graph of one segment."""

    def __init__(
        self, program: GraphModule, values: ProgramValues, nodes: list[Node], vectors: set[Node]
    ) -> None:
        self.program, self.values, self.nodes, self.vectors = program, values, nodes, vectors
        self.root = torch.nn.Module()
        self.graph = Graph()
        self.tracer = GraphAppendingTracer(self.graph)
        self.local: dict[Node, Node] = {}
        self.inputs: list[Node | sympy.Expr] = []
        self.input_values: list[Any] = []
        self.input_nodes: list[Node] = []
        self.sizes: dict[sympy.Expr, tuple[int, int]] = {}
        self.known: dict[Any, Any] = {}

    def build(self, name: str, wanted_later: set[Node]) -> Segment:
        inside = set(self.nodes)
        for node in self.nodes:
            for used in node.all_input_nodes:
                if used not in inside and used not in self.vectors and not is_scalar(self.values[used]):
                    self._tensor_input(used)
        for node in self.nodes:
            args = map_arg(node.args, self._argument)
            kwargs = map_arg(node.kwargs, self._argument)
            self.local[node] = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        outputs = tuple(node for node in self.nodes if node in wanted_later)
        self.graph.output(tuple(self.local[node] for node in outputs))
        module = GraphModule(self.root, self.graph, class_name="Segment")
        return Segment(name, module, tuple(self.inputs), tuple(self.input_values), outputs)

    def _tensor_input(self, node: Node) -> None:
        if node in self.local:
            return
        value = self.values[node]
        if not isinstance(value, TensorMeta):
            if node.op == "get_attr":  # the body of a higher-order operator
                name = f"body_{len(list(self.root.children()))}"
                self.root.add_module(name, self.program.get_submodule(str(node.target)))
                self.local[node] = self.graph.get_attr(name)
            return
        self.local[node] = self._placeholder(node, value)
        for dim, size in enumerate(value.sizes):
            if not isinstance(size, int):
                self.sizes.setdefault(size, (len(self.inputs) - 1, dim))

    def _placeholder(self, source: Node | sympy.Expr, value: Any) -> Node:
        last = self.input_nodes[-1] if self.input_nodes else None
        with self.graph.inserting_after(last) if last else self.graph.inserting_before(self._first()):
            made = self.graph.placeholder(f"a{len(self.inputs)}")
        self.inputs.append(source)
        self.input_values.append(value)
        self.input_nodes.append(made)
        return made

    def _first(self) -> Node | None:
        return next(iter(self.graph.nodes), None)

    def _argument(self, node: Node) -> Any:
        if node in self.local:
            return self.local[node]
        value = self.values[node]
        if node in self.vectors:
            return self._copy(node)
        if not is_scalar(value):
            raise ValueError(f"{node.name!r} is neither a tensor nor a number")
        if isinstance(value, (bool, int, float)):
            return value
        return self._size(value, node) if isinstance(value, sympy.Expr) else self._copy(node)

    def _size(self, wanted: sympy.Expr, node: Node) -> Any:
        """Writes a size as sizes of the inputs; else computes it here; else takes it as an int input."""
        if wanted in self.known:
            return self.known[wanted].node
        if wanted in self.sizes:
            index, dim = self.sizes[wanted]
            made = self.graph.call_function(torch.ops.aten.sym_size.int, (self.input_nodes[index], dim))
        elif not isinstance(wanted, sympy.Symbol) and wanted.free_symbols <= self.sizes.keys():
            for symbol in sorted(wanted.free_symbols, key=str):
                self._size(symbol, node)
            made = sympy_interp(PythonReferenceAnalysis, self.known, wanted).node
        elif node.target in _SIZE_READERS and node.args[0] in self.local:
            return self._copy(node)
        else:
            made = self._placeholder(wanted, self.values[node])
        self.known[wanted] = Proxy(made, self.tracer)
        return made

    def _copy(self, node: Node) -> Node:
        """Repeats a computation on numbers inside this segment."""
        sources = _tensor_sources(node, self.values)
        if node.op != "call_function" or any(n not in self.local and n not in self.vectors for n in sources):
            raise ValueError(f"the number {node.name!r} depends on data of another segment")
        args, kwargs = map_arg(node.args, self._argument), map_arg(node.kwargs, self._argument)
        self.local[node] = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        return self.local[node]

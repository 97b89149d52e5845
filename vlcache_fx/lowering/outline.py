"""Cut a flat program graph into segments, so that equal layers become equal graphs.

``meta["segment"]`` of a node names its segment: "prelude", "layer.0", "layer.1", ..., "tail". The cut is
correct for any tags: a node runs in the segment of its tag, or in a later segment whose values it needs, so
segments never depend on each other in a cycle. A node without a tag runs in the segment of its last tensor
input, or in the prelude if it has none.

Sizes cross segments only where no tensor input has them. Each use is rewritten as a size of the segment's own
inputs, so two layers have equal graphs wherever the program reads the length. Vectors computed from sizes
alone, such as token positions, do not cross segments either: each segment computes its own ``arange``, which
lets its compiler recognise it.
"""

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

_SIZE_READERS = frozenset(
    {
        torch.ops.aten.sym_size.int,
        torch.ops.aten.sym_stride.int,
        torch.ops.aten.sym_numel.default,
        torch.ops.aten.sym_storage_offset.default,
    }
)


@dataclass(frozen=True)
class Segment:
    """A part of a program.

    Attributes:
        name: tag of its nodes.
        module: graph from ``inputs`` to the tuple of ``outputs``.
        inputs: per placeholder, the program node (a tensor) or the expression (an int that is no size of a
            tensor input).
        values: per placeholder, its ``TensorMeta`` or expression.
        outputs: program nodes that other segments or the caller read.
    """

    name: str
    module: GraphModule
    inputs: tuple[Node | sympy.Expr, ...]
    values: tuple[Any, ...]
    outputs: tuple[Node, ...]


def outline(program: GraphModule, values: ProgramValues) -> list[Segment]:
    """Split a program into segments, in the order of execution. Dead nodes are dropped.

    Args:
        program: a graph as in ``Lowering``; tensor inputs are placeholders or ``get_attr`` constants.
        values: values of its nodes (``values.program_values``).

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
        # Tuples do not cross segments, so getitem runs in the segment of the tuple.
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
    """Return the nodes that outputs and checks of values need, in order; checks of metadata are dropped."""
    roots = [n for n in graph.nodes if n.op == "output" or "_assert_async" in str(n.target)]
    seen: set[Node] = set()
    while roots:
        node = roots.pop()
        if node not in seen:
            seen.add(node)
            roots.extend(node.all_input_nodes)
    return [n for n in graph.nodes if n in seen]


def _order(tags: Iterable[str]) -> dict[str, int]:
    """Return the rank of each tag: prelude, then families by first appearance and number, then tail."""
    family: dict[str, int] = {}
    keys: dict[str, tuple[int, int, int]] = {}
    for tag in tags:
        stem, number = tag, 0
        if match := re.fullmatch(r"(.*?)[._]?(\d+)", tag):
            stem, number = match[1], int(match[2])
        part = {"prelude": 0, "tail": 2}.get(tag, 1)
        keys[tag] = (part, family.setdefault(stem, len(family)), number)
    keys.setdefault("prelude", (0, 0, 0))
    return {tag: index for index, tag in enumerate(sorted(keys, key=keys.__getitem__))}


def _vectors_of_sizes(live: Sequence[Node], values: ProgramValues) -> set[Node]:
    """Return the tensors that are computed from sizes and numbers, with at most one dimension above 1."""
    found: set[Node] = set()
    returned = {used for node in live if node.op == "output" for used in node.all_input_nodes}
    for node in live:
        meta = values[node]
        if node.op != "call_function" or not isinstance(meta, TensorMeta) or node in returned:
            continue
        is_drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        is_vector = sum(size != 1 for size in meta.sizes) <= 1
        if is_vector and not is_drawn and all(source in found for source in _tensor_sources(node, values)):
            found.add(node)
    return found


def _tensor_sources(node: Node, values: ProgramValues) -> list[Node]:
    """Return the tensor nodes that a node reads."""
    return [n for n in node.all_input_nodes if not is_scalar(values[n])]


class _Builder:
    """Builder of a segment's graph."""

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
        """Express a size by sizes of the inputs; else compute it in the segment; else add an int input."""
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
        """Repeat a computation of a number or vector in this segment."""
        sources = _tensor_sources(node, self.values)
        if node.op != "call_function" or any(n not in self.local and n not in self.vectors for n in sources):
            raise ValueError(f"the number {node.name!r} depends on data of another segment")
        args, kwargs = map_arg(node.args, self._argument), map_arg(node.kwargs, self._argument)
        self.local[node] = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        return self.local[node]

"""One layer's graph before and after the passes, as a diff on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.layer_graph import LayerGraph, NodeLine
from vlcache_fx.explaining.graph_view import MARKS, layer_title, lines_of, short_source

STYLES = {"-": "red", "+": "green", " ": ""}
MARK_STYLES = {
    "frontier": "yellow reverse",
    "lookup": "cyan reverse",
    "rows": "red reverse",
    "attention": "blue reverse",
    "recurrent": "magenta reverse",
}


def layer_text(graph: GraphExplanation) -> RenderableType:
    """Return the diff of a graph's layer for ``rich``; empty without one.

    A line begins with ``-`` where it is in the captured graph alone, with ``+`` where it is in the warm
    program alone.
    """
    return Group() if graph.layer is None else Group(*_parts(graph, graph.layer))


def _parts(graph: GraphExplanation, layer: LayerGraph) -> Iterator[RenderableType]:
    title, sizes = layer_title(graph, layer)
    yield Text(f"\n{title}", "bold")
    yield Text(f"- captured, + warm program: {sizes}", "dim")
    marks = {mark for line in (*layer.before, *layer.after) for mark in line.marks}
    for name, meaning in MARKS.items():
        if name in marks:
            yield Text.assemble(_mark(name), meaning)
    source = ""
    for sign, line in lines_of(layer):
        if line.source and line.source != source:
            source = line.source
            yield Text(f"# {short_source(source)}", "dim")
        yield _line(sign, line)


def _line(sign: str, line: NodeLine) -> Text:
    shape = f" [{line.shape}]" if line.shape else ""
    text = Text(f"{sign} ", STYLES[sign])
    for mark in line.marks:
        text.append_text(_mark(mark))
    text.append(f"{line.name} = {line.text}", STYLES[sign])
    return text.append(shape, "dim")


def _mark(name: str) -> Text:
    return Text.assemble((f"[{name}]", MARK_STYLES[name]), " ")

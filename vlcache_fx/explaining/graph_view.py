"""One layer's graph before and after the passes: its lines, and side by side in HTML."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape

from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.layer_graph import LayerGraph, NodeLine

Pair = tuple[NodeLine | None, NodeLine | None]

MARKS = {
    "frontier": "rows are stored",
    "lookup": "stored rows enter",
    "rows": "active rows are gathered",
    "attention": "attention",
    "recurrent": "recurrent",
}


def pairs(layer: LayerGraph) -> Iterator[Pair]:
    """Yield the nodes before and after in one order; None where there is no counterpart."""
    before, after = layer.before, layer.after
    matcher = difflib.SequenceMatcher(
        None, [line.name for line in before], [line.name for line in after], False
    )
    for _, first, last, start, end in matcher.get_opcodes():
        if [line.name for line in before[first:last]] == [line.name for line in after[start:end]]:
            yield from zip(before[first:last], after[start:end], strict=True)
        else:
            yield from ((line, None) for line in before[first:last])
            yield from ((None, line) for line in after[start:end])


def lines_of(layer: LayerGraph) -> Iterator[tuple[str, NodeLine]]:
    """Yield the nodes as lines of a diff, each with its sign: ``-``, ``+``, or a blank for equal ones."""
    for before, after in pairs(layer):
        if before is not None and after is not None and before.text == after.text:
            yield " ", replace(before, marks=tuple(dict.fromkeys((*before.marks, *after.marks))))
            continue
        if before is not None:
            yield "-", before
        if after is not None:
            yield "+", after


def layer_title(graph: GraphExplanation, layer: LayerGraph) -> tuple[str, str]:
    """Return the title of a graph's layer, and its numbers of nodes in words."""
    same = (
        f"; {layer.repeats} of {graph.num_layers} layers have the same operators" if layer.repeats > 1 else ""
    )
    sizes = f"{len(layer.before)} nodes captured, {len(layer.after)} in the warm program{same}"
    return f"Layer {layer.index}, before and after the passes", sizes


def layer_section(graph: GraphExplanation) -> str:
    """Return the section of a graph's layer; empty without one."""
    layer = graph.layer
    if layer is None:
        return ""
    marks = {mark for line in (*layer.before, *layer.after) for mark in line.marks}
    legend = "".join(f"<li>{_mark(name)}{text}</li>" for name, text in MARKS.items() if name in marks)
    rows = "".join(_rows(list(pairs(layer))))
    title, sizes = layer_title(graph, layer)
    return (
        f"<h2>{title}</h2>"
        f'<p class="muted">{sizes}.</p>'
        f'<ul class="legend">{legend}</ul><div class="diff">'
        f'<div class="row head"><div>captured</div><div>warm program</div></div>{rows}</div>'
    )


def _rows(found: Sequence[Pair]) -> Iterator[str]:
    source = ""
    for before, after in found:
        line = before or after
        assert line is not None  # one of the two is there
        if line.source and line.source != source:
            source = line.source
            yield f'<div class="src">{escape(short_source(source))}</div>'
        kind = "del" if after is None else "add" if before is None else "same"
        if before is not None and after is not None and before.text != after.text:
            kind = "chg"
        yield f'<div class="row {kind}"><div>{_cell(before)}</div><div>{_cell(after)}</div></div>'


def _cell(line: NodeLine | None) -> str:
    if line is None:
        return ""
    shape = f" <em>[{escape(line.shape)}]</em>" if line.shape else ""
    return f"{''.join(map(_mark, line.marks))}{escape(line.name)} = {escape(line.text)}{shape}"


def _mark(name: str) -> str:
    return f'<span class="mark m-{escape(name)}">{escape(name)}</span>'


def short_source(source: str) -> str:
    """Return ``file.py:3 in forward: code`` for ``"file.py", line 3, in forward: code``."""
    return source.replace('", line ', ":", 1).replace('"', "", 1).replace(", in ", " in ", 1)

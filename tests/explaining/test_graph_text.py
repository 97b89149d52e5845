"""One layer's graph on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.layer_graph import LayerGraph, NodeLine
from vlcache_fx.explaining import Explanation

SOURCE = '"model.py", line 3, in forward: k = self.key(x)'
LAYER = LayerGraph(
    1,
    1,
    before=(
        NodeLine("k", "aten.linear(x, [w])", "1 x s27", SOURCE, ("frontier",)),
        NodeLine("y", "aten.add(k, k)", "", SOURCE),
    ),
    after=(
        NodeLine("k", "aten.linear(x, [w])", "", SOURCE, ("frontier",)),
        NodeLine("splice", "vlcache.splice_rows(donor, k)", "", "", ("lookup",)),
        NodeLine("y", "aten.add(splice, splice)", "", SOURCE),
    ),
)


def shown(explanation: Explanation) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(explanation.layers())
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_diff_with_source_lines_and_marks() -> None:
    assert shown(Explanation((GraphExplanation("decoder", num_layers=8, layer=LAYER),))) == [
        "",
        "Layer 1, before and after the passes",
        "- captured, + warm program: 2 nodes captured, 3 in the warm program",
        "[frontier] rows are stored",
        "[lookup] stored rows enter",
        "# model.py:3 in forward: k = self.key(x)",
        "  [frontier] k = aten.linear(x, [w]) [1 x s27]",
        "+ [lookup] splice = vlcache.splice_rows(donor, k)",
        "- y = aten.add(k, k)",
        "+ y = aten.add(splice, splice)",
    ]


def test_graphs_without_a_layer_show_nothing() -> None:
    assert shown(Explanation((GraphExplanation("encoder"),))) == []

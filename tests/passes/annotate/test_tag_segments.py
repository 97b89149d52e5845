"""``tag_segments``: every node has a segment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import PassError
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.annotate import TagSegments
from vlcache_fx.passes.standard import WARM, warm_program

from ..programs import bare, everything, nothing_stored, prepared, run, small, text


def test_graph(golden: Callable[[str, str], None]) -> None:
    program = prepared(small(num_layers=2, rope="none", explicit_mask=True)[0])
    before = text(program.graph)
    TagSegments().run(program)
    assert text(program.graph) == before
    tags = [
        f"{node.meta['segment']:8} {node.name} = {node.target}"
        for node in program.graph.nodes
        if "segment" in node.meta
    ]
    golden("tag_segments", "\n".join(tags))


def test_numbers() -> None:
    captured, graph, want = small(num_layers=2)
    program = warm_program(captured)
    results = run(program, graph.calls[0], everything(captured), nothing_stored(program))
    torch.testing.assert_close(results[0], want, atol=1e-5, rtol=1e-5)
    untagged = [
        node.name
        for node in program.graph.nodes
        if node.op not in ("placeholder", "output", "get_attr") and "segment" not in node.meta
    ]
    assert untagged == []


@pytest.mark.parametrize("explicit_mask", [True, False])
def test_equal_layers_equal_segments(explicit_mask: bool) -> None:
    """Lowerings then compile only one of them."""
    program = warm_program(small(num_layers=3, explicit_mask=explicit_mask)[0])

    def targets(segment: str) -> Counter[str]:
        return Counter(str(n.target) for n in program.graph.nodes if n.meta.get("segment") == segment)

    assert targets("layer.0") == targets("layer.1")


def test_segments_in_order() -> None:
    """No segment reads values of a later segment."""
    program = warm_program(small(num_layers=2)[0])
    order = ["prelude", "layer.0", "layer.1", "tail"]
    for node in program.graph.nodes:
        if "segment" in node.meta:
            for parent in node.all_input_nodes:
                if "segment" in parent.meta:
                    assert order.index(parent.meta["segment"]) <= order.index(node.meta["segment"]), node


def test_keeps_existing_tags() -> None:
    program = prepared(small()[0])
    node = program.decoder.layers[0].site.node
    node.meta["segment"] = "mine"
    TagSegments().run(program)
    assert node.meta["segment"] == "mine"


def test_requires_facts() -> None:
    with pytest.raises(PassError, match=r"tag_segments.*requires facts"):
        Pipeline((TagSegments(),)).run(bare(small()[0]))
    assert "tag_segments" in [step.name for step in WARM.passes]

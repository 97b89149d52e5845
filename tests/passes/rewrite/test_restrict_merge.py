"""``restrict_merge``: encoder features are merged into the active rows only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.lowering.values import program_values
from vlcache_fx.passes.rewrite import (
    RestrictMerge,
    RestrictRows,
    TrimTail,
)
from vlcache_fx.passes.standard import warm_program
from vlcache_fx.spec.slots import Residual
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..programs import (
    LENGTH,
    LOOKUPS,
    PassCase,
    results_without_and_with,
    small,
    unchanged,
)

CASE = PassCase(RestrictMerge(), (*LOOKUPS, RestrictRows()), (TrimTail(),))
MERGE = torch.ops.aten.masked_scatter.default


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("restrict_merge", CASE.shown(small(rope="none")[0]))


def test_all_rows_equal_model() -> None:
    captured, graph, want = small()
    program = CASE.program(captured)
    assert not program.graph.find_nodes(op="call_function", target=MERGE)
    CASE.check_all_rows(captured, graph, want)


@pytest.mark.parametrize("offsets", [(), (0,), (0, 2), (1, 3, 4)], ids=str)
def test_some_rows_equal_unrestricted_merge(offsets: tuple[int, ...]) -> None:
    """Bitwise equal to the merge over all tokens, for two images with text between them."""
    call = tiny_vlm_inputs(3, 2, [(LENGTH, 0), (4, 1)])
    captured, graph = captured_graph(tiny_vlm(num_layers=1), call)
    tokens = call["input_ids"].shape[1]
    results = results_without_and_with(CASE, captured, graph.calls[0], offsets, tokens)
    assert torch.equal(*results)


def test_keeps_merge_with_other_reader() -> None:
    program = CASE.before(small()[0])
    (merge,) = program.graph.find_nodes(op="call_function", target=MERGE)
    program.add_outputs([(Residual(), merge)])
    assert unchanged(RestrictMerge(), program)


def test_declares_width_of_features() -> None:
    """If all sizes are symbolic, the trace does not know the width of the features."""
    ids = tiny_vlm_inputs(3, 2, [(LENGTH, 0)])["input_ids"]
    call = {"input_ids": ids, "features": torch.randn(LENGTH, 16)}
    captured, _ = captured_graph(tiny_vlm(num_layers=1), call, dynamic=True)
    (features,) = [node for node in captured.placeholders if node.users and any(
        user.target is MERGE and node is user.args[2] for user in node.users
    )]  # fmt: skip
    assert not isinstance(features.meta["val"].shape[-1], int)
    program = warm_program(captured).graph_module
    assert not program.graph.find_nodes(op="call_function", target=MERGE)
    assert program_values(program)

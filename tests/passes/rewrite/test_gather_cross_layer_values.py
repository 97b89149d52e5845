"""``gather_cross_layer_values``: values of earlier layers are gathered at the rows of the reading layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import PassError
from vlcache_fx.ir import Captured
from vlcache_fx.passes import Pipeline, Program
from vlcache_fx.passes.rewrite import (
    GatherCrossLayerValues,
    KvOnlyRows,
    RestrictRows,
    TrimTail,
)
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.types import Span
from vlcache_fx.spec.slots import Positions
from vlcache_fx.testing.graphs import TracedGraph, captured_graph

from ...models import wired
from ..programs import (
    BOTH,
    LENGTH,
    LOOKUPS,
    PROMPT,
    START,
    TOKENS,
    PassCase,
    Rows,
    own_donors,
    plan_for,
    plan_for_both,
    prepared,
    run,
    small,
    unchanged,
)

CASE = PassCase(GatherCrossLayerValues(), (*LOOKUPS, RestrictRows(), KvOnlyRows()), (TrimTail(),))
SHRINKING = Rows(((0, 1, 3), (1, 3), (3,)))
"""Other rows at every level, so that a gather with the positions of a wrong level fails."""


@functools.cache
def captured_wired(
    kind: str, samples: int = 1, last_only: bool = True
) -> tuple[Captured, TracedGraph, Tensor]:
    model, call = wired(kind, last_only=last_only), PROMPT if samples == 1 else BOTH
    captured, graph = captured_graph(model, call)
    with torch.no_grad():
        return captured, graph, model(**call)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("gather_cross_layer_values", CASE.change(captured_wired("side")[0]))


def test_graph_of_two_samples(golden: Callable[[str, str], None]) -> None:
    golden("gather_cross_layer_values_two_samples", CASE.change(captured_wired("side", 2)[0]))


@pytest.mark.parametrize("kind", ["side", "skip"])
@pytest.mark.parametrize("last_only", [True, False])
def test_all_rows_equal_model(kind: str, last_only: bool) -> None:
    CASE.check_all_rows(*captured_wired(kind, last_only=last_only))


@pytest.mark.parametrize("kind", ["side", "skip", "shared", "shared values", "residual values"])
def test_some_rows_with_own_donors_equal_model(kind: str) -> None:
    captured, graph, want = captured_wired(kind)
    program = warm_program(captured)
    plan = plan_for(program, TOKENS, [Span(0, START, LENGTH, "key", True)], SHRINKING)
    assert plan.rows_per_layer == (8, 7, 6, 2)
    close(run(program, graph.calls[0], plan, own_donors(captured, graph.calls[0], [START]))[0], want)


@pytest.mark.parametrize("kind", ["side", "skip", "shared values"])
def test_samples_carry_rows_of_their_own(kind: str) -> None:
    captured, graph, want = captured_wired(kind, 2)
    program = warm_program(captured)
    plan = plan_for_both(program, SHRINKING, Rows(((2,), (2,), ())))
    assert plan.rows_per_layer == (8, 7, 6, 2)
    close(run(program, graph.calls[0], plan, own_donors(captured, graph.calls[0]))[0], want)


@pytest.mark.parametrize("kind", ["side", "skip"])
def test_cold_program_gathers_rows_of_results(kind: str) -> None:
    captured, graph, want = captured_wired(kind)
    program = cold_program(captured)
    close(run(program, graph.calls[0], plan_for(program, TOKENS, [], Rows(())))[0], want)


def gathers(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if "gathers" in node.meta]


def test_gathers_per_reader() -> None:
    program = CASE.before(captured_wired("side")[0])
    before = set(gathers(program))
    assert GatherCrossLayerValues().run(program)
    carried = [node for node in gathers(program) if node not in before]
    assert [node.meta["segment"] for node in carried] == ["layer.1", "layer.2"]
    assert [node.args[2] for node in carried] == [
        program.slots[Positions(1, 2)],
        program.slots[Positions(1, 3)],
    ]


def test_keeps_graph_without_cross_layer_values() -> None:
    assert CASE.leaves_alone(small()[0])
    assert CASE.leaves_alone(captured_wired("shared")[0])


def test_keeps_levels_with_all_rows() -> None:
    program = prepared(captured_wired("side", last_only=False)[0], RestrictRows(), KvOnlyRows(), warm=False)
    assert program.decoder.carried
    assert unchanged(GatherCrossLayerValues(), program)


def test_requires_rows_restricted() -> None:
    with pytest.raises(PassError, match=r"gather_cross_layer_values.*requires kv_only, rows_restricted"):
        Pipeline((GatherCrossLayerValues(),)).run(prepared(small()[0]))

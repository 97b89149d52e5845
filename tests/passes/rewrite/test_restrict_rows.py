"""``restrict_rows``: each layer computes its active rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.passes.rewrite import RestrictRows, TrimTail
from vlcache_fx.plan.types import Span

from ..programs import (
    LENGTH,
    LOOKUPS,
    START,
    TOKENS,
    PassCase,
    Rows,
    bind_plan,
    nothing_stored,
    own_donors,
    plan_for,
    plan_for_both,
    prepared,
    run,
    small,
    two_samples,
    unchanged,
)

CASE = PassCase(RestrictRows(), LOOKUPS, (TrimTail(),))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("restrict_rows", CASE.shown(small()[0]))


def test_graph_with_explicit_mask(golden: Callable[[str, str], None]) -> None:
    golden("restrict_rows_explicit_mask", CASE.shown(small(explicit_mask=True, rope="none")[0]))


@pytest.mark.parametrize(
    "options",
    [{}, {"explicit_mask": True}, {"num_layers": 2, "parallel": True}, {"last_only": False}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_all_rows_equal_model(options: dict[str, object]) -> None:
    CASE.check_all_rows(*small(**options))


def test_layers_compute_active_rows() -> None:
    """Tensors of a layer have as many tokens as the layer has rows."""
    captured, graph, _ = small(num_layers=2)
    program = CASE.program(captured)
    plan = plan_for(program, TOKENS, [Span(0, START, LENGTH, "key", True)], Rows(((0, 2), (0,))))
    seen: dict[str, torch.Size] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                seen[n.name] = value.shape
            return value

    program.graph_module.recompile()
    values = bind_plan(program, plan, nothing_stored(program))
    with torch.no_grad():
        Watch(program.graph_module).run(*graph.calls[0], *values)
    facts = program.decoder
    for index, (layer, count) in enumerate(zip(facts.layers, (7, 6), strict=True)):
        assert plan.rows_per_layer[index] == count
        for node in (*layer.kv_part, *layer.q_part):
            assert seen[node.name][facts.flows[node].dim] == count, node
        for node in layer.full_part:
            assert TOKENS in seen[node.name]


@pytest.mark.parametrize("explicit_mask", [False, True])
def test_graph_of_two_samples(explicit_mask: bool, golden: Callable[[str, str], None]) -> None:
    """Tables without a batch dim get one; masks have rows per sample."""
    name = "restrict_rows_two_samples" + "_explicit_mask" * explicit_mask
    golden(name, CASE.change(two_samples(explicit_mask=explicit_mask)[0]))


BATCHED = [{}, {"explicit_mask": True}, {"num_layers": 2, "parallel": True}, {"fused_qkv": True}]


@pytest.mark.parametrize("options", BATCHED, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("last_only", [True, False])
def test_all_rows_of_two_samples_equal_model(options: dict[str, object], last_only: bool) -> None:
    captured, graph, want = two_samples(**options, last_only=last_only)
    CASE.check_all_rows(captured, graph, want)
    program = CASE.program(captured)
    # With its own donors, every sample equals the model, whatever rows it computes.
    layers = program.decoder.num_layers
    plan = plan_for_both(program, Rows(((0, 2),) * layers), Rows(((),) * layers))
    assert plan.rows_per_layer[0] == 7
    got = run(program, graph.calls[0], plan, own_donors(captured, graph.calls[0]))[0]
    if last_only:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    else:
        for sample, rows in enumerate(plan.rows[-1]):
            torch.testing.assert_close(got[sample, rows], want[sample, rows], atol=1e-5, rtol=1e-5)


def test_keeps_levels_with_all_rows() -> None:
    assert unchanged(RestrictRows(), prepared(small(last_only=False)[0], warm=False))

"""A row's last layer computes its keys and values alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.passes.rewrite import (
    HoistLookups,
    InsertLookups,
    KvOnlyRows,
    RestrictRows,
    SpliceRows,
    TrimTail,
)

from ..programs import (
    before_and_after,
    bind_plan,
    everything,
    nothing_stored,
    prepared,
    run,
    small,
    unchanged,
)

EARLIER = (InsertLookups(), SpliceRows(), HoistLookups(), RestrictRows())


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("kv_only_rows", before_and_after(KvOnlyRows(), prepared(small()[0], *EARLIER)))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "explicit_mask": True}, {"parallel": True, "num_layers": 2}, {"fused_qkv": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_all_rows_is_the_unmodified_model(options: dict[str, object]) -> None:
    captured, graph, want = small(**options)
    program = prepared(captured, *EARLIER, KvOnlyRows(), TrimTail())
    results = run(program, graph.calls[0], everything(captured), nothing_stored(program))
    torch.testing.assert_close(results[0], want, atol=1e-5, rtol=1e-5)


def test_the_attention_of_the_last_layer_has_the_rows_of_the_results() -> None:
    captured, graph, want = small()
    program = prepared(captured, *EARLIER, KvOnlyRows(), TrimTail())
    seen: list[torch.Size] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n is program.decoder.layers[0].site.node:
                assert isinstance(value, torch.Tensor)
                seen.append(value.shape)
            return value

    values = bind_plan(program, everything(captured), nothing_stored(program))
    with torch.no_grad():
        (logits,) = Watch(program.graph_module).run(*graph.calls[0], *values)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    assert [shape[2] for shape in seen] == [2]  # of ten tokens


def test_layers_that_keep_all_rows_are_left_alone() -> None:
    program = prepared(small(last_only=False)[0], RestrictRows(), warm=False)
    assert unchanged(KvOnlyRows(), program)

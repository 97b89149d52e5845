"""``kv_only_rows``: a row's last layer computes only its keys and values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.passes.rewrite import (
    KvOnlyRows,
    RestrictRows,
    TrimTail,
)

from ..programs import (
    LOOKUPS,
    PassCase,
    bind_plan,
    everything,
    nothing_stored,
    prepared,
    small,
    unchanged,
)

CASE = PassCase(KvOnlyRows(), (*LOOKUPS, RestrictRows()), (TrimTail(),))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("kv_only_rows", CASE.shown(small()[0]))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "explicit_mask": True}, {"parallel": True, "num_layers": 2}, {"fused_qkv": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_all_rows_equal_model(options: dict[str, object]) -> None:
    CASE.check_all_rows(*small(**options))


def test_last_attention_has_rows_of_results() -> None:
    captured, graph, want = small()
    program = CASE.program(captured)
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


def test_keeps_layers_with_all_rows() -> None:
    program = prepared(small(last_only=False)[0], RestrictRows(), warm=False)
    assert unchanged(KvOnlyRows(), program)

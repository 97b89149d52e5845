"""``record_donors``: the program returns the tensors that donors store."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.passes.rewrite import RecordDonors
from vlcache_fx.passes.standard import cold_program
from vlcache_fx.spec.slots import Key, Residual, Value
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm

from ..programs import PROMPT, before_and_after, everything, prepared, run, small


def test_graph(golden: Callable[[str, str], None]) -> None:
    program = prepared(small(rope="none")[0], warm=False)
    golden("record_donors", before_and_after(RecordDonors(), program))


def test_records_projections_after_results() -> None:
    model = tiny_vlm(num_layers=1)
    captured, graph = captured_graph(model, PROMPT)
    program = prepared(captured, RecordDonors(), warm=False)
    logits, key, value = run(program, graph.calls[0], everything(captured))
    attention = model.decoder.layers[0].attention
    with torch.no_grad():
        embeds = model.embed(PROMPT["input_ids"])
        embeds[:, 3:8] = model.encoder(PROMPT["pixel_values"])
        normed = model.decoder.layers[0].norm_1(embeds)
        assert torch.equal(logits, model(**PROMPT))
        assert torch.equal(key, attention.key(normed))  # no positions in it
        assert torch.equal(value, attention.value(normed))
    assert program.recorded == [Key(0), Value(0)]


def test_records_residual_if_results_need_all_rows() -> None:
    captured, graph, want = small(last_only=False)
    program = prepared(captured, RecordDonors(), warm=False)
    results = run(program, graph.calls[0], everything(captured))
    assert program.recorded == [Key(0), Value(0), Residual()]
    assert torch.equal(results[0], want)
    assert results[3].shape == (1, 10, 16)


def test_decoding_step_records_nothing() -> None:
    class Step(torch.nn.Module):
        def forward(self, query: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
            keys = torch.cat([past, query], dim=2)
            return torch.nn.functional.scaled_dot_product_attention(query, keys, keys)

    captured, _ = captured_graph(Step(), {"query": torch.ones(1, 2, 1, 4), "past": torch.ones(1, 2, 6, 4)})
    before = str(captured.graph_module.graph)
    with pytest.raises(UnsupportedGraphError) as refusal:
        cold_program(captured)
    assert refusal.value.reason is Reason.PAST_KEYS
    assert str(captured.graph_module.graph) == before

"""Graphs over all tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.prefill import Prefill
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import own_compiler_state
from .graphs import PROMPT, Dropping, traced, traced_call


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_match_splits_the_encoder_off() -> None:
    found = Prefill.match(traced(tiny_vlm(), PROMPT))
    assert found.split is not None
    assert found.split.computes
    assert found.decoder is found.split.decoder
    assert len(found.facts.merges) == 1


def test_match_refuses_text() -> None:
    with pytest.raises(UnsupportedGraphError) as refused:
        Prefill.match(traced(tiny_vlm(), tiny_vlm_inputs(9, 3, [])))
    assert refused.value.reason is Reason.NO_MERGE


def test_compile_reuses_spans(eager: Engine) -> None:
    model = tiny_vlm()
    graph, args = traced_call(model, PROMPT)
    run = Prefill.match(graph).compile(eager)
    for mode in ("cold", "warm"):
        with torch.no_grad():
            torch.testing.assert_close(run(*args)[0], model(**PROMPT))
        assert eager.last_report is not None
        assert eager.last_report.mode == mode


def test_compile_and_explain_refuse_alike(eager: Engine) -> None:
    found = Prefill.match(traced(Dropping(), PROMPT))
    texts = []
    for step in (lambda: found.compile(eager), found.explain):
        with pytest.raises(UnsupportedGraphError) as refused:
            step()
        texts.append(str(refused.value))
    assert texts[0] == texts[1]

"""Graphs without reuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.kinds import compile_traced
from vlcache_fx.compiler.refused import Refused
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.options import Options

from ..runtime.helpers import own_compiler_state
from .graphs import CASES, traced_call


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.mark.parametrize(
    ("case", "reason", "is_refusal"),
    [
        ("piece", None, False),
        ("text", Reason.NO_MERGE, False),
        ("positions in the stream", Reason.POSITION_IN_STREAM, True),
    ],
)
def test_compile_reports(case: str, reason: Reason | None, is_refusal: bool, eager: Engine) -> None:
    make, call, _ = CASES[case]
    model = make()
    graph, args = traced_call(model, call)
    with torch.no_grad():
        results = compile_traced(graph, eager)(*args)
        assert torch.equal(results[0], model(**call))
    report = eager.last_report
    assert (None if report is None else report.reason_code) == reason
    assert [refusal.reason for refusal in eager.refusals] == ([reason] if is_refusal else [])


def test_compile_strict_raises() -> None:
    make, call, _ = CASES["positions in the stream"]
    refusal = UnsupportedGraphError(Reason.POSITION_IN_STREAM, "they are added")
    with pytest.raises(UnsupportedGraphError) as refused:
        Refused(traced_call(make(), call)[0], refusal).compile(Engine(Options(strict=True, lowering="eager")))
    assert refused.value is refusal

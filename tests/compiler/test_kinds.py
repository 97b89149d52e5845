"""Kinds of graphs: equal in the backend and in explanations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vlcache_fx.backend import engine_for
from vlcache_fx.compiler.decode_step import DecodeStep
from vlcache_fx.compiler.explain import explain
from vlcache_fx.compiler.kinds import KINDS, classify, on_kind
from vlcache_fx.compiler.refused import Refused
from vlcache_fx.errors import PassError, Reason, UnsupportedGraphError
from vlcache_fx.passes.rewrite import SpliceRows
from vlcache_fx.testing.tiny_vlm import tiny_vlm

from ..runtime.helpers import own_compiler_state, unique_salt
from .graphs import CASES, PROMPT, Adding, traced


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Return kind and refusal of each compiled graph, in order."""
    found: list[tuple[str, str | None]] = []
    for kind in (*KINDS, DecodeStep, Refused):

        def compile_and_note(self: Any, engine: Any, own: Any = kind.compile) -> Any:
            result = own(self, engine)
            refusal = getattr(self, "refusal", None)
            found.append((self.name, None if refusal is None else str(refusal)))
            return result

        monkeypatch.setattr(kind, "compile", compile_and_note)
    return found


@pytest.mark.parametrize("case", CASES)
def test_backend_and_explain_agree(case: str, compiled: list[tuple[str, str | None]]) -> None:
    make, call, kinds = CASES[case]
    model = make()
    explained = explain(model.forward, {name: value.clone() for name, value in call.items()})
    assert not compiled
    options = {"lowering": "eager", "salt": unique_salt()}
    with torch.no_grad():
        torch.compile(model.forward, backend="vlcache", options=options)(**call)
    assert [one.kind for one in explained] == kinds
    assert [(one.kind, one.reason) for one in explained] == compiled
    report = engine_for(options).last_report
    if kinds == ["unmodified"] and report is not None:
        assert report.reason == explained[0].reason


def test_every_kind_has_a_case() -> None:
    names = {kind for _, _, kinds in CASES.values() for kind in kinds}
    assert names == {kind.name for kind in (*KINDS, DecodeStep, Refused)}  # type: ignore[misc]


def test_classify_refuses_other_graphs() -> None:
    text = {"input_ids": PROMPT["input_ids"][:, :3]}
    for model, call, reason in (
        (tiny_vlm(), text, Reason.NO_MERGE),
        (Adding(), {"x": torch.ones(2)}, Reason.NO_ATTENTION),
    ):
        with pytest.raises(UnsupportedGraphError) as refused:
            classify(traced(model, call))
        assert refused.value.reason is reason


def test_on_kind_refuses_after_failed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SpliceRows, program: Any) -> bool:
        raise PassError("splice_rows", (), "deliberate")

    monkeypatch.setattr(SpliceRows, "run", fail)
    explanation = on_kind(traced(tiny_vlm(), PROMPT), lambda kind: kind.explain())
    assert explanation.kind == "unmodified"
    assert "[lowering_failed]" in str(explanation.reason)

"""Unmodified graphs, and machines without a compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from vlcache_fx.errors import LoweringError, Reason, UnsupportedGraphError
from vlcache_fx.lowering import InductorLowering
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import own_compiler_state, unique_salt, with_api, with_backend

FIRST = tiny_vlm_inputs(3, 5, [(20, 0)], text_seed=1)
SECOND = tiny_vlm_inputs(13, 4, [(20, 0)], text_seed=2)

# Inductor imports parts of torch that use torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulate a machine without a C++ compiler and with empty caches."""

    def search(*_: Any) -> str:
        raise InvalidCxxCompiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", search)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("compiled", [with_api, with_backend])
def test_reuse_without_compiler(compiled: Any, caplog: pytest.LogCaptureFixture) -> None:
    pair = compiled(tiny_vlm(num_layers=2, last_only=False), lowering="inductor", policy="full")
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        reports = [pair.run(**prompt) for prompt in (FIRST, SECOND, FIRST)]
    assert [off for off, _ in reports] == [0.0, 0.0, 0.0]
    assert [report["mode"] for _, report in reports] == ["cold", "warm", "warm"]
    assert pair.engine.stats()["refusals"] == {"no_compiler": 1}
    (record,) = caplog.records
    assert record.getMessage() == (
        "vlcache: running with eager kernels: no C++ compiler was found: install one, such as g++, or use "
        'lowering="eager"'
    )


@pytest.mark.usefixtures("no_compiler")
# test_reuse_without_compiler goes through both doors.
@pytest.mark.parametrize("compiled", [with_api, pytest.param(with_backend, marks=pytest.mark.thorough)])
def test_generate_without_compiler(compiled: Any, caplog: pytest.LogCaptureFixture) -> None:
    pair = compiled(tiny_qwen2_5_vl(1), lowering="inductor")
    inputs = qwen_inputs(5, 4, [(8, 8, 0)])
    with caplog.at_level(logging.WARNING, "vlcache_fx"), torch.no_grad():
        got, expected = (model.generate(**inputs, max_new_tokens=4) for model in (pair.model, pair.reference))
    assert torch.equal(got, expected)
    assert pair.engine.stats()["refusals"] == {"no_compiler": 1}
    assert [record.name for record in caplog.records if "vlcache" in record.name] == ["vlcache_fx"]


@pytest.mark.usefixtures("no_compiler")
def test_strict_raises_no_compiler() -> None:
    pair = with_api(tiny_vlm(num_layers=2), lowering="inductor", strict=True)
    with pytest.raises(UnsupportedGraphError, match="no C\\+\\+ compiler was found") as raised:
        pair.run(**FIRST)
    assert raised.value.reason is Reason.NO_COMPILER
    pair = with_backend(tiny_vlm(num_layers=2), lowering="inductor", strict=True, salt=unique_salt())
    with pytest.raises((UnsupportedGraphError, BackendCompilerFailed), match="no C\\+\\+ compiler was found"):
        pair.run(**FIRST)


@pytest.mark.parametrize("strict", [False, True])
def test_inductor_failure_runs_eager(
    strict: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no such kernel\nand more lines")

    def refuse(*_: Any, **__: Any) -> Any:
        raise LoweringError("no")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    monkeypatch.setattr(InductorLowering, "lower", refuse)
    pair = with_api(tiny_vlm(num_layers=2), lowering="inductor", strict=strict)
    text = tiny_vlm_inputs(9, 5, [])
    if strict:
        with pytest.raises(UnsupportedGraphError, match="no such kernel"):
            pair.run(**text)
        return
    off, report = pair.run(**text)
    assert off == 0.0
    assert report["mode"] == "bypass"
    assert [
        str(record.getMessage()).count("\n") for record in caplog.records if record.name == "vlcache_fx"
    ] == [0]
    assert {refusal.reason for refusal in pair.engine.refusals} == {Reason.LOWERING_FAILED}

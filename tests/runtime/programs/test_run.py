"""A failing program costs reuse, never the request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from vlcache_fx.errors import LoweringError
from vlcache_fx.lowering import EagerLowering, Lowered
from vlcache_fx.options import Options
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.spec.program import ProgramSpec
from vlcache_fx.spec.slots import Donor, Key, Rows, StoredSlot
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..helpers import Pair, with_backend

FIRST = tiny_vlm_inputs(5, 6, [(24, 0)])


class Broken(EagerLowering):
    """Programs with one name fail to lower, or fail when they run."""

    def __init__(self, name: str, when: str) -> None:
        self.broken, self.when, self.runs = name, when, 0

    def lower(self, program: GraphModule, *, name: str) -> Lowered:
        if name != self.broken:
            return super().lower(program, name=name)
        if self.when == "lower":
            raise LoweringError("no kernel for it")

        def fail(args: Sequence[Any]) -> tuple[Any, ...]:
            self.runs += 1
            raise RuntimeError("no memory for it")

        return fail


def broken(name: str, when: str, **options: Any) -> tuple[Pair, Broken]:
    pair = with_backend(tiny_vlm(num_layers=2, last_only=False), policy="none", **options)
    lowering = Broken(name, when)
    pair.engine.lowering = lowering
    return pair, lowering


@pytest.mark.parametrize("when", ["lower", "run"])
@pytest.mark.parametrize("name", ["cold", "warm"])
def test_failed_program_falls_back_to_unmodified(
    name: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair, lowering = broken(name, when)
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        reports = [pair.run(**FIRST) for _ in range(4)]
    assert all(off == 0.0 for off, _ in reports)
    failed = [report for _, report in reports if report["mode"] == "bypass"]
    assert len(failed) == (4 if name == "cold" else 3)
    assert "lowering_failed" in pair.engine.stats()["refusals"]
    assert len(caplog.records) == 1  # logged once
    assert lowering.runs == (1 if when == "run" else 0)  # not tried again


def test_strict_raises_program_error() -> None:
    pair, _ = broken("cold", "run", strict=True)
    with pytest.raises(RuntimeError, match="no memory for it"):
        pair.run(**FIRST)


def test_bind_builds_tables_after_sending_plan() -> None:
    sent = []

    class Positions(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
            sent.append("rows")
            return torch.zeros(len(self))

    def tables() -> dict[StoredSlot, torch.Tensor]:
        sent.append("donors")
        return {Key(0): donor}

    donor, rows = torch.ones(3), torch.arange(2).as_subclass(Positions)
    plan = Plan(2, (rows,), (), (), (2,), 1.0)
    runner = ProgramRunner(
        "warm",
        ProgramSpec((Donor(Key(0)), Rows(0)), ()),
        _never,
        torch.device("meta"),
        ServingEngine(Options()),
    )
    first, second = runner.bind(plan, None, tables)
    assert first is donor
    assert len(second) == 2
    assert sent == ["rows", "donors"]


def _never() -> Lowered:
    raise AssertionError("nothing is run here")

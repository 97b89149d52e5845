"""Decoding steps with input mutations run the program only if it may write to its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.compiler.builders.runners import decode_step_spec
from vlcache_fx.ir import Captured, InputKind, Write
from vlcache_fx.passes import Program
from vlcache_fx.runtime.decode_step import DecodeStepRunner

ROWS, COUNT = Write(input=0, value=1, dim=1, positions=2), Write(input=2, value=3, results=(0,))
KINDS = (InputKind.DATA, InputKind.DATA, InputKind.DATA, InputKind.WEIGHT)


def lowered(args: Sequence[Any]) -> tuple[Any, ...]:
    """Writes ones to the first input itself and returns the next count."""
    args[0][:, :1] = 1
    return None, None, None, args[2] + 1


def unmodified(*args: Any) -> tuple[Any, ...]:
    return ("unmodified",)


def runner(*writes: Write) -> DecodeStepRunner:
    graph = torch.fx.Graph()
    graph.output((None,) * 4)
    captured = Captured(torch.fx.GraphModule({}, graph), KINDS, writes=writes)
    made = Program(captured.graph_module, writes=writes, in_place=[0] if writes else [])
    return DecodeStepRunner(decode_step_spec(captured, made), lowered, unmodified)


def inputs() -> list[Tensor]:
    return [torch.zeros(2, 3), torch.zeros(4), torch.tensor(7), torch.zeros(1)]


def test_applies_remaining_input_mutations() -> None:
    args = inputs()
    (result,) = runner(ROWS, COUNT)(*args)
    assert args[0].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert result is args[2]
    assert result.item() == 8


def aliased(args: list[Tensor]) -> None:
    args[1] = args[0][0]


def transposed(args: list[Tensor]) -> None:
    args[0] = torch.zeros(3, 2).t()


@pytest.mark.parametrize("change", [aliased, transposed])
def test_overlapping_inputs_run_unmodified(change: Any) -> None:
    args = inputs()
    change(args)
    assert runner(ROWS, COUNT)(*args) == ("unmodified",)
    assert not args[0].any()


def test_without_writes_inputs_are_not_checked() -> None:
    args = inputs()
    transposed(args)
    assert list(runner()(*args)) == list(lowered(args))

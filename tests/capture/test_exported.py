"""Exported programs as the IR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from vlcache_fx.capture import capture_exported
from vlcache_fx.capture.exported import bound_tensors, given_arguments
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind

# torch copies the program's own tree specs, and warns itself of what it does then.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")

ROWS = {1: Dim("rows", min=2, max=64)}


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.offset = torch.full((4,), 2.0)  # neither parameter nor buffer: a constant of the program

    def forward(self, x: Tensor, flag: bool, other: Tensor | None = None) -> Tensor:
        keys = self.linear(x * self.table + self.offset)[:, None]
        return x + nn.functional.scaled_dot_product_attention(x[:, None], keys, keys, is_causal=flag)[:, 0]


def program_of(model: nn.Module, *args: Any, dynamic: Any = (ROWS, None)) -> ExportedProgram:
    return export(model, args, dynamic_shapes=dynamic)


def run(program: ExportedProgram, captured: Captured, *given: Tensor) -> Any:
    waiting = iter(given)
    bound = bound_tensors(program)
    inputs = [next(waiting) if tensor is None else tensor for tensor in bound]
    with torch.no_grad():
        return captured.graph_module(*inputs)


def test_capture_exported_kinds() -> None:
    model = Attending()
    program = program_of(model, torch.randn(1, 6, 4), True)
    captured = capture_exported(program)
    assert captured.kinds == (InputKind.WEIGHT,) * 4 + (InputKind.DATA,)
    bound = bound_tensors(program)
    assert [None if tensor is None else tuple(tensor.shape) for tensor in bound] == [
        (4, 4), (4,), (4,), (4,), None,
    ]  # fmt: skip
    assert given_arguments(program) == [True, False]


@pytest.mark.parametrize("rows", [2, 6, 31])
@pytest.mark.parametrize("decomposed", [False, True])
def test_capture_exported_values(rows: int, decomposed: bool) -> None:
    model = Attending()
    program = program_of(model, torch.randn(1, 6, 4), True)
    if decomposed:
        program = program.run_decompositions({})
    x = torch.randn(1, rows, 4)
    captured = capture_exported(program)
    targets = [str(node.target) for node in captured.graph_module.graph.nodes]
    assert "aten.scaled_dot_product_attention.default" in targets
    torch.testing.assert_close(run(program, captured, x)[0], model(x, True))


def test_capture_exported_keeps_program() -> None:
    program = program_of(Attending(), torch.randn(1, 6, 4), True)
    before = str(program)
    capture_exported(program)
    assert str(program) == before


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.kept[:, : x.shape[1]] = x
        return x + self.kept.sum()


@pytest.mark.parametrize("decomposed", [False, True])
def test_capture_exported_writes_after_results(decomposed: bool) -> None:
    program = program_of(Writing(), torch.randn(1, 6, 4), dynamic=({1: Dim("rows", min=2, max=8)},))
    if decomposed:
        program = program.run_decompositions({})
    captured = capture_exported(program)
    (write,) = captured.writes
    assert captured.kinds == (InputKind.DATA, InputKind.DATA)
    assert (write.input, captured.num_results) == (0, 1)
    x = torch.randn(1, 3, 4)
    results = run(program, captured, x)
    torch.testing.assert_close(results[0], x + x.sum())
    rows = results[write.value]
    assert bool((rows == x).all()) if write.dim is not None else bool((rows[:, :3] == x).all())


def test_capture_exported_size_argument() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, count: int) -> Tensor:
            return x * count

    program = program_of(Scaled(), torch.randn(1, 6, 4), 3, dynamic=(ROWS, Dim.DYNAMIC))
    captured = capture_exported(program)
    assert captured.kinds == (InputKind.DATA, InputKind.SIZE)
    torch.testing.assert_close(captured.graph_module(torch.ones(1, 3, 4), 5)[0], torch.full((1, 3, 4), 5.0))


def test_capture_exported_refuses_other_inputs() -> None:
    program = program_of(Attending(), torch.randn(1, 6, 4), True)
    (spec,) = [spec for spec in program.graph_signature.input_specs if spec.arg.name == "x"]
    spec.kind = torch.export.graph_signature.InputKind.TOKEN
    with pytest.raises(UnsupportedGraphError) as refusal:
        capture_exported(program)
    assert refusal.value.reason is Reason.CAPTURE_FAILED
    assert "TOKEN" in str(refusal.value)

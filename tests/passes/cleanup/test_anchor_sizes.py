"""``anchor_sizes``: sizes are read from inputs, which later passes do not restrict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from vlcache_fx.capture.exported import capture_exported
from vlcache_fx.passes import Program
from vlcache_fx.passes.cleanup import AnchorSizes

from ..programs import before_and_after, unchanged
from .graphs import program_of

X = torch.arange(12.0).reshape(1, 6, 2)


class Halves(nn.Module):
    """Reads the length from a computed tensor."""

    def forward(self, x: Tensor) -> Tensor:
        double = x * 2
        return double.reshape(1, double.shape[1], 2, 1)


def exported() -> Program:
    program = export(Halves(), (X,), dynamic_shapes=({1: Dim("tokens", min=2, max=64)},))
    captured = capture_exported(program)
    program_ = Program(captured.graph_module)
    graph = program_.graph
    (size,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    (double,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    double.append(size)
    size.args = (double, 1)  # tracers differ in the tensor whose size they read
    return program_


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("anchor_sizes", before_and_after(AnchorSizes(), exported()))


def test_numbers() -> None:
    program = exported()
    assert AnchorSizes().run(program)
    program.graph.lint()
    program.graph_module.recompile()
    for length in (6, 9):
        x = torch.randn(1, length, 2)
        (got,) = program.graph_module(x)
        assert torch.equal(got, Halves()(x))


def test_keeps_static_sizes_and_sizes_of_inputs() -> None:
    assert unchanged(AnchorSizes(), program_of(lambda x: (x.reshape(1, x.shape[1], 2, 1),), X))
    program = exported()
    AnchorSizes().run(program)
    assert not AnchorSizes().run(program)

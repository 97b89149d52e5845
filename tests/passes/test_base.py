"""``Program``: inputs and outputs that passes add."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlcache_fx.passes import Program
from vlcache_fx.spec.slots import Keep, Key, Rows, Value


def program() -> Program:
    class Two(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
            return (x + y,)

    return Program(fx.symbolic_trace(Two()))


def test_add_input_appends() -> None:
    subject = program()
    rows = subject.add_input(Rows(0))
    keep = subject.add_input(Keep(0))
    assert subject.add_input(Rows(0)) is rows
    placeholders = [node for node in subject.graph.nodes if node.op == "placeholder"]
    assert [node.name for node in placeholders] == ["x", "y", "rows_0", "keep_0"]
    assert subject.slots == {Rows(0): rows, Keep(0): keep}
    subject.graph.lint()


def test_add_outputs_appends() -> None:
    subject = program()
    x = next(iter(subject.graph.nodes))
    subject.add_outputs([(Key(0), x)])
    subject.add_outputs(iter([(Value(0), x)]))
    subject.graph_module.recompile()
    assert [int(value) for value in subject.graph_module(torch.tensor(1), torch.tensor(2))] == [3, 1, 1]
    assert subject.recorded == [Key(0), Value(0)]

"""The fake values of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Interpreter, Node

from vlcache_fx.lowering.shapes import expression
from vlcache_fx.lowering.values import _Recorder, program_values
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

LAYERS = 3


def described(value: Any) -> Any:
    """Sizes and strides as text, so that values of two environments compare."""
    if isinstance(value, torch.Tensor):
        sizes = [str(expression(size)) for size in (*value.size(), *value.stride())]
        return sizes, value.dtype, value.device
    if isinstance(value, tuple | list):
        return [described(part) for part in value]
    return str(expression(value)) if isinstance(value, torch.SymInt) else value


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("rewrite", [cold_program, warm_program])
def test_repeated_layers_are_asked_once(
    rewrite: Callable[..., Program], dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vlm(num_layers=LAYERS, explicit_mask=True)
    captured, _ = captured_graph(model, tiny_vlm_inputs(3, 2, [(5, 0)]), dynamic=dynamic)
    program = rewrite(captured).graph_module
    asked: list[Node] = []
    run = Interpreter.run_node

    def counted(self: Interpreter, node: Node) -> Any:
        asked.append(node)
        return run(self, node)

    monkeypatch.setattr(Interpreter, "run_node", counted)
    values = program_values(program)
    linears = [node for node in asked if node.target is torch.ops.aten.linear.default]
    total = len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
    assert 0 < len(linears) < total / 2

    monkeypatch.setattr(_Recorder, "_operator", run)
    one_by_one = program_values(program)
    assert values.keys() == one_by_one.keys()
    for node, value in values.items():
        assert described(value) == described(one_by_one[node]), node

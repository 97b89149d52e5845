"""``dense_deepstack``: features added at masked tokens become additions to all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from vlcache_fx.passes import Program
from vlcache_fx.passes.cleanup import DenseDeepstack

from ..programs import before_and_after, unchanged

aten = torch.ops.aten
MASK = torch.tensor([[False, True, True, False], [True, False, False, True]])


def inputs(rows: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    def noise(seed: int, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))

    return {
        "x": noise(0, 2, 4, 3),
        "mask": MASK,
        "features": noise(1, rows, 3).to(dtype),
        "other_x": noise(2, 2, 4, 3),
        "other_mask": ~MASK,
        "flat_mask": torch.tensor([True, False]),
        "wide": noise(3, 4, 1),
    }


def added(call: dict[str, Tensor] | None = None, **change: Any) -> Program:
    """Return a program of ``x[mask] = x[mask] + features``; ``change`` replaces operands."""
    call, graph = inputs() if call is None else call, fx.Graph()
    mode = FakeTensorMode()
    nodes = {}
    for name, value in call.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = mode.from_tensor(value)

    def operand(name: str) -> fx.Node:
        return nodes[change.get(name, name)]

    def of(node: fx.Node, *sizes: int) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty(sizes)
        return node

    x, mask, features = operand("x"), operand("mask"), operand("features")
    read = graph.call_function(
        aten.index.Tensor, (nodes[change.get("read", "x")], [mask, *change.get("more", [])])
    )
    parts = (of(read, 4, 3), features)
    total = graph.call_function(
        change.get("sum", aten.add.Tensor), parts[:: change.get("order", 1)], change.get("options", {})
    )
    into = [nodes[change.get("into", change.get("mask", "mask"))], *change.get("more", [])]
    put = graph.call_function(
        aten.index_put.default,
        (x, into, of(total, 4, 3), *change.get("accumulate", ())),
        change.get("kwargs", {}),
    )
    graph.output((of(put, 2, 4, 3),))
    return Program(fx.GraphModule(torch.nn.Module(), graph))


def scattered(call: dict[str, Tensor] | None = None, **change: Any) -> Program:
    """Return a program of ``x.masked_scatter(mask[..., None], (x[mask] + features).view(-1))``."""
    program = added(call, **change)
    (put,) = program.graph.find_nodes(op="call_function", target=aten.index_put.default)
    x, (mask,), total = put.args
    mode, make = x.meta["val"].fake_mode, program.graph.call_function
    with program.graph.inserting_before(put), mode:
        (read,) = program.graph.find_nodes(op="call_function", target=aten.index.Tensor)
        wide = make(aten.unsqueeze.default, (mask, change.get("dim", -1)))
        wide.meta["val"] = mask.meta["val"].unsqueeze(change.get("dim", -1))
        with program.graph.inserting_before(read):
            narrow = make(aten.squeeze.dim, (wide, -1)) if change.get("narrow") else mask
        if narrow is not mask:
            read.prepend(wide)
            read.prepend(narrow)
            narrow.meta["val"] = mask.meta["val"]
            read.args = (read.args[0], [narrow])
        flat = make(aten.view.default, (total, [-1]))
        flat.meta["val"] = torch.empty(12)
        result = make(aten.masked_scatter.default, (x, wide, flat))
        result.meta["val"] = put.meta["val"]
    put.replace_all_uses_with(result)
    program.graph.erase_node(put)
    program.graph_module.recompile()
    return program


@pytest.mark.parametrize("change", [{}, {"order": -1}, {"narrow": True}], ids=str)
def test_numbers_of_masked_scatter(change: dict[str, Any]) -> None:
    program, call = scattered(**change), inputs()
    (want,) = program.graph_module(**call)
    assert DenseDeepstack().run(program)
    program.graph.lint()
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    assert not program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default)
    assert torch.equal(program.graph_module(**call)[0], want)


@pytest.mark.parametrize(
    "change", [{"into": "other_mask"}, {"read": "other_x"}, {"features": "wide"}, {"dim": 0}], ids=str
)
def test_keeps_other_scatters(change: dict[str, Any]) -> None:
    assert unchanged(DenseDeepstack(), scattered(**change))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("dense_deepstack", before_and_after(DenseDeepstack(), added()))


@pytest.mark.parametrize("change", [{}, {"order": -1}, {"accumulate": (False,)}, {"more": [None]}], ids=str)
def test_numbers(change: dict[str, Any]) -> None:
    program, call = added(**change), inputs()
    (want,) = program.graph_module(**call)
    assert DenseDeepstack().run(program)
    program.graph.lint()
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    assert not program.graph.find_nodes(op="call_function", target=aten.index.Tensor)
    assert torch.equal(program.graph_module(**call)[0], want)
    node = program.graph.find_nodes(op="call_function", target=aten.where.self)[0]
    assert node.meta["val"].shape == want.shape


@given(st.lists(st.booleans(), min_size=8, max_size=8).filter(any))
def test_numbers_for_any_mask(places: list[bool]) -> None:
    mask = torch.tensor(places).view(2, 4)
    program, call = added(), inputs(rows=int(mask.sum())) | {"mask": mask}
    (want,) = program.graph_module(**call)
    DenseDeepstack().run(program)
    program.graph_module.recompile()
    assert torch.equal(program.graph_module(**call)[0], want)


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": (True,)},
        {"kwargs": {"accumulate": True}},
        {"into": "other_mask"},
        {"read": "other_x"},
        {"mask": "flat_mask"},
        {"features": "wide"},
        {"sum": aten.mul.Tensor},
        {"options": {"alpha": 2}},
        {"more": [0]},
    ],
    ids=str,
)
def test_keeps_other_writes(change: dict[str, Any]) -> None:
    assert unchanged(DenseDeepstack(), added(**change))


def test_keeps_features_of_another_dtype() -> None:
    assert unchanged(DenseDeepstack(), added(inputs(dtype=torch.float64)))

"""Programs as graphs of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.deploy.flatten import CHECKS, TAIL, FlatGraph, flatten, group_of, slot_name
from vlcache_fx.spec.slots import InputSlot

aten = torch.ops.aten

X, Y = torch.arange(6.0).reshape(2, 3), torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]])
WEIGHT = torch.tensor([10.0, 20.0, 30.0])


def flat(
    function: Callable[..., Any],
    examples: Sequence[Tensor],
    inputs: Sequence[str | None],
    results: Sequence[str],
    weights: Mapping[int, tuple[str, Tensor]] | None = None,
    replacements: Mapping[Any, Any] | None = None,
) -> FlatGraph:
    traced = make_fx(function)(*examples)
    before = str(traced.graph)
    found = flatten(traced, inputs, weights or {}, results, replacements or {})
    assert str(traced.graph) == before
    return found


def placeholders(graph: fx.GraphModule) -> int:
    return len(graph.graph.find_nodes(op="placeholder"))


def test_flatten_weights_and_order_of_inputs() -> None:
    found = flat(
        lambda w, a, b: (a * w - b, a + w), (WEIGHT, X, Y), [None, "a", "b"], ["first", "second"],
        weights={0: ("layer.weight", WEIGHT)},
    )  # fmt: skip
    assert dict(found.inputs) == {"a": 1, "b": 2}
    assert found.outputs == found.results == ("first", "second")
    first, second = found.module(X, Y)
    assert torch.equal(first, X * WEIGHT - Y)
    assert torch.equal(second, X + WEIGHT)
    assert torch.equal(found.module.get_buffer("weight_0"), WEIGHT)
    assert not any(buffer.requires_grad for buffer in found.module.buffers())


@pytest.mark.parametrize("count", [2, 3])
def test_flatten_order_of_inputs_without_weights(count: int) -> None:
    examples = [X, Y, X * Y][:count]
    names = [f"input.{index}" for index in range(count)]
    found = flat(lambda *args: (torch.stack(args),), examples, names, ["all"])
    assert list(found.inputs) == names
    assert torch.equal(found.module(*examples)[0], torch.stack(examples))


def test_flatten_weights_that_require_grad() -> None:
    weight = torch.nn.Parameter(WEIGHT)
    found = flat(lambda w, a: (a * w,), (WEIGHT, X), [None, "a"], ["x"], weights={0: ("w", weight)})
    assert not found.module(X)[0].requires_grad
    assert weight.requires_grad


def test_flatten_merges_inputs_of_equal_names() -> None:
    found = flat(lambda a, b, c: (a + 2 * b - c,), (X, X.clone(), Y), ["same", "same", "other"], ["sum"])
    assert dict(found.inputs) == {"same": 0, "other": 2}
    assert placeholders(found.module) == 2


def test_flatten_drops_unused_inputs() -> None:
    found = flat(lambda a, b: (a + 1,), (X, Y), ["a", "b"], ["x"])
    assert dict(found.inputs) == {"a": 0}
    assert torch.equal(found.module(X)[0], X + 1)


def test_flatten_drops_identity_gathers() -> None:
    def function(a: Tensor, keep: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        kept = a.index_select(0, keep)
        return (kept.index_select(0, other) * 2,)

    found = flat(function, (X, torch.arange(2), torch.tensor([1])), ["a", None, "other"], ["x"])
    assert list(found.inputs) == ["a", "other"]
    gathers = found.module.graph.find_nodes(op="call_function", target=aten.index_select.default)
    assert len(gathers) == 1
    assert torch.equal(found.module(X, torch.tensor([1]))[0], X[1:] * 2)


def test_flatten_tensor_returned_twice() -> None:
    def function(a: Tensor) -> tuple[Tensor, ...]:
        doubled = a * 2
        return doubled, a + 1, doubled

    found = flat(function, (X,), ["a"], ["one", "two", "three"])
    assert found.outputs == ("one", "two")
    assert found.results == ("one", "two", "one")
    assert [value.tolist() for value in found.module(X)] == [(X * 2).tolist(), (X + 1).tolist()]


def test_flatten_constant_result() -> None:
    traced = make_fx(lambda a: (a + 1,))(X)
    output = traced.graph.output_node()
    output.args = ((output.args[0][0], None, 7),)  # type: ignore[index]
    traced.recompile()
    found = flatten(traced, ["a"], {}, ["x", "nothing", "number"], {})
    assert (found.outputs, found.results) == (("x",), ("x", None, None))
    assert len(found.module(X)) == 1


def test_flatten_input_as_result() -> None:
    found = flat(lambda a, b: (a, a + b), (X, Y), ["a", "b"], ["same", "sum"])
    assert [value.tolist() for value in found.module(X, Y)] == [X.tolist(), (X + Y).tolist()]


def test_flatten_replaces_operators() -> None:
    found = flat(
        lambda a, b: (a * b,), (X, Y), ["a", "b"], ["x"], replacements={aten.mul.Tensor: aten.add.Tensor}
    )
    assert torch.equal(found.module(X, Y)[0], X + Y)


def test_flatten_copies_constants() -> None:
    found = flat(lambda a: (a + WEIGHT,), (X,), ["a"], ["x"])
    assert torch.equal(found.module(X)[0], X + WEIGHT)


def test_flatten_drops_assertions() -> None:
    def function(a: Tensor) -> tuple[Tensor, ...]:
        torch._assert_async((a >= 0).all(), "negative")
        return (a + 1,)

    traced = make_fx(function, pre_dispatch=True)(X)
    assert any(node.target in CHECKS for node in traced.graph.nodes)
    found = flatten(traced, ["a"], {}, ["x"], {})
    assert not any(node.target in CHECKS for node in found.module.graph.nodes)
    assert torch.equal(found.module(-X)[0], 1 - X)


@pytest.mark.parametrize(
    ("level", "groups", "name"),
    [(0, (3,), "0"), (2, (3,), "0"), (3, (3,), TAIL), (0, (1, 2), "0"), (1, (1, 2), "1"), (2, (1, 2), "1")],
)
def test_group_of_levels(level: int, groups: tuple[int, ...], name: str) -> None:
    assert group_of(level, groups) == name


@pytest.mark.parametrize(
    ("slot", "groups", "name"),
    [
        ("donor.2.k", (3,), "donor.2.k"),
        ("results", (3,), "results"),
        ("rows.0", (1, 2), "rows.0"),
        ("rows.2", (1, 2), "rows.1"),
        ("rows.3", (1, 2), "rows.tail"),
        ("source.1", (3,), "source.0"),
        ("source.3", (3,), "source.tail"),
        ("keep.0", (1, 2), "keep.0.1"),
        ("keep.1", (1, 2), None),
        ("keep.2", (1, 2), "keep.1.tail"),
        ("keep.2", (1, 1, 1), "keep.2.tail"),
        ("place.0.2", (1, 2), "place.0.1"),
        ("place.1.2", (1, 2), None),
        ("place.0.3", (3,), "place.0.tail"),
    ],
)
def test_slot_name_of_groups(slot: str, groups: tuple[int, ...], name: str | None) -> None:
    assert slot_name(InputSlot.parse(slot), groups) == name

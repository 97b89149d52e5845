"""Lowered programs wait for pending tensors where they first read them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlcache_fx.lowering import EagerLowering, InductorLowering, Lowering, PendingTensor
from vlcache_fx.lowering.inductor import _Program, _Step


class Late:
    """A tensor of NaN until the program waits for it."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.tensor, self.waits = value, torch.full_like(value, float("nan")), 0

    def arrive(self) -> None:
        self.tensor.copy_(self.value)
        self.waits += 1


def two_layers() -> torch.fx.GraphModule:
    """``x + first`` in layer 0, then ``* second`` in layer 1."""
    graph = torch.fx.Graph()
    x, first, second = (graph.placeholder(name) for name in ("x", "first", "second"))
    added = graph.call_function(torch.ops.aten.add.Tensor, (x, first))
    result = graph.call_function(torch.ops.aten.mul.Tensor, (added, second))
    for index, node in enumerate((added, result)):
        node.meta["segment"] = f"layer.{index}"
    graph.output((result,))
    for node in (x, first, second):
        node.meta["val"] = torch.empty(4)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("lowering", [EagerLowering(), InductorLowering()], ids=lambda one: one.name)
def test_pending_tensors_awaited_before_read(lowering: Lowering) -> None:
    late = [Late(torch.arange(4.0)), Late(torch.full((4,), 3.0))]
    run = lowering.lower(two_layers(), name="test")
    (result,) = run([torch.ones(4), *(PendingTensor(one.tensor, one.arrive) for one in late)])
    assert torch.equal(result, (torch.ones(4) + torch.arange(4.0)) * 3)
    assert [one.waits for one in late] == [1, 1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("lowering", [EagerLowering(), InductorLowering()], ids=lambda one: one.name)
def test_pending_tensors_made_after_wait(lowering: Lowering) -> None:
    late = [Late(torch.arange(4.0)), Late(torch.full((4,), 3.0))]
    run = lowering.lower(two_layers(), name="test")
    pending = [PendingTensor(one.tensor.clone, one.arrive) for one in late]
    for _ in range(2):
        (result,) = run([torch.ones(4), *pending])
        assert torch.equal(result, (torch.ones(4) + torch.arange(4.0)) * 3)


def test_pending_tensors_awaited_layer_by_layer() -> None:
    order: list[str] = []
    late = [
        PendingTensor(torch.ones(2), lambda name=name: order.append(name)) for name in ("donor 0", "donor 1")
    ]

    def layer(index: int) -> _Step:
        def run(args: list[Tensor]) -> list[Tensor]:
            order.append(f"layer {index}")
            return [args[0] + args[1]]

        return _Step(run, (0 if index == 0 else 3, 1 + index), (3 + index,), ())

    program = _Program((layer(0), layer(1)), (4,), (), 5, 3, None, ())
    (result,) = program([torch.ones(2), *late])
    assert result.tolist() == [3.0, 3.0]
    assert order == ["donor 0", "layer 0", "donor 1", "layer 1"]

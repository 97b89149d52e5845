"""Input mutations: results of the captured graph, applied to the caller's tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.capture import capture_dynamo
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.runtime.mutations import apply_input_mutations
from vlcache_fx.testing.graphs import captured_graph, traced_graphs

BUFFER, ROWS, POSITIONS = (
    torch.arange(64.0).view(1, 2, 8, 4),
    -torch.ones(1, 2, 3, 4),
    torch.tensor([5, 0, 2]),
)


def index_copy(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    return buffer.index_copy_(2, positions, rows) * 2


def index_put(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer[:, :, positions] = rows
    return buffer * 2


def from_the_end(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    return index_put(buffer, rows, positions - 8)


def first_rows(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer[:, :, : rows.shape[2]] = rows
    return buffer * 2


def last_rows(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer[:, :, -3:] = rows
    return buffer * 2


def narrow(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer.narrow(2, 4, rows.shape[2]).copy_(rows)
    return buffer * 2


def twice(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer.index_copy_(2, positions, rows)
    return buffer.index_copy_(2, positions + 1, rows * 2) * 2


def whole(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer.copy_(torch.cat([buffer[:, :, rows.shape[2] :], rows], 2))
    return buffer * 2


def every_second(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer[:, :, 1:7:2] = rows
    return buffer * 2


def repeated(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer[:, :, positions] = rows[..., :1]
    return buffer * 2


def its_own_rows(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """The source is a view of the target."""
    buffer[:, :, 0:3] = buffer[:, :, 1:4]
    return buffer * 2


def swapped(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    other = buffer[:, :, :3].clone()
    buffer[:, :, :3] = rows
    rows.copy_(other)
    return rows * 2


def one_after_the_other(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer.index_copy_(2, positions, rows)
    rows.mul_(3)
    positions.add_(1)
    return rows + positions.sum()


def zeroed(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer.zero_()
    rows.zero_()
    return buffer + rows.sum()


class Of(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, buffer: Tensor, rows: Tensor, positions: Tensor) -> Any:
        return self.function(buffer, rows, positions)


def capture(function: Callable[..., Any], dynamic: bool = False) -> tuple[Captured, list[int]]:
    """The captured graph, and the index of each input among buffer, rows and positions (-1 for sizes)."""
    call = {"buffer": BUFFER.clone(), "rows": ROWS.clone(), "positions": POSITIONS.clone()}
    (graph,) = traced_graphs(Of(function), call, dynamic=dynamic)
    tensors = [id(tensor) for tensor in call.values()]
    which = [tensors.index(id(arg)) if id(arg) in tensors else -1 for arg in graph.calls[0]]
    return capture_dynamo(graph.graph_module, graph.example_inputs), which


def run(captured: Captured, args: list[Any]) -> Any:
    with torch.no_grad():
        outputs = captured.graph_module(*args)
    return apply_input_mutations(captured.writes, args, outputs, captured.num_results)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "rows_only"),
    [
        (index_copy, True),
        (index_put, True),
        (from_the_end, True),
        (first_rows, True),
        (last_rows, True),
        (narrow, True),
        (twice, False),
        (whole, False),
        (every_second, False),
        (repeated, False),
        (its_own_rows, False),
        (swapped, None),
        (one_after_the_other, None),
        (zeroed, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_split_writes_equals_in_place(
    function: Callable[..., Tensor], rows_only: bool | None, dynamic: bool
) -> None:
    captured, which = capture(function, dynamic)
    assert captured.writes
    if rows_only is not None:
        assert [write.dim == 2 for write in captured.writes] == [rows_only] * len(captured.writes)
    sizes = [node.meta["val"] for node in captured.placeholders]
    mine, theirs = (
        [BUFFER.clone(), ROWS.clone(), POSITIONS.clone()],
        [BUFFER.clone(), ROWS.clone(), POSITIONS.clone()],
    )
    args = [mine[at] if at >= 0 else int(size) for at, size in zip(which, sizes, strict=True)]
    before = copy.deepcopy(args)
    with torch.no_grad():
        captured.graph_module(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor))
    (result,), expected = run(captured, args), function(*theirs)
    assert torch.equal(result, expected)
    for ours, want in zip(mine, theirs, strict=True):
        assert torch.equal(ours, want)


def test_split_writes_input_as_result() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count.to(x.device)  # the same tensor, and a result of the graph for Dynamo
            return x * self.scale + self.count.add_(x.shape[0])

    captured, graph = captured_graph(Counter(), {"x": torch.ones(3)})
    args = list(graph.calls[0])
    (write,) = captured.writes
    assert captured.kinds[write.input] is InputKind.DATA
    assert captured.kinds.count(InputKind.WEIGHT) == 1  # scale
    (place,) = write.results
    args[write.input] = count = torch.tensor(4)
    results = run(captured, args)
    assert results[place] is count
    assert count.item() == 7
    assert results[1 - place].tolist() == [8.0] * 3


def a_part(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    buffer.index_copy_(2, positions, rows)
    return buffer[:, :, :4]


def a_part_from_before(buffer: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    part = buffer[:, :, :4]
    buffer.index_copy_(2, positions, rows)
    return part


@pytest.mark.parametrize("function", [a_part, a_part_from_before])
def test_split_writes_refuses_views(function: Callable[..., Tensor]) -> None:
    with pytest.raises(UnsupportedGraphError, match="a result is a view of an input") as refusal:
        capture(function)
    assert refusal.value.reason is Reason.MUTATED_INPUTS
    assert refusal.value.node is not None

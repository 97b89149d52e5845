"""``write_in_place``: static KV caches are updated in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.ir.copies import copy_captured
from vlcache_fx.passes import Program
from vlcache_fx.passes.rewrite import WriteInPlace
from vlcache_fx.passes.rewrite.write_in_place import IN_PLACE
from vlcache_fx.passes.standard import decode_step_program
from vlcache_fx.runtime.mutations import apply_input_mutations
from vlcache_fx.testing.graphs import captured_graph

from ..programs import before_and_after, unchanged

WIDTH, TOKENS = 8, 6


def scattered(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    return cache.index_copy_(2, places, rows)


def assigned(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    cache[:, :, places] = rows
    return cache


class Step(nn.Module):
    """A layer of a decoding step: writes a key, a value and their count, and attends to all of them."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor] = scattered) -> None:
        super().__init__()
        self.qkv, self.write = nn.Linear(WIDTH, 3 * WIDTH), write

    def forward(self, embeds: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> Tensor:
        query, key, value = self.qkv(embeds).unflatten(-1, (3, 1, WIDTH)).permute(2, 0, 3, 1, 4)
        places = torch.arange(1) + count
        count.add_(1)
        keys, values = self.write(keys, places, key), self.write(values, places, value)
        mask = (torch.arange(keys.shape[2]) <= places)[None]
        return embeds + F.scaled_dot_product_attention(query, keys, values, mask)[:, 0]


def inputs(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 1, TOKENS, WIDTH, generator=generator).clone()
    embeds = torch.randn(1, 1, WIDTH, generator=generator)
    return {"embeds": embeds, "keys": keys, "values": values, "count": torch.tensor(count)}


def program_of(model: nn.Module, given: dict[str, Tensor]) -> tuple[Captured, Program, list[Any]]:
    """Return the captured graph, its program before all passes, and the arguments ``given``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        captured, graph = captured_graph(model, given)
    program = Program(copy_captured(captured).graph_module, writes=captured.writes)
    return captured, program, list(graph.calls[0])


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("write_in_place", before_and_after(WriteInPlace(), program_of(Step(), inputs())[1]))


@pytest.mark.parametrize("write", [scattered, assigned])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_caches_and_results_equal_model(write: Callable[..., Tensor], count: int) -> None:
    model, mine, theirs = Step(write), inputs(count - 1), inputs(count)
    captured, program, args = program_of(model, mine)  # tracing runs a step
    mine["keys"].copy_(theirs["keys"])
    mine["values"].copy_(theirs["values"])
    assert WriteInPlace().run(program)
    program.graph_module.recompile()
    with torch.no_grad():
        want = model(**theirs)
        outputs = program.graph_module(*args)
    counts = [write for write in captured.writes if write.positions is None]
    assert [outputs[write.value] is None for write in captured.writes] == [
        write not in counts for write in captured.writes
    ]
    assert torch.equal(mine["keys"], theirs["keys"])  # before mutations are applied
    (result,) = apply_input_mutations(captured.writes, args, outputs, captured.num_results)
    assert torch.equal(result, want)
    for name in ("keys", "values", "count"):
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("is_written", [True, False])
def test_keeps_unread_rows(is_written: bool) -> None:
    class Attending(Step):
        def forward(self, embeds: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> Tensor:
            query, key, value = self.qkv(embeds).unsqueeze(1).chunk(3, -1)
            if is_written:
                count.add_(1)
                keys.index_copy_(2, count.view(1), key)
            values = torch.cat([values, value], 2)
            return embeds + F.scaled_dot_product_attention(query, values, values)[:, 0]

    captured, program, _ = program_of(Attending(), inputs())
    assert len(captured.writes) == 2 * is_written
    assert unchanged(WriteInPlace(), program)


def test_second_run_changes_nothing() -> None:
    program = program_of(Step(), inputs())[1]
    assert WriteInPlace().run(program)
    assert unchanged(WriteInPlace(), program)


def read_before(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    before = cache.mean()
    return cache.index_copy_(2, places, rows) + before


def twice(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    return cache.index_copy_(2, places, rows).index_copy_(2, places - 1, rows)


def another_layout(given: dict[str, Tensor]) -> None:
    given["keys"] = given["keys"].transpose(-1, -2).contiguous().transpose(-1, -2)


def as_it_is(given: dict[str, Tensor]) -> None:
    pass


@pytest.mark.parametrize(
    ("write", "change"), [(read_before, as_it_is), (twice, as_it_is), (scattered, another_layout)]
)
def test_copies_caches_with_other_readers(write: Callable[..., Tensor], change: Any) -> None:
    """Caches are not written twice, or before a read: prefills copy them, decoding steps are refused."""
    model, given = Step(write), inputs()
    change(given)
    captured, program, _ = program_of(model, given)
    before = str(program.graph)
    WriteInPlace().run(program)
    keys = program.graph.find_nodes(op="placeholder")[captured.writes[1].input]
    assert not [user for user in keys.users if user.target in IN_PLACE.values()]
    assert len(program.in_place) == (change is another_layout)  # the values
    assert unchanged(WriteInPlace(), program)
    if write is not scattered:
        assert str(program.graph) == before
    with pytest.raises(UnsupportedGraphError, match="an input is copied") as refusal:
        decode_step_program(captured)
    assert refusal.value.reason is Reason.MUTATED_INPUTS
    assert refusal.value.node is not None

"""``carry_states``: recurrent layers jump over reused rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.errors import PassError
from vlcache_fx.ops import bind_donors
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.rewrite import CarryStates, InsertLookups, SpliceRows
from vlcache_fx.passes.standard import warm_program
from vlcache_fx.spec.slots import Donor, Factor, Inputs, Joined, JumpAt, JumpMap, NumRows, Own, Term
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid

from .. import programs
from ..hybrids import LENGTH, PROMPT, own_donors, plan_of, small, unset
from ..programs import PassCase, bare, prepared, run, unchanged

CASE = PassCase(CarryStates(), (InsertLookups(), SpliceRows()))
KINDS = pytest.mark.parametrize("kinds", ["da", "sa", "ca", "ap", "cdsap"])


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("carry_states", CASE.shown(small("ca")[0]))


def test_change_of_a_recurrence(golden: Callable[[str, str], None]) -> None:
    golden("carry_states_recurrence", CASE.change(small("da")[0]))


def test_graph_of_two_samples(golden: Callable[[str, str], None]) -> None:
    """Each sample has its own rows; how many of them count is an input."""
    batch = {name: torch.cat([value, value]) for name, value in PROMPT.items()}
    golden("carry_states_batch", CASE.change(captured_graph(tiny_hybrid("ca"), batch)[0]))
    assert NumRows() in CASE.program(captured_graph(tiny_hybrid("da"), batch)[0]).slots


@KINDS
@pytest.mark.parametrize("last_only", [True, False])
def test_all_rows_equal_model(kinds: str, last_only: bool) -> None:
    captured, graph, want, _ = small(kinds, last_only)
    program = CASE.program(captured)
    tables = unset(program)  # NaN if any of its rows is read
    with bind_donors(tables):
        got = run(program, graph.calls[0], plan_of(program, LENGTH), tables)[0]
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@KINDS
@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("rows", [0, 2])
def test_jump_over_own_rows_equals_model(kinds: str, rows: int, last_only: bool) -> None:
    """In the context in which it was recorded, a donor is exact."""
    captured, graph, want, _ = small(kinds, last_only)
    program = warm_program(captured)
    plan = plan_of(program, rows)
    assert [jump.maps for jump in plan.jumps] == [(0, 1) if rows == 0 else (1,)]
    got = run(program, graph.calls[0], plan, own_donors(captured, graph.calls[0]))[0]
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", [Inputs, Factor, Term])
def test_reads_what_is_stored(kind: type) -> None:
    """Other tests could pass because nothing is read. Text in front makes factors count."""
    captured, graph, want, _ = small("da")
    program = warm_program(captured)
    donors = own_donors(captured, graph.calls[0])
    changed = {slot: table + 1 if isinstance(slot, kind) else table for slot, table in donors.items()}
    got = run(program, graph.calls[0], plan_of(program, 2), changed)[0]
    assert float((got - want).abs().max()) > 1e-4


def test_inputs_of_program() -> None:
    """One input for all layers where the values are equal; donors and own rows per layer."""
    program = CASE.program(small("cda")[0])
    added = [*program.slots]
    for slot in (JumpAt(), JumpMap(), Joined(3), Joined(4), Own(0, 3), Own(1, 4)):
        assert added.count(slot) == 1
    donors = [slot.stored for slot in added if isinstance(slot, Donor)]
    assert [str(slot) for slot in donors] == ["0.inputs.0", "1.inputs.0", "1.factor.0", "1.term.0"]


def test_keeps_decoders_of_attention() -> None:
    assert unchanged(CarryStates(), prepared(programs.small()[0]))


def test_requires_facts() -> None:
    program = bare(small("da")[0])
    before = str(program.graph)
    with pytest.raises(PassError, match=r"carry_states.*requires facts"):
        Pipeline((CarryStates(),)).run(program)
    assert str(program.graph) == before

"""Programs of a decoder with recurrent layers, for tests of passes.

The prompt has 16 tokens, an item at 3 to 11. Its donor has maps of two records: from its start to ``CUT``,
and from there to its end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.ir import Captured
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import cold_program
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.jumps import Record
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.spec.slots import Factor, Inputs, Matrix, Residual, StoredSlot, Term
from vlcache_fx.testing.graphs import TracedGraph, captured_graph
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm_inputs

from .programs import Rows, nothing_stored, run

START, LENGTH, TOKENS, CUT = 3, 9, 16, 2
PROMPT = tiny_vlm_inputs(START, TOKENS - START - LENGTH, [(LENGTH, 0)])
CUTS = (0, CUT, LENGTH)
RECORDS = (Record(0, START), Record(START, START + CUT), Record(START + CUT, START + LENGTH))


@functools.cache  # programs copy the graph, so tests can share it
def small(kinds: str, last_only: bool = True) -> tuple[Captured, TracedGraph, Tensor, TinyVlm]:
    """Return a decoder: captured, as traced, its unmodified result for ``PROMPT``, and the model."""
    model = tiny_hybrid(kinds, last_only=last_only)
    captured, graph = captured_graph(model, PROMPT)
    with torch.no_grad():
        return captured, graph, model(**PROMPT), model


def plan_of(program: Program, rows: int, records: Sequence[Record] = (), hit: bool = True) -> Plan:
    """Return a plan of ``PROMPT`` in which the item is a hit, with its first ``rows`` rows recomputed."""
    layers = program.decoder.num_layers
    return build_plan(
        num_tokens=TOKENS,
        spans=[Span(0, START, LENGTH, "key", hit, cuts=CUTS if hit else ())],
        num_layers=layers,
        policy=Rows((tuple(range(rows)),) * layers),
        budget=1.0,
        output_rows=program.decoder.tail_rows.positions(TOKENS),
        records=records,
    )


def recorded(program: Program, args: Sequence[Any], plan: Plan, donors: Any = None) -> dict[str, Tensor]:
    """Run a program; return what it records, by slot."""
    results = run(program, args, plan, donors)
    own = results[len(results) - len(program.recorded) :]
    return dict(zip(map(str, program.recorded), own, strict=True))


def unset(program: Program, maps: int = 2) -> dict[StoredSlot, Tensor]:
    """Return donor tables of NaN, which spread to every result that reads them."""
    tables = nothing_stored(program, LENGTH)
    for tail in program.decoder.tails:
        sizes = (*tail.convolution.source.meta["val"].shape[:2], tail.convolution.width)
        tables[tail.slot] = torch.full(sizes, float("nan"))
    for state in program.decoder.states:
        heads, keys, values = state.recurrence.state_sizes
        layer, index = state.layer, state.slot.index
        tables[Factor(layer, index)] = torch.full((maps, heads, keys, keys), float("nan"))
        tables[Term(layer, index)] = torch.full((maps, heads, keys, values), float("nan"))
    return tables


def own_donors(captured: Captured, args: Sequence[Any]) -> dict[StoredSlot, Tensor]:
    """Return donor tables with the item of this call."""
    cold = cold_program(captured)
    found = recorded(cold, args, plan_of(cold, 0, RECORDS, hit=False))
    tables: dict[StoredSlot, Tensor] = {}
    dims = {frontier.slot: frontier.dim for frontier in cold.decoder.frontiers}
    dims[Residual()] = cold.decoder.tail_rows.axis
    for slot in cold.recorded:
        value = found[str(slot)]
        match slot:
            case Inputs():
                width = value.shape[-1] // len(RECORDS)
                tables[slot] = value[..., -width:]
            case Factor() | Term():
                tables[slot] = value[0, 1:]
            case Matrix():
                pass
            case _:
                tables[slot] = value.narrow(dims[slot], START, LENGTH)
    return tables

"""Programs under test: how to make them, run them, and show them in golden files."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.capture import Captured
from vlcache_fx.passes import Pass, Pipeline, Program
from vlcache_fx.passes.standard import cold_program, copy_captured, warm_program
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.testing.graphs import TracedGraph, captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

PROMPT = tiny_vlm_inputs(3, 2, [(5, 0)])
"""Ten tokens; those of the image are 3 to 7."""
START, LENGTH, TOKENS = 3, 5, 10


@dataclass(frozen=True)
class Rows:
    """A policy that chooses exactly these offsets."""

    per_layer: tuple[tuple[int, ...], ...]
    ignores_budget: bool = True

    def select(self, span_length: int, num_layers: int, profile: Any, budget: float) -> list[Tensor]:
        return [torch.tensor(rows, dtype=torch.int64) for rows in self.per_layer]


@functools.cache  # programs are made of copies, so that tests can share it
def small(**options: Any) -> tuple[Captured, TracedGraph, Tensor]:
    """A one-layer decoder: captured, as traced, and its unmodified result for ``PROMPT``."""
    model = tiny_vlm(**{"num_layers": 1, **options})
    captured, graph = captured_graph(model, PROMPT)
    with torch.no_grad():
        return captured, graph, model(**PROMPT)


def prepared(captured: Captured, *earlier: Pass, warm: bool = True) -> Program:
    """A warm (or cold) program on which only ``earlier`` have run."""
    program = (warm_program if warm else cold_program)(captured, Pipeline(()))
    for step in earlier:
        step.run(program)
        program.properties |= step.ensures
    return program


def bare(captured: Captured) -> Program:
    """A program of a copy of the graph, without facts."""
    return Program(copy_captured(captured).graph_module)


def plan_for(program: Program, num_tokens: int, spans: Sequence[Span], policy: Any) -> Plan:
    return build_plan(
        num_tokens=num_tokens,
        spans=spans,
        num_layers=program.decoder.num_layers,
        policy=policy,
        budget=1.0,
        output_rows=program.decoder.tail_rows.positions(num_tokens),
    )


def everything(captured: Captured) -> Plan:
    """The plan of ``PROMPT`` in which its image is a hit and all rows are computed all the same."""
    program = prepared(captured)
    hit = Span(0, START, LENGTH, "key", True)
    return plan_for(program, TOKENS, [hit], Rows((tuple(range(LENGTH)),) * program.decoder.num_layers))


def run(
    program: Program, args: Sequence[Any], plan: Plan, donors: Mapping[str, Tensor] | None = None
) -> tuple[Any, ...]:
    """Run a program: its own results, then what it records."""
    bound: list[Tensor] = []
    for slot in program.slots:
        kind, _, rest = slot.partition(".")
        if kind == "donor":
            assert donors is not None
            bound.append(donors[rest])
        elif kind == "results":
            positions = program.decoder.tail_rows.positions(plan.num_tokens)
            assert positions is not None
            bound.append(torch.searchsorted(plan.rows[-1], positions))
        elif kind == "place":
            made_at, read_at = map(int, rest.split("."))
            bound.append(torch.searchsorted(plan.rows[made_at], plan.rows[read_at]))
        else:
            bound.append({"rows": plan.rows, "keep": plan.keep, "source": plan.source}[kind][int(rest)])
    program.graph.lint()
    program.graph_module.recompile()
    with torch.no_grad():
        return tuple(program.graph_module(*args, *bound))


def nothing_stored(program: Program, rows: int = LENGTH) -> dict[str, Tensor]:
    """Donor tables of NaN: whatever reads one of their rows shows it."""
    facts = program.decoder
    frontiers = {"residual": facts.stream.boundaries[-1]}
    axes = {"residual": facts.tail_rows.axis}
    for frontier in facts.frontiers:
        frontiers[frontier.slot], axes[frontier.slot] = frontier.node, frontier.dim
    tables = {}
    for slot, frontier in frontiers.items():
        sizes = [
            rows if dim == axes[slot] else int(size) for dim, size in enumerate(frontier.meta["val"].shape)
        ]
        tables[slot] = torch.full(sizes, float("nan"))
    return tables


def text(graph: fx.Graph) -> str:
    """The graph, one line per node that computes something or is an input that passes added."""
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if not node.name.startswith("arg"):
                lines.append(f"{node.name} = input")
            continue
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
            continue
        arguments = [_argument(argument) for argument in node.args]
        arguments += [f"{name}={_argument(value)}" for name, value in node.kwargs.items() if name != "device"]
        lines.append(f"{node.name} = {str(node.target).replace('.default', '')}({', '.join(arguments)})")
    return "\n".join(lines)


def _argument(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item) for item in value)}]"
    return "end" if value == 2**63 - 1 else str(value)


def before_and_after(step: Pass, program: Program) -> str:
    """Run the pass, which must change something: the graph before it, and what it changed as a diff."""
    before = text(program.graph)
    assert step.run(program)
    program.graph.lint()
    difference = difflib.unified_diff(
        before.splitlines(), text(program.graph).splitlines(), "before", "after", "", "", 1
    )
    return "\n".join([before, "", *(line.rstrip("\n") for line in difference)])


def unchanged(step: Pass, program: Program) -> bool:
    """True where the pass says that it changed nothing, and did not."""
    before = str(program.graph)
    return not step.run(program) and str(program.graph) == before

"""Build programs for tests, run them, and print them for golden files."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.ir import Captured
from vlcache_fx.ir.copies import copy_captured
from vlcache_fx.lowering import PendingTensor
from vlcache_fx.passes import Pass, Pipeline, Program
from vlcache_fx.passes.rewrite import HoistLookups, InsertLookups, SpliceRows, TrimTail
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.stack import StackedPlan, stack_plans
from vlcache_fx.plan.types import Plan, Span, SpanContext
from vlcache_fx.runtime.programs.bind import bind
from vlcache_fx.spec.slots import Residual, StoredSlot
from vlcache_fx.testing.graphs import TracedGraph, captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

PROMPT = tiny_vlm_inputs(3, 2, [(5, 0)])
"""Ten tokens; the image is at 3 to 7."""
START, LENGTH, TOKENS = 3, 5, 10
OTHER = tiny_vlm_inputs(1, 4, [(5, 1)], text_seed=1)
BOTH = {name: torch.cat([PROMPT[name], OTHER[name]]) for name in PROMPT}
"""Two samples of ten tokens; the image of the second is at 1 to 5."""
STARTS = (START, 1)
LOOKUPS = (InsertLookups(), SpliceRows(), HoistLookups())
"""The first passes of the warm pipeline."""
Donors = Mapping[StoredSlot, Tensor]
"""Donor tables."""


@dataclass(frozen=True)
class Rows:
    """A policy that chooses the given offsets."""

    per_layer: tuple[tuple[int, ...], ...]
    ignores_budget: bool = True

    def select(self, span: SpanContext) -> list[Tensor]:
        return [torch.tensor(rows, dtype=torch.int64) for rows in self.per_layer]


@functools.cache  # programs copy the graph, so tests can share it
def small(**options: Any) -> tuple[Captured, TracedGraph, Tensor]:
    """Return a decoder of one layer: captured, as traced, and its unmodified result for ``PROMPT``."""
    model = tiny_vlm(**{"num_layers": 1, **options})
    captured, graph = captured_graph(model, PROMPT)
    with torch.no_grad():
        return captured, graph, model(**PROMPT)


@functools.cache
def two_samples(**options: Any) -> tuple[Captured, TracedGraph, Tensor]:
    """As ``small``, for ``BOTH``."""
    model = tiny_vlm(**{"num_layers": 1, **options})
    captured, graph = captured_graph(model, BOTH)
    with torch.no_grad():
        return captured, graph, model(**BOTH)


def prepared(captured: Captured, *earlier: Pass, warm: bool = True) -> Program:
    """Return a warm (or cold) program after the passes ``earlier``."""
    program = (warm_program if warm else cold_program)(captured, Pipeline(()))
    for step in earlier:
        step.run(program)
        program.properties |= step.ensures
    return program


def bare(captured: Captured) -> Program:
    """Return a program of a copy of the graph, without facts."""
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
    """Return a plan of ``PROMPT`` whose image is a hit, with all rows recomputed."""
    program = prepared(captured)
    hit = Span(0, START, LENGTH, "key", True)
    return plan_for(program, TOKENS, [hit], Rows((tuple(range(LENGTH)),) * program.decoder.num_layers))


def plan_for_both(program: Program, *policies: Any) -> StackedPlan:
    """Return a plan of ``BOTH`` in which both images are hits; one policy for all, or one per image."""
    plans = [
        build_plan(
            num_tokens=TOKENS,
            spans=[Span(sample, start, LENGTH, "key", True)],
            num_layers=program.decoder.num_layers,
            policy=policies[sample % len(policies)],
            budget=1.0,
            output_rows=program.decoder.tail_rows.positions(TOKENS),
            first_donor=sample * LENGTH,
        )
        for sample, start in enumerate(STARTS)
    ]
    return stack_plans(plans)


def everything_of_both(program: Program) -> StackedPlan:
    return plan_for_both(program, Rows((tuple(range(LENGTH)),) * program.decoder.num_layers))


def bind_plan(
    program: Program, plan: Plan | StackedPlan, donors: Donors | None = None
) -> list[Tensor | PendingTensor]:
    """Return the values of the inputs that passes added, as the runtime binds them."""
    num_tokens = plan.num_tokens if isinstance(plan, Plan) else plan.plans[0].num_tokens
    positions = program.decoder.tail_rows.positions(num_tokens)
    return bind(tuple(program.slots), plan, positions, lambda: donors or {})


def run(
    program: Program,
    args: Sequence[Any],
    plan: Plan | StackedPlan,
    donors: Donors | None = None,
) -> tuple[Any, ...]:
    """Run a program; return its results, then the recorded tensors."""
    bound = bind_plan(program, plan, donors)
    program.graph.lint()
    program.graph_module.recompile()
    with torch.no_grad():
        return tuple(program.graph_module(*args, *bound))


@dataclass(frozen=True)
class PassCase:
    """A pass under test, with the passes around it.

    Attributes:
        step: the pass.
        earlier: passes before it.
        later: passes after it, for programs that are run.
    """

    step: Pass
    earlier: tuple[Pass, ...] = ()
    later: tuple[Pass, ...] = ()

    def before(self, captured: Captured, *, warm: bool = True) -> Program:
        """Return the program before the pass."""
        return prepared(captured, *self.earlier, warm=warm)

    def program(self, captured: Captured, *, warm: bool = True) -> Program:
        """Return the program after the pass and those after it."""
        return prepared(captured, *self.earlier, self.step, *self.later, warm=warm)

    def shown(self, captured: Captured, *, warm: bool = True) -> str:
        """Return the graph before the pass and its change as a diff, for golden files."""
        return before_and_after(self.step, self.before(captured, warm=warm))

    def change(self, captured: Captured) -> str:
        """Return the change of the pass as a diff."""
        return what_changes(self.step, self.before(captured))

    def check_all_rows(
        self, captured: Captured, graph: TracedGraph, want: Tensor, *, warm: bool = True
    ) -> None:
        """Check that the program with all rows computed equals the unmodified model, whatever is stored."""
        program = self.program(captured, warm=warm)
        plan = everything_of_both(program) if program.is_batched else everything(captured)
        donors = nothing_stored(program) if warm else None
        got = run(program, graph.calls[0], plan, donors)[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    def leaves_alone(self, captured: Captured, *, warm: bool = True) -> bool:
        """Return True if the pass changes nothing and returns False."""
        return unchanged(self.step, self.before(captured, warm=warm))


def results_without_and_with(
    case: PassCase,
    captured: Captured,
    args: Sequence[Any],
    offsets: tuple[int, ...],
    num_tokens: int = TOKENS,
) -> list[Tensor]:
    """Return the results for a few rows of the image, the others zero: without the pass, and with it."""
    results = []
    for more in ((), (case.step,)):
        program = prepared(captured, *case.earlier, *more, TrimTail())
        plan = plan_for(program, num_tokens, [Span(0, START, LENGTH, "key", True)], Rows((offsets,)))
        donors = {slot: torch.zeros_like(rows) for slot, rows in nothing_stored(program).items()}
        results.append(run(program, args, plan, donors)[0])
    return results


def nothing_stored(program: Program, rows: int = LENGTH) -> dict[StoredSlot, Tensor]:
    """Return donor tables of NaN, which spread to every result that reads them."""
    facts = program.decoder
    frontiers: dict[StoredSlot, fx.Node] = {Residual(): facts.stream.boundaries[-1]}
    axes: dict[StoredSlot, int] = {Residual(): facts.tail_rows.axis}
    for frontier in facts.frontiers:
        frontiers[frontier.slot], axes[frontier.slot] = frontier.node, frontier.dim
    tables = {}
    for slot, frontier in frontiers.items():
        sizes = [
            rows if dim == axes[slot] else int(size) for dim, size in enumerate(frontier.meta["val"].shape)
        ]
        if facts.batch_dims is not None:  # one table for all samples
            sizes[facts.batch_dims[frontier]] = 1
        tables[slot] = torch.full(sizes, float("nan"))
    return tables


def own_donors(
    captured: Captured, args: Sequence[Any], starts: Sequence[int] = STARTS
) -> dict[StoredSlot, Tensor]:
    """Return donor tables with the image of each sample, from this call."""
    cold = cold_program(captured)
    facts, count = cold.decoder, len(starts)
    plans = [plan_for(cold, TOKENS, [], Rows(())) for _ in starts]
    results = run(cold, args, plans[0] if count == 1 else stack_plans(plans))
    nodes: dict[StoredSlot, tuple[fx.Node, int]] = {one.slot: (one.node, one.dim) for one in facts.frontiers}
    nodes[Residual()] = (facts.stream.boundaries[-1], facts.tail_rows.axis)
    tables = {}
    for slot, value in zip(cold.recorded, results[len(results) - len(cold.recorded) :], strict=True):
        node, dim = nodes[slot]
        batch_dim = 0 if facts.batch_dims is None else facts.batch_dims[node]
        parts = [value.narrow(batch_dim, i, 1).narrow(dim, start, LENGTH) for i, start in enumerate(starts)]
        tables[slot] = torch.cat(parts, dim)
    return tables


def text(graph: fx.Graph) -> str:
    """Print the graph: a line per operator, and per input that passes added."""
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
    """Run the pass, which must change the graph; return the graph before and the change as a diff."""
    before = text(program.graph)
    return f"{before}\n\n{what_changes(step, program)}"


def what_changes(step: Pass, program: Program) -> str:
    """Run the pass, which must change the graph; return the change as a diff."""
    before = text(program.graph)
    assert step.run(program)
    program.graph.lint()
    difference = difflib.unified_diff(
        before.splitlines(), text(program.graph).splitlines(), "before", "after", "", "", 1
    )
    return "\n".join(line.rstrip("\n") for line in difference)


def unchanged(step: Pass, program: Program) -> bool:
    """Return True if the pass changes nothing and returns False."""
    before = str(program.graph)
    return not step.run(program) and str(program.graph) == before

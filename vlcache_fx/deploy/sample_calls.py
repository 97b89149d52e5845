"""Values for every input of the two programs: the example prompt, cold, and again with its spans reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.compiler.builders.decoder import Decoder
from vlcache_fx.compiler.builders.programs import program_spec
from vlcache_fx.deploy.trace import ExportInput
from vlcache_fx.errors import ExportError
from vlcache_fx.lowering import EagerLowering, PendingTensor
from vlcache_fx.passes import Program
from vlcache_fx.passes.partition.split_encoder import SplitEncoder
from vlcache_fx.plan import Span, build_plan
from vlcache_fx.policies.none import NoRows
from vlcache_fx.policies.uniform import Uniform
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.runtime.requests.spans import Identifier
from vlcache_fx.spec.slots import StoredSlot

EXAMPLE_BUDGET = 0.5


@dataclass(frozen=True)
class ExampleCall:
    """Inputs of one program, request data and slots, and what it makes of them."""

    inputs: tuple[Any, ...]
    results: tuple[Any, ...]


def example_calls(
    found: ExportInput, decoder: Decoder, cold: Program, warm: Program
) -> tuple[ExampleCall, ExampleCall]:
    """Run both programs eagerly on the example.

    Raises:
        ExportError: the example's placeholders and features do not agree, or hold no span.
    """
    args, spec = _arguments(found), decoder.spec
    engine = ServingEngine()
    named = [value for value, name in zip(args, found.inputs, strict=True) if name is not None]
    identified = Identifier(spec.spans, lambda *_: decoder.prologue().spans(*args)).media_spans(named)
    if identified is None:
        raise ExportError("example_inputs: placeholders and encoder features do not agree in number")
    _, num_tokens, spans = identified
    if not spans:
        raise ExportError("example_inputs hold no image, and no span is marked in them")
    positions = spec.positions(num_tokens, named)

    def call(
        name: str, program: Program, plan: Any, tables: dict[StoredSlot, Tensor | PendingTensor]
    ) -> ExampleCall:
        lowered = EagerLowering().lower(program.graph_module, name=name)
        runner = ProgramRunner(name, program_spec(program), lambda: lowered, decoder.device, engine)
        inputs = (*args, *runner.bind(plan, positions, lambda: tables))
        return ExampleCall(inputs, tuple(lowered(inputs)))

    common: dict[str, Any] = {
        "num_tokens": num_tokens,
        "num_layers": spec.num_layers,
        "output_rows": positions,
    }
    first = call("cold", cold, build_plan(**common, spans=(), policy=NoRows(), budget=0.0), {})
    recorded = dict(zip(cold.recorded, first.results[spec.num_outputs :], strict=True))
    marked = [Span(0, run.start, run.length, "example", True) for run in spans]
    tables: dict[StoredSlot, Tensor | PendingTensor] = {
        slot: torch.cat([recorded[slot].narrow(row.dim, one.start, one.length) for one in marked], row.dim)
        for slot, row in spec.rows.items()
    }
    plan = build_plan(
        **common, spans=marked, policy=Uniform(), budget=EXAMPLE_BUDGET, groups=spec.layer_groups
    )
    return first, call("warm", warm, plan, tables)


def _arguments(found: ExportInput) -> list[Any]:
    values: list[Any] = [
        found.weights[index][1] if index in found.weights else found.values.get(str(name))
        for index, name in enumerate(found.inputs)
    ]
    if found.split is not None:
        count = len(found.split.decoder.placeholders) - len(features_of(found.split))
        with torch.no_grad():
            values[count:] = found.split.encoder(*values[:count])
    return values


def features_of(split: SplitEncoder) -> Sequence[Any]:
    """The results of a split-off encoder."""
    results: Any = split.encoder.graph.output_node().args[0]
    return tuple(results)

"""Time that a cold run saves without the last layer's dead rows: ``python -m vlcache_fx.bench.dead_rows``.

Compares two cold programs of one graph, with and without these rows, in turn.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer

from vlcache_fx.analysis import analyze
from vlcache_fx.bench.machine import describe_machine
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import Summary, System, interleave, paired_ratio, time_once
from vlcache_fx.bench.workload import RequestShape, make_workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiler.builders.programs import program_runner
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.ir import Captured
from vlcache_fx.ir.copies import copy_captured
from vlcache_fx.passes import Program
from vlcache_fx.passes.annotate import DeclareInputs, TagSegments
from vlcache_fx.passes.pipeline import Pipeline
from vlcache_fx.passes.rewrite import RecordDonors
from vlcache_fx.passes.standard import cold_program
from vlcache_fx.plan.build import build_plan
from vlcache_fx.policies import get_policy
from vlcache_fx.testing.graphs import captured_graph


@dataclasses.dataclass(frozen=True)
class DeadRows:
    """Seconds of both programs, and the ratio (all rows / needed rows) within each round."""

    num_tokens: int
    seconds: dict[str, Summary]
    ratio: Summary


def measure_dead_rows(model: Any, shape: RequestShape, rounds: int, engine: Engine) -> DeadRows:
    """Time both cold programs of ``model``.

    Raises:
        UnsupportedGraphError: the model's graph cannot be rewritten.
    """
    request = make_workload(model, shape).first
    with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
        captured, graph = captured_graph(model, request, dynamic=True)
        args, num_tokens = graph.calls[0], request["input_ids"].shape[1]
        runs = {
            "all rows": _runner(captured, everything(captured), args, num_tokens, engine),
            "needed rows": _runner(captured, cold_program(captured), args, num_tokens, engine),
        }
        systems = {name: System(run) for name, run in runs.items()}
        for system in systems.values():
            time_once(system)  # compiles
        seconds = interleave(systems, rounds)
    ratio = paired_ratio(seconds["all rows"], seconds["needed rows"])
    return DeadRows(num_tokens, {name: Summary.of(values) for name, values in seconds.items()}, ratio)


def everything(captured: Captured) -> Program:
    """Build the cold program whose last layer computes all rows."""
    own = copy_captured(captured)
    program = Program(own.graph_module, analyze(own))
    program.row_inputs = (None,) * (program.decoder.num_layers + 1)
    Pipeline((RecordDonors(), TagSegments(), DeclareInputs())).run(program)
    return program


def _runner(
    captured: Captured, program: Program, args: Sequence[Any], num_tokens: int, engine: Engine
) -> Callable[[], object]:
    facts = analyze(captured)
    positions = facts.tail_rows.positions(num_tokens, args)
    plan = build_plan(
        num_tokens=num_tokens, spans=(), num_layers=facts.num_layers, policy=get_policy("none"), budget=0.0,
        output_rows=positions,
    )  # fmt: skip
    device = facts.stream.boundaries[0].meta["val"].device
    runner = program_runner("cold", program, device, engine)
    runner.ready()
    bound = runner.bind(plan, positions, dict)
    return lambda: runner.run(args, bound)


def main(
    preset: Annotated[str, typer.Option(help="model shape, see vlcache bench --help")] = "cpu",
    vision_tokens: Annotated[int, typer.Option(help="vision tokens of the photo")] = 4096,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Print times and ratio."""
    spec = find_preset(preset).with_feature_tower()
    model = build_model(spec, torch.bfloat16, torch.device("cpu"))
    found = measure_dead_rows(model, RequestShape(vision_tokens), rounds, Engine())
    for name, seconds in found.seconds.items():
        typer.echo(f"last layer, {name}: {seconds.milliseconds()}")
    typer.echo(f"all / needed rows: {found.ratio.text(3)}")
    machine = describe_machine()
    typer.echo(f"{preset}, {found.num_tokens} tokens, bfloat16; {machine.processor}, {machine.cores} cores, "
               f"torch {machine.torch}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)

"""What fitting donors costs: time of a warm call and bytes. ``python -m vlcache_fx.bench.fitted_donors``.

The same warm call reads a donor of one context, or one of several contexts with their differences, by turns
in one process. The contexts are the first one with changes of low rank: times do not depend on values.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import vlcache_fx
from vlcache_fx.bench.device import resolve_device, resolve_dtype, synchronizer
from vlcache_fx.bench.machine import describe_machine, machine_line
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import MeasurementError, Summary, System, interleave, paired_ratio, time_once
from vlcache_fx.bench.workload import RequestShape, make_workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.spec.slots import Key, StoredSlot, Value
from vlcache_fx.store.entry import Entry
from vlcache_fx.testing.donors import with_differences

ONE, FITTED, REFINE = "one context", "fitted", "add a context"


def other_context(entry: Entry, number: int, rank: int = 4) -> Entry:
    """A donor as of another context: keys and values change by a matrix of this rank."""
    made = torch.Generator().manual_seed(number)
    tensors = {}
    for name, tensor in entry.tensors.items():
        if not isinstance(StoredSlot.parse(name), Key | Value):
            tensors[name] = tensor
            continue
        rows = tensor.flatten(0, -2)
        left = torch.randn(len(rows), rank, generator=made)
        change = left @ torch.randn(rank, rows.shape[1], generator=made)
        tensors[name] = tensor + 0.1 * change.view(tensor.shape).to(tensor)
    return Entry(tensors, {**entry.info, "before": str(number), "contexts": [str(number)]})


def measure(
    preset: str,
    vision_tokens: int,
    *,
    contexts: int,
    rank: int,
    budget: float,
    rounds: int,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[dict[str, list[float]], float]:
    """Time warm calls with both donors.

    Returns:
        Seconds per round: of both warm calls, and of adding the last context to a donor; and the fitted
        donor's bytes as a share of the other's.

    Raises:
        MeasurementError: a call was not warm.
    """
    spec, place = find_preset(preset), resolve_device(device)
    own_dtype = resolve_dtype(dtype, place, vision_tokens, 1024)
    model = build_model(spec, own_dtype, place)
    with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
        workload = make_workload(model, RequestShape(vision_tokens))
        torch._dynamo.reset()
        reusing: Any = vlcache_fx.compile(model, budget=budget, dynamic=True, donor_rank=rank, strict=True)
        engine = reusing.vlcache
        reusing(**workload.first)
        key = engine.last_report["spans"][0]["key"]
        first = engine.store.get(key)
        if first is None:
            raise MeasurementError("no donor was recorded")
        others = [other_context(first, number) for number in range(1, contexts)]
        before = with_differences([first, *others[:-1]], rank, contexts)
        donors = {ONE: first, FITTED: with_differences([first, *others], rank)}

        def warm(name: str) -> System:
            def check() -> None:
                if engine.last_report["mode"] != "warm":
                    raise MeasurementError(f"{name}: {engine.last_report['reason']}")

            return System(
                lambda: reusing(**workload.second),
                prepare=lambda: engine.store.put(key, donors[name]),
                check=check,
                synchronize=synchronizer(place),
            )

        systems = {name: warm(name) for name in donors}
        systems[REFINE] = System(
            lambda: with_differences([before, others[-1]], rank, contexts), synchronize=synchronizer(place)
        )
        for system in systems.values():
            for _ in range(3):
                time_once(system)
        seconds = interleave(systems, rounds)
    engine.close()
    return seconds, donors[FITTED].nbytes / donors[ONE].nbytes


def main(
    preset: Annotated[str, typer.Option(help="model shape, see vlcache bench --help")] = "cpu",
    vision_tokens: Annotated[int, typer.Option(min=1, help="vision tokens of the picture")] = 4096,
    contexts: Annotated[int, typer.Option(min=2, help="contexts of the donor")] = 8,
    rank: Annotated[int, typer.Option(min=2, help="rank of their differences")] = 16,
    budget: Annotated[float, typer.Option(help="share of the picture that is recomputed")] = 0.02,
    rounds: Annotated[int, typer.Option(min=1, help="timing rounds")] = 15,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
) -> None:
    """Print a table."""
    seconds, share = measure(
        preset, vision_tokens, contexts=contexts, rank=rank, budget=budget, rounds=rounds, device=device,
        dtype=dtype,
    )  # fmt: skip
    table = Table(
        "", "time", title=f"{preset}, {vision_tokens:,} vision tokens, {contexts} contexts, rank {rank}"
    )
    for name, values in seconds.items():
        table.add_row(name, Summary.of(values).milliseconds(1))
    table.add_row("fitted / one context", paired_ratio(seconds[FITTED], seconds[ONE]).text(3))
    table.add_row("bytes", f"{share:.2f} of one context")
    Console(width=120).print(table)
    typer.echo(machine_line(describe_machine()))


if __name__ == "__main__":
    typer.run(main)

"""Time of a decoding step after a photo: ``python -m vlcache_fx.bench.decoding``."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from vlcache_fx.bench.floor import PrefixHitBaseline
from vlcache_fx.bench.machine import describe_machine
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import Summary, System, interleave, paired_ratio, time_once
from vlcache_fx.bench.systems import Systems, Variant
from vlcache_fx.bench.workload import RequestShape, Workload, make_workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings

EAGER, PLAIN, VLCACHE = "unmodified, eager", "unmodified, torch.compile", "vlcache"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Seconds of a step per system, and the ratio (plain ``torch.compile`` to vlcache) within each round."""

    num_tokens: int
    seconds: dict[str, Summary]
    ratio: Summary


def measure_decoding(
    model: Any, shape: RequestShape, rounds: int, lowering: str = "inductor", room: int = 0
) -> Decoding:
    """Time the last token of a prompt, with all others in the KV cache.

    Args:
        model: in eval mode, on its device.
        shape: the prompt's shape.
        rounds: number of rounds; each runs one step per system.
        lowering: see ``Systems``.
        room: free tokens of a static cache after the prompt; 0 for a dynamic cache.

    Raises:
        MeasurementError: a system left another number of tokens in the cache.
    """
    systems = Systems(model, lowering, [Variant()])
    with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
        workload = make_workload(model, shape)
        timed = decoding_systems(systems, workload, room)
        for system in timed.values():
            time_once(system)  # compiles
        seconds = interleave(timed, rounds)
    systems.close()
    found = {name: Summary.of(values) for name, values in seconds.items()}
    return Decoding(workload.num_tokens, found, paired_ratio(seconds[PLAIN], seconds[VLCACHE]))


def decoding_systems(systems: Systems, workload: Workload, room: int = 0) -> dict[str, System]:
    """Return the last step of the second request, per system; ``room`` as in ``measure_decoding``."""
    runs = {EAGER: systems.plain, PLAIN: systems.compiled, VLCACHE: systems.reusing}
    timed = {}
    for name, run in runs.items():
        new_cache = _static_cache(systems.plain, workload.num_tokens + room) if room else None
        step = PrefixHitBaseline(run, workload, 1, new_cache, systems.plain)
        timed[name] = System(step.run, step.prepare, step.check, synchronize=systems.synchronize)
    return timed


def _static_cache(model: Any, capacity_tokens: int) -> Callable[[], Any]:
    """Return a function that resets and returns one cache: compiled code depends on its address."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=capacity_tokens)

    def empty() -> Any:
        cache.reset()  # type: ignore[no-untyped-call]
        return cache

    return empty


def main(
    preset: Annotated[str, typer.Option(help="model shape, see vlcache bench --help")] = "cpu",
    vision_tokens: Annotated[int, typer.Option(help="vision tokens of the photo")] = 4096,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    lowering: Annotated[str, typer.Option(help="inductor or eager")] = "inductor",
    room: Annotated[
        int,
        typer.Option(min=0, help="use a static cache with room for this many tokens after the prompt"),
    ] = 0,
) -> None:
    """Print times and ratio."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(find_preset(preset).with_feature_tower(), torch.bfloat16, device)
    found = measure_decoding(model, RequestShape(vision_tokens), rounds, lowering, room)
    for name, seconds in found.seconds.items():
        typer.echo(f"{name}: {seconds.milliseconds(1)}")
    typer.echo(f"torch.compile / vlcache: {found.ratio.text(2)}")
    machine = describe_machine()
    cache = f", static cache with room for {room} more" if room else ""
    typer.echo(f"one token after {found.num_tokens - 1}{cache}; {preset}, bfloat16; {machine.processor}, "
               f"{machine.cores} cores, torch {machine.torch}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)

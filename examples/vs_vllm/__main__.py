"""Compare times to first token with vLLM. Run it: ``python -m examples.vs_vllm --output vs_vllm.json``."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from examples.vs_vllm import table
from examples.vs_vllm.answer import Peer
from examples.vs_vllm.cases import Script, photo_grid
from examples.vs_vllm.checkpoint import PeerShape, write_checkpoint
from examples.vs_vllm.comparison import COMPILED, EAGER, VLCACHE, VLLM, Comparison, compare
from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError
from examples.vs_vllm.remote import VllmPeer, engine_settings, other_photos
from vlcache_fx.bench.machine import Machine, describe_machine

CONSOLE_WIDTH = 160


def default_folder() -> Path:
    """Return this comparison's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlcache_fx" / "peers"


def own_cores(threads: int) -> list[int]:
    """Return the first ``threads`` processors available to this process; 0 for all."""
    cores = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return list(cores)[: threads or None]


def main(
    environment: Annotated[Path | None, typer.Option(help="Folder for vLLM, model and photos.")] = None,
    vision_tokens: Annotated[int, typer.Option(help="Vision tokens of the photo.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each has a new photo.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads per library; 0 for one per core.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Time one model on the same photos with this library, vLLM and transformers."""
    console = Console() if Console().is_terminal else Console(width=CONSOLE_WIDTH)
    kept = Environment((environment or default_folder()).absolute())
    try:
        photo_grid(vision_tokens)  # fail before the environment is built, which takes minutes
        kept.make(lambda step: console.print(f"building vLLM's environment: {step}", highlight=False))
        record, result = _measure(kept, vision_tokens, rounds, own_cores(threads), console)
    except (PeerError, ValueError) as error:
        console.print(f"error: {error}", highlight=False, markup=False)
        raise typer.Exit(1) from error
    model = record["model"]
    console.print(table.comparison_table(result, model["parameters"], model["dtype"]))
    console.print(table.notes(result), highlight=False)
    console.print(record["machine_line"], highlight=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {output}")


def _measure(
    kept: Environment, vision_tokens: int, rounds: int, cores: Sequence[int], console: Console
) -> tuple[dict[str, Any], Comparison]:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    untyped: Any = transformers_logging
    untyped.disable_progress_bar()
    torch.set_num_threads(len(cores))
    shape = PeerShape()
    write_checkpoint(shape, vision_tokens, kept.checkpoint)
    photos = kept.folder / "photos"
    try:
        script = Script(vision_tokens, shape.vocabulary, 0, photos)
        settings = engine_settings(kept.checkpoint, shape.dtype, script.round(0).cases["first"].num_tokens)
        script = dataclasses.replace(script, others=other_photos(settings, vision_tokens))
        console.print("starting vLLM (the first start compiles for minutes)")
        with VllmPeer(kept, settings, cores) as vllm, torch.no_grad():
            from examples.vs_vllm.local import CompiledPeer, LocalPeer, VlcachePeer  # slow to import

            eager = LocalPeer(kept.checkpoint)
            peers: dict[str, Peer] = {
                VLLM: vllm,
                VLCACHE: VlcachePeer(kept.checkpoint),
                EAGER: eager,
                COMPILED: CompiledPeer(kept.checkpoint),
            }
            parameters = sum(weight.numel() for weight in eager.model.parameters())
            result = compare(peers, script, rounds, console.print)
    finally:
        shutil.rmtree(photos, ignore_errors=True)
    machine = describe_machine()
    record = {
        "machine": dataclasses.asdict(machine),
        "machine_line": describe(machine, vllm.facts),
        "vllm": vllm.facts | {"settings": settings},
        "model": dataclasses.asdict(shape) | {"parameters": parameters},
        "comparison": result.as_dict(),
    }
    return record, result


def describe(machine: Machine, vllm: Mapping[str, Any]) -> str:
    """Describe the machine and the libraries in one line."""
    return (
        f"{machine.processor}, {machine.cores} cores; {machine.threads} threads, torch {machine.torch},"
        f" transformers {machine.transformers}; vLLM {vllm['vllm']} with {vllm['threads']} threads, torch"
        f" {vllm['torch']}, transformers {vllm['transformers']}"
    )


if __name__ == "__main__":
    typer.run(main)

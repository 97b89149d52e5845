"""Time to first token by tier of the donors: ``python -m vlcache_fx.bench.tiers``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from vlcache_fx.bench.device import dtype_name, resolve_dtype
from vlcache_fx.bench.machine import describe_machine
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.new_process import Task, ask_new_process, from_pixels
from vlcache_fx.bench.presets import ModelSpec, find_preset
from vlcache_fx.bench.rounds import MeasurementError, interleave
from vlcache_fx.bench.systems import GIB, Systems, Variant
from vlcache_fx.bench.tier_bench import COLD_PIXELS, MEMORY, MEMORY_PIXELS, TierBench
from vlcache_fx.bench.tier_table import TierRow, TiersResult, markdown, remarks, table
from vlcache_fx.bench.workload import RequestShape, make_workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.errors import OptionError, VlcacheError

NEW_PROCESS, MOONCAKE = "file, from pixels, in a new process", "mooncake on loopback"
SEGMENT_BYTES = 1 << 30


def measure_tiers(
    spec: ModelSpec,
    vision_tokens: int,
    rounds: int,
    folder: Path,
    *,
    donor_dtypes: tuple[str, ...] = (),
    images: int = 3,
    dtype: str = "auto",
    lowering: str = "inductor",
    mooncake: bool = True,
) -> TiersResult:
    """Time warm runs from each tier, in turn with the plain model and with cold runs.

    Args:
        spec: the model, on the CPU with random weights.
        vision_tokens: tokens of the image.
        rounds: rounds of all systems.
        folder: a new folder, for file tiers and logs.
        donor_dtypes: further ways to store donors, in memory and in files.
        images: images that a new process is asked about; 0 for no new process.
        dtype: name of the dtype, or ``auto``.
        lowering: lowering of the compiled models.
        mooncake: also start a Mooncake Store.

    Raises:
        MeasurementError: a run had another mode or tier than expected.
    """
    cpu, shape = torch.device("cpu"), RequestShape(vision_tokens)
    width = spec.config.get("text_config", spec.config).get("hidden_size", 1024)
    resolved = resolve_dtype(dtype, cpu, vision_tokens, width)
    model = build_model(spec.with_feature_tower(), resolved, cpu)
    workload = make_workload(model, shape)
    file, missing = Variant(store=f"file://{folder}/model"), dict[str, str]()
    packed = [
        Variant(store=store, donor_dtype=kind)
        for kind in donor_dtypes
        for store in ("memory://", f"file://{folder}/{kind}")
    ]
    with contextlib.ExitStack() as cluster:
        remote = _mooncake(folder, cluster, missing) if mooncake else None
        variants = [MEMORY, file, *packed, *([remote] if remote else [])]
        systems = Systems(model, lowering, variants, 4 * GIB)
        cluster.callback(systems.close)
        with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
            bench = TierBench(systems, workload, folder)
            bench.add_references()
            bench.add_tier("memory", MEMORY)
            bench.add_tier("file, warm page cache", file)
            bench.add_tier("file, cold page cache", file, lambda: bench.drop_pages(file))
            for variant in packed:
                tier = variant.store.partition("://")[0]
                bench.add_tier(f"{tier}, {variant.donor_dtype} donors", variant)
            if remote is not None:
                bench.add_tier(MOONCAKE, remote)
            bench.add_pixels()
            bench.cached_shares.clear()
            seconds = interleave(bench.systems, rounds)
            known = from_pixels(model, workload, images + 1)[:-1] if images else []
            bench.record(file, [first for first, _ in known])
    rows = [dataclasses.replace(row, seconds=seconds[name]) for name, row in bench.rows.items()]
    notes = [_on_pages(bench.cached_shares), "Features are given, except in rows from pixels."]
    if images:
        options = {"store": file.store, "policy": file.policy, "budget": file.budget, "lowering": lowering}
        task = Task(spec, shape, images, dtype_name(resolved), {**options, "dynamic": True})
        answers = ask_new_process(task)
        if answers.tiers != ["file"]:
            raise MeasurementError(f"the new process found donors in {answers.tiers}, not in the file tier")
        rows.append(TierRow(NEW_PROCESS, answers.seconds, MEMORY_PIXELS, COLD_PIXELS))
        notes.append(
            f"The new process compiled with an image of its own. Its first answer about each of {images} "
            "other images, which this process had recorded, was warm, with features from the store."
        )
    return TiersResult(
        machine=describe_machine(),
        model=spec.name,
        dtype=dtype_name(resolved),
        variant=MEMORY,
        vision_tokens=workload.vision_tokens,
        num_tokens=workload.num_tokens,
        rows=rows,
        missing=missing,
        notes=notes,
    )


def _on_pages(shares: list[float]) -> str:
    share = max(shares, default=0.0)
    return (
        "Before each run with a cold page cache, the kernel was asked to drop the files' pages; at most "
        f"{100 * share:.0f} % of them remained."
    )


def _mooncake(folder: Path, cluster: contextlib.ExitStack, missing: dict[str, str]) -> Variant | None:
    """Start a Mooncake Store that ends with ``cluster``; note why, where that is not possible."""
    from vlcache_fx.testing import mooncake_cluster

    reason = mooncake_cluster.missing()
    if not reason:
        try:
            started = mooncake_cluster.MooncakeCluster(folder, SEGMENT_BYTES)
            cluster.enter_context(started)
            return Variant(store=started.url())
        except (OSError, VlcacheError) as error:
            reason = str(error)
    missing[MOONCAKE] = reason
    return None


def main(
    preset: Annotated[str, typer.Option(help="model shape, see vlcache bench --help")] = "cpu",
    vision_tokens: Annotated[int, typer.Option(help="vision tokens of the photo")] = 4096,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    images: Annotated[int, typer.Option(min=0, help="images for the new process; 0: none")] = 3,
    donor_dtype: Annotated[
        list[str] | None, typer.Option(help="further ways to store donors: int8, float8")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "inductor",
    folder: Annotated[Path | None, typer.Option(help="parent of the file tier (default: /tmp)")] = None,
    mooncake: Annotated[bool, typer.Option(help="time a Mooncake Store on loopback")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
) -> None:
    """Measure time to first token of an image seen before, by tier of its donors, on this CPU."""
    with _readable_errors(), tempfile.TemporaryDirectory(prefix="vlcache-tiers-", dir=folder) as temporary:
        result = measure_tiers(
            find_preset(preset),
            vision_tokens,
            rounds,
            Path(temporary),
            donor_dtypes=tuple(donor_dtype or ()),
            images=images,
            dtype=dtype,
            lowering=lowering,
            mooncake=mooncake,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), indent=1))
    elif as_markdown:
        typer.echo(markdown(result))
    else:
        Console().print(table(result))
        for line in remarks(result):
            typer.echo(line)


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except (OptionError, MeasurementError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)

"""``vlcache export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import vlcache_fx
from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import (
    Json,
    check_output_folder,
    examples,
    print_json,
    result_console,
    stdout_for_json,
)
from vlcache_fx.cli.progress import showing_progress
from vlcache_fx.errors import OptionError

if TYPE_CHECKING:
    from vlcache_fx.deploy.describe import ExportReport
    from vlcache_fx.deploy.engines import EngineOptions

EPILOG = examples(
    "vlcache export reference exported/",
    "vlcache export path/to/model engines/ --data prompts.jsonl --format tensorrt",
)

DTYPES = ("float32", "float16", "bfloat16")


def export(
    model: Annotated[
        str, typer.Argument(help="reference, photo, hybrid, or a folder of a transformers model")
    ],
    directory: Annotated[Path, typer.Argument(help="output folder; must not exist, or be empty")],
    data: Annotated[
        Path | None,
        typer.Option(help="prompts as for fidelity; the first prompt with a recurring image is the example"),
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="onnx, tensorrt")] = "onnx",
    opset: Annotated[int, typer.Option(help="18 to 23; attention is one node in 23, decomposed below")] = 22,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16")] = "float32",
    policy: Annotated[
        str, typer.Option(help="policy that decides which layers share their rows")
    ] = "layer_aware",
    budget: Annotated[float, typer.Option(help="share of token-layers to recompute")] = 0.02,
    profile: Annotated[
        Path | None, typer.Option(help="profile of this model, from vlcache calibrate")
    ] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPUs for engines of tensorrt_rtx, such as sm86")
    ] = None,
    package: Annotated[
        str | None, typer.Option(help="tensorrt, tensorrt_rtx (default: the installed package)")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="maximum prompt length of engines (default: 8192)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export encoder, cold and warm prefill and decoding step as ONNX graphs or TensorRT engines."""
    with readable_errors():
        with stdout_for_json(as_json):
            if dtype not in DTYPES:
                raise OptionError(f"dtype {dtype!r} is not valid: it must be one of {', '.join(DTYPES)}")
            check_output_folder(directory)
            engine = None
            if output_format == "tensorrt":
                engine = _engine_options(compute_capability or (), package, tokens)
            with showing_progress(f"loading {model}") as steps:
                loaded, inputs = _example(model, data, dtype)
                steps.begin(f"exporting to {directory}")
                report = vlcache_fx.export(
                    loaded,
                    inputs,
                    directory,
                    format=output_format,
                    opset=opset,
                    engine=engine,
                    policy=policy,
                    budget=budget,
                    profile=profile,
                )
        if as_json:
            print_json(report.as_dict())
        else:
            _show(report)


def _example(model: str, data: Path | None, dtype: str) -> tuple[Any, dict[str, Any]]:
    """Load the model, and the inputs of its example prompt."""
    import torch

    from vlcache_fx.fidelity.models import check_name, load_cases, load_model
    from vlcache_fx.integrations.transformers_output import without_bars

    check_name(model)
    example = load_cases(model, data, (), 1, split="test", seed=0)[0].asked
    with without_bars():
        loaded, processor = load_model(model)
    loaded = loaded.to(getattr(torch, dtype))
    inputs = dict(processor(text=[example.text], images=list(example.images), return_tensors="pt"))
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(getattr(torch, dtype))
    return loaded, inputs


def _engine_options(
    compute_capabilities: Sequence[str], package: str | None, tokens: int | None
) -> EngineOptions:
    from vlcache_fx.deploy.engines import EngineOptions

    settings: dict[str, Any] = {"package": package}
    if compute_capabilities:
        settings["compute_capabilities"] = tuple(compute_capabilities)
    if tokens is not None:
        settings["sizes"] = {"tokens": (2, max(2, tokens // 2), tokens)}
    return EngineOptions(**settings)


def _show(report: ExportReport) -> None:
    table = Table("file", "size, kB", "build, s", title=report.directory)
    seconds = {f"{name}.engine": values["build_seconds"] for name, values in report.engines.items()}
    for name, size in report.files.items():
        table.add_row(name, f"{size / 1e3:,.0f}", f"{seconds[name]:.1f}" if name in seconds else "")
    console = result_console()
    console.print(table)
    console.print(
        f"{len(report.lookups)} lookups in {len(report.restricted)} layers; "
        f"the warm graph has {len(report.hoisted)} inputs for donors and plan"
    )
    for part in report.refused:
        console.print(f"not exported: {part['graph']}: {part['reason']}")

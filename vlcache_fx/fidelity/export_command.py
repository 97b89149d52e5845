"""What ``vlcache export`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vlcache_fx
from vlcache_fx.deploy.describe import ExportReport
from vlcache_fx.deploy.engines import EngineOptions
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.models import load_cases, load_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    model: str,
    directory: Path,
    *,
    data: Path | None,
    output_format: str,
    opset: int,
    dtype: str,
    compute_capabilities: Sequence[str],
    package: str | None,
    tokens: int | None,
    options: dict[str, Any],
) -> ExportReport:
    """Export a model by name or folder, with its first prompt as the example; print what was written.

    Raises:
        VlcacheError: see ``vlcache_fx.export``; and for what the arguments name.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r} is not valid: it must be one of {', '.join(DTYPES)}")
    example = load_cases(model, data, (), 1, split="test", seed=0)[0].asked
    loaded, processor = load_model(model)
    loaded = loaded.to(DTYPES[dtype])
    inputs = dict(processor(text=[example.text], images=list(example.images), return_tensors="pt"))
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(DTYPES[dtype])
    engine = None
    if output_format == "tensorrt":
        settings: dict[str, Any] = {"package": package}
        if compute_capabilities:
            settings["compute_capabilities"] = tuple(compute_capabilities)
        if tokens is not None:
            settings["sizes"] = {"tokens": (2, max(2, tokens // 2), tokens)}
        engine = EngineOptions(**settings)
    report = vlcache_fx.export(
        loaded, inputs, directory, format=output_format, opset=opset, engine=engine, **options
    )
    _show(report)
    return report


def _show(report: ExportReport) -> None:
    table = Table("file", "size, kB", "build, s", title=report.directory)
    seconds = {f"{name}.engine": values["build_seconds"] for name, values in report.engines.items()}
    for name, size in report.files.items():
        table.add_row(name, f"{size / 1e3:,.0f}", f"{seconds[name]:.1f}" if name in seconds else "")
    console = Console()
    console.print(table)
    console.print(
        f"{len(report.lookups)} lookups in {len(report.restricted)} layers; "
        f"the warm graph has {len(report.hoisted)} inputs for them and for the plan"
    )
    for part in report.refused:
        console.print(f"not exported: {part['graph']}: {part['reason']}")

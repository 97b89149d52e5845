"""Cold and warm prefill of an exported model on ONNX Runtime: ``python -m vlcache_fx.bench.onnx_ttft``.

Requests contain encoder outputs. The cold run computes all tokens; the warm run reuses a photo that was seen
after another text, at another position. Both are timed in turn.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import vlcache_fx
from vlcache_fx.bench.machine import describe_machine
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import (
    MeasurementError,
    Summary,
    System,
    interleave,
    paired_ratio,
    time_once,
)
from vlcache_fx.bench.workload import RequestShape, Workload, make_pixels, make_workload
from vlcache_fx.deploy.describe import ExportReport
from vlcache_fx.deploy.sessions import OnnxSession
from vlcache_fx.integrations.transformers import OUTPUTS

EXAMPLE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class OnnxTimes:
    """Seconds of cold and warm runs, and their ratio within each round."""

    vision_tokens: int
    num_tokens: int
    cold: Summary
    warm: Summary
    ratio: Summary


def export_preset(model: Any, directory: Path, opset: int) -> ExportReport:
    """Export a preset's model; the example contains a small photo."""
    work = make_workload(model, RequestShape(EXAMPLE_TOKENS))
    pixels = make_pixels(model, 1, EXAMPLE_TOKENS)
    ids = work.first["input_ids"]
    image = ids == model.config.image_token_id
    example = {**_text(work.first), **pixels, "mm_token_type_ids": image.int()}
    return vlcache_fx.export(model, example, directory, opset=opset)


def inputs_of(request: dict[str, Any]) -> dict[str, Tensor]:
    """Convert the model's inputs to those of a session."""
    (features,) = request[OUTPUTS].values()
    return {**_text(request), "image.pooler_output.0": torch.cat(tuple(features.pooler_output))}


def _text(request: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in request.items() if name in ("input_ids", "position_ids")}


def measure(session: OnnxSession, work: Workload, rounds: int) -> OnnxTimes:
    """Time cold and warm runs.

    Raises:
        MeasurementError: a run had another mode.
    """
    first, second = inputs_of(work.first), inputs_of(work.second)

    def check(mode: str) -> Any:
        def check_mode() -> None:
            report = session.vlcache.last_report
            if report is None or report["mode"] != mode:
                raise MeasurementError(f"expected a {mode} run: {report}")

        return check_mode

    def clear() -> None:
        session.vlcache.clear()

    def record_donors() -> None:
        clear()
        session.prefill(**first)

    systems = {
        "cold": System(lambda: session.prefill(**second), clear, check("cold")),
        "warm": System(lambda: session.prefill(**second), record_donors, check("warm")),
    }
    for system in systems.values():
        time_once(system)  # loads the graph
    seconds = interleave(systems, rounds)
    return OnnxTimes(
        work.vision_tokens,
        work.num_tokens,
        Summary.of(seconds["cold"]),
        Summary.of(seconds["warm"]),
        paired_ratio(seconds["cold"], seconds["warm"]),
    )


def main(
    preset: Annotated[str, typer.Option(help="model shape, see vlcache bench --help")] = "cpu",
    vision_tokens: Annotated[
        list[int] | None, typer.Option(help="vision tokens of the photo (default: 1024, 4096)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    opset: Annotated[int, typer.Option(help="opset of the graphs")] = 22,
) -> None:
    """Print times and ratios."""
    model = build_model(find_preset(preset).with_feature_tower(), torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        report = export_preset(model, Path(folder) / "export", opset)
        typer.echo(f"exported: {report.size_bytes / 1e6:,.0f} MB, opset {opset}")
        for count in vision_tokens or (1024, 4096):
            session = OnnxSession(report.directory)
            times = measure(session, make_workload(model, RequestShape(count)), rounds)
            typer.echo(
                f"{times.vision_tokens} vision tokens: cold {times.cold.milliseconds()}, warm "
                f"{times.warm.milliseconds()}, cold / warm {times.ratio.text(1)}"
            )
    machine = describe_machine()
    typer.echo(
        f"{preset}, float32; {machine.processor}, {machine.cores} cores, torch {machine.torch}, onnxruntime "
        f"{_version()}"
    )


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


if __name__ == "__main__":
    typer.run(main)

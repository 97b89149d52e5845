"""The console script ``vlcache``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import vlcache_fx
from vlcache_fx.errors import VlcacheError

app = typer.Typer(
    help="Reuse of vision encoder outputs and KV caches for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Errors of this package as one line, without a traceback, and exit status 1."""
    try:
        yield
    except VlcacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(vlcache_fx.__version__)


@app.command()
def policies() -> None:
    """List the policies that are installed."""
    from vlcache_fx.policies import get_policy, known_policies  # here: torch takes a second to import

    table = Table("policy", "implementation", "what it recomputes")
    with readable_errors():
        for name, entry in known_policies().items():
            summary = (type(get_policy(name)).__doc__ or "").strip().partition("\n\n")[0]
            table.add_row(name, entry.value, " ".join(summary.split()))
    Console().print(table)


@app.command()
def bench(
    preset: Annotated[str, typer.Option(help="shape of the model, see below")] = "cpu",
    config: Annotated[
        Path | None, typer.Option(help="config.json of another model, in place of a preset")
    ] = None,
    model_class: Annotated[
        str | None, typer.Option(help="its class in transformers [default: the file's architecture]")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="decoder layers, in place of the model's")] = None,
    vision_tokens: Annotated[list[int] | None, typer.Option(help="per image [default: the preset's]")] = None,
    images: Annotated[list[int] | None, typer.Option(help="per sample [default: 1]")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="samples per call [default: 1]")] = None,
    text_before: Annotated[int, typer.Option(help="tokens before the images when they are new")] = 20,
    text_after: Annotated[int, typer.Option(help="tokens behind them; swapped when they are back")] = 40,
    policy: Annotated[
        list[str] | None, typer.Option(help="see vlcache policies [default: layer_aware]")
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="share recomputed [default: 0.02]")] = None,
    store: Annotated[list[str] | None, typer.Option(help="URL [default: memory://]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:<number>")] = "auto",
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "inductor",
    cuda_graphs: Annotated[bool, typer.Option(help="on a GPU, the option of that name")] = False,
    rounds: Annotated[int, typer.Option(help="of timing; systems take turns in each")] = 5,
    eager_rounds: Annotated[int, typer.Option(help="of them with the eager model")] = 1,
    encoder: Annotated[bool, typer.Option(help="time the model's vision tower")] = True,
    compile_time: Annotated[bool, typer.Option(help="time compilation, in processes of their own")] = True,
    compile_layers: Annotated[
        list[int] | None, typer.Option(help="depths for that [default: the model's]")
    ] = None,
    store_entries: Annotated[
        list[int] | None, typer.Option(help="sizes for lookups [default: 100 to 100,000]")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="for bench.json and bench.png")] = Path("bench-output"),
) -> None:
    """Time to first token with and without reuse, of a model with random weights on real photos.

    Presets: tiny, cpu, cpu-28, qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-8b. Options that have a list of values
    are given several times; every combination is measured.
    """
    given = {
        "vision_tokens": vision_tokens,
        "images": images,
        "batch": batch,
        "compile_layers": compile_layers,
        "store_entries": store_entries,
    }
    with readable_errors():
        from vlcache_fx.bench import command  # here: torch takes a second to import

        command.bench(
            command.choose_model(preset, config, model_class, layers),
            output_dir,
            compile_time=compile_time,
            variants=command.combine(policy, budget, store),
            text_before=text_before,
            text_after=text_after,
            dtype=dtype,
            device=device,
            lowering=lowering,
            cuda_graphs=cuda_graphs,
            rounds=rounds,
            eager_rounds=eager_rounds,
            encoder=encoder,
            **{name: tuple(values) for name, values in given.items() if values},
        )


_DATA = typer.Option(
    help="prompts, one JSON object a line: images (paths), prompt, answer; lines about the same images "
    "reuse them [default: the model's own questions]"
)
_POSITIONS = typer.Option(help="answer tokens compared at most")


@app.command()
def fidelity(
    model: Annotated[str, typer.Argument(help="reference, photo, or a folder that transformers can load")],
    data: Annotated[Path | None, _DATA] = None,
    family: Annotated[list[str] | None, typer.Option(help="of the model's questions [default: all]")] = None,
    count: Annotated[int, typer.Option(help="questions per family")] = 100,
    policy: Annotated[
        list[str] | None, typer.Option(help="see vlcache policies [default: all that take a budget]")
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="share recomputed [default: 0 0.01 0.02 0.05 0.1 0.2 1]")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="of this model, from vlcache calibrate")] = None,
    batch: Annotated[int, typer.Option(help="prompts per call")] = 16,
    positions: Annotated[int, _POSITIONS] = 1,
    seed: Annotated[int, typer.Option(help="of the questions")] = 0,
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "eager",
    output_dir: Annotated[Path, typer.Option(help="for fidelity.json, .md and .png")] = Path(
        "fidelity-output"
    ),
) -> None:
    """Accuracy, agreement and divergence of policies and budgets, against the unmodified model."""
    with readable_errors():
        from vlcache_fx.fidelity import command  # here: torch takes a second to import
        from vlcache_fx.fidelity.run import BUDGETS

        command.fidelity(
            model,
            data=data,
            families=family or (),
            count=count,
            policies=policy or (),
            budgets=budget or BUDGETS,
            profile=profile,
            batch=batch,
            positions=positions,
            seed=seed,
            output_dir=output_dir,
            options={"lowering": lowering, "strict": True},
        )


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="reference, photo, or a folder that transformers can load")],
    data: Annotated[Path | None, _DATA] = None,
    family: Annotated[list[str] | None, typer.Option(help="of the model's questions [default: all]")] = None,
    count: Annotated[int, typer.Option(help="questions per family")] = 30,
    batch: Annotated[int, typer.Option(help="prompts per call")] = 16,
    positions: Annotated[int, _POSITIONS] = 1,
    depth_share: Annotated[
        float, typer.Option(help="share of the rows that is stopped at each depth")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="of the questions")] = 0,
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "eager",
    output: Annotated[Path, typer.Option(help="the profile")] = Path("profile.json"),
) -> None:
    """Measure what recomputing is worth in each layer of a model; write its profile."""
    with readable_errors():
        from vlcache_fx.fidelity import command  # here: torch takes a second to import

        command.calibration(
            model,
            data=data,
            families=family or (),
            count=count,
            batch=batch,
            positions=positions,
            depth_share=depth_share,
            seed=seed,
            output=output,
            options={"lowering": lowering, "strict": True},
        )


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="reference, photo, or a folder that transformers can load")],
    directory: Annotated[Path, typer.Argument(help="where to write; must not exist, or be empty")],
    data: Annotated[
        Path | None, typer.Option(help="prompts as for fidelity; the first reuse of them is the example")
    ] = None,
    output_format: Annotated[str, typer.Option("--format", help="onnx, tensorrt")] = "onnx",
    opset: Annotated[int, typer.Option(help="18 to 23; from 23 on attention is one node")] = 22,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16")] = "float32",
    policy: Annotated[str, typer.Option(help="decides which layers share their rows")] = "layer_aware",
    budget: Annotated[float, typer.Option(help="share recomputed")] = 0.02,
    profile: Annotated[Path | None, typer.Option(help="of this model, from vlcache calibrate")] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPUs of engines that tensorrt_rtx builds, such as sm86")
    ] = None,
    package: Annotated[str | None, typer.Option(help="tensorrt, tensorrt_rtx [default: installed]")] = None,
    tokens: Annotated[int | None, typer.Option(help="longest prompt of engines [default: 8192]")] = None,
) -> None:
    """Write encoder, cold and warm prefill and decoding step as ONNX graphs or TensorRT engines."""
    with readable_errors():
        from vlcache_fx.fidelity import export_command  # here: torch takes a second to import

        export_command.export(
            model,
            directory,
            data=data,
            output_format=output_format,
            opset=opset,
            dtype=dtype,
            compute_capabilities=compute_capability or (),
            package=package,
            tokens=tokens,
            options={"policy": policy, "budget": budget, "profile": profile},
        )

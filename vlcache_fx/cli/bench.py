"""``vlcache bench``: options of ``vlcache_fx.bench.command``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import Json, examples, print_json, result_console, stdout_for_json
from vlcache_fx.cli.progress import showing_progress

EPILOG = examples(
    "vlcache bench --preset cpu --budget 0.02 --budget 0.1",
    "vlcache bench --preset qwen2.5-vl-7b --vision-tokens 1024 --json",
)


def bench(
    preset: Annotated[str, typer.Option(help="model shape, see below")] = "cpu",
    config: Annotated[
        Path | None, typer.Option(help="config.json of another model, instead of a preset")
    ] = None,
    model_class: Annotated[
        str | None, typer.Option(help="class of that model in transformers (default: its architecture)")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="number of decoder layers (default: the model's)")
    ] = None,
    vision_tokens: Annotated[
        list[int] | None, typer.Option(help="tokens per image (default: the preset's)")
    ] = None,
    images: Annotated[list[int] | None, typer.Option(help="images per sample (default: 1)")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="samples per call (default: 1)")] = None,
    text_before: Annotated[int, typer.Option(help="text tokens before new images")] = 20,
    text_after: Annotated[
        int, typer.Option(help="text tokens after new images; swapped when the images recur")
    ] = 40,
    policy: Annotated[
        list[str] | None, typer.Option(help="policies, see vlcache policies (default: layer_aware)")
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="share of token-layers to recompute (default: 0.02)")
    ] = None,
    store: Annotated[list[str] | None, typer.Option(help="store URLs (default: memory://)")] = None,
    donor_dtype: Annotated[
        list[str] | None, typer.Option(help="how donors are stored: model, int8, float8 (default: model)")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:<number>")] = "auto",
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "inductor",
    cuda_graphs: Annotated[bool, typer.Option(help="use CUDA graphs on a GPU")] = False,
    rounds: Annotated[int, typer.Option(help="timing rounds; each times all systems in turn")] = 5,
    eager_rounds: Annotated[int, typer.Option(help="timing rounds with the eager model")] = 1,
    encoder: Annotated[bool, typer.Option(help="time the vision encoder")] = True,
    compile_time: Annotated[bool, typer.Option(help="time compilation, in separate processes")] = True,
    compile_layers: Annotated[
        list[int] | None, typer.Option(help="numbers of layers for compile times (default: the model's)")
    ] = None,
    store_entries: Annotated[
        list[int] | None, typer.Option(help="store sizes for lookup times (default: 100 to 100,000)")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="folder for bench.json and bench.png")] = Path(
        "bench-output"
    ),
    as_json: Json = False,
) -> None:
    """Measure time to first token with and without reuse, for a model with random weights and real photos.

    Presets: tiny, cpu, cpu-28, qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-8b; with recurrent layers: tiny-hybrid,
    cpu-hybrid, qwen3.5-4b, qwen3.5-9b. Repeat an option to pass several values; every combination is
    measured.
    """
    given = {
        "vision_tokens": vision_tokens,
        "images": images,
        "batch": batch,
        "compile_layers": compile_layers,
        "store_entries": store_entries,
    }
    with readable_errors():
        with stdout_for_json(as_json):
            from vlcache_fx.bench import command  # deferred: importing torch takes a second

            console = None if as_json else result_console()
            with showing_progress("reading the settings", console=console) as steps:
                result = command.bench(
                    command.choose_model(preset, config, model_class, layers),
                    output_dir,
                    compile_time=compile_time,
                    console=console,
                    progress=steps.show,
                    variants=command.combine(policy, budget, store, donor_dtype),
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
        if as_json:
            print_json(asdict(result))

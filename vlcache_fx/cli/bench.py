"""``vlcache bench``; ``vlcache_fx.bench.command`` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlcache_fx.cli.errors import readable_errors


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
    text_after: Annotated[int, typer.Option(help="tokens after them; swapped when they are back")] = 40,
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

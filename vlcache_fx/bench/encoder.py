"""Time of the vision encoder, which reuse skips."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from vlcache_fx.bench.device import synchronizer
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import ModelSpec
from vlcache_fx.bench.rounds import Summary, System, do_nothing, time_once
from vlcache_fx.bench.workload import encode, make_pixels


@dataclasses.dataclass(frozen=True)
class EncoderTime:
    """Seconds to encode one image of ``vision_tokens`` with the model's full vision encoder, eagerly."""

    vision_tokens: int
    seconds: Summary


def measure_encoder(
    spec: ModelSpec,
    vision_tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int = 3,
    after_size: Callable[[], None] = do_nothing,
) -> list[EncoderTime]:
    """Time the full vision encoder of ``spec`` at each image size.

    Args:
        spec: the model; only one decoder layer is built.
        vision_tokens: tokens per image.
        dtype, device: dtype and device of the encoder.
        rounds: timed runs, after one warm-up run.
        after_size: called after each size.
    """
    model = build_model(spec.with_layers(1), dtype, device)
    found = []
    for tokens in vision_tokens:
        pixels = make_pixels(model, 1, tokens)
        system = System(lambda pixels=pixels: encode(model, pixels), synchronize=synchronizer(device))  # type: ignore[misc]
        time_once(system)
        seconds = Summary.of([time_once(system) for _ in range(rounds)])
        rows = encode(model, pixels).pooler_output[0].shape[-2]
        found.append(EncoderTime(rows, seconds))
        after_size()
    return found

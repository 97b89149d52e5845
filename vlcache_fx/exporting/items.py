"""Which encoder graph each item of a request goes through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import ExportError
from vlcache_fx.exporting.manifest import EncoderSpec, Manifest
from vlcache_fx.integrations.encoder_cache import PIXELS


@dataclass(frozen=True)
class EncoderCall:
    """One call of an encoder: the graph's inputs in order."""

    spec: EncoderSpec
    values: tuple[Tensor, ...]


def encoder_inputs(manifest: Manifest, inputs: Mapping[str, Any]) -> Iterator[EncoderCall]:
    """The calls that a request needs, items in order. None where features are given.

    Raises:
        ExportError: pixels for which there is no encoder, or of a grid for which there is none.
    """
    for modality in dict.fromkeys(spec.modality for spec in manifest.encoders):
        specs = [spec for spec in manifest.encoders if spec.modality == modality]
        if any(name in inputs for name in specs[0].features):
            continue
        if not modality:
            names = list(manifest.graphs[specs[0].graph].inputs)
            if all(isinstance(inputs.get(name), Tensor) for name in names):
                yield EncoderCall(specs[0], tuple(inputs[name] for name in names))
            continue
        pixels, grids = PIXELS[modality]
        values = inputs.get(pixels)
        if not isinstance(values, Tensor):
            continue
        for grid, part in _items(values, inputs.get(grids), specs[0].grid is not None, grids):
            yield EncoderCall(_encoder_for(specs, grid, modality), (part,))
    _check_modalities(manifest, inputs)


def _items(
    pixels: Tensor, grids: Any, has_grids: bool, name: str
) -> Iterator[tuple[tuple[int, ...] | None, Tensor]]:
    if not has_grids:
        yield from ((None, part) for part in torch.split_with_sizes(pixels, [1] * pixels.shape[0]))
        return
    if not isinstance(grids, Tensor):
        raise ExportError(f"input {name!r} is missing: it says which pixels belong to which item")
    counts = grids.prod(-1).tolist()
    if sum(counts) != pixels.shape[0]:
        raise ExportError(f"{name} asks for {sum(counts)} rows of pixels, {pixels.shape[0]} are given")
    for grid, part in zip(grids.tolist(), torch.split_with_sizes(pixels, counts), strict=True):
        yield tuple(grid), part


def _encoder_for(specs: list[EncoderSpec], grid: tuple[int, ...] | None, modality: str) -> EncoderSpec:
    for spec in specs:
        if spec.grid is None or spec.grid == grid:
            return spec
    known = ", ".join("x".join(map(str, spec.grid or ())) for spec in specs)
    shown = "x".join(map(str, grid or ()))
    raise ExportError(
        f"no encoder was exported for an {modality} of {shown} patches; there are some for {known}: export "
        "with an example that holds such an item, or give its features"
    )


def _check_modalities(manifest: Manifest, inputs: Mapping[str, Any]) -> None:
    known = {spec.modality for spec in manifest.encoders}
    if "" in known:
        return
    for modality, (pixels, _) in PIXELS.items():
        if isinstance(inputs.get(pixels), Tensor) and modality not in known:
            raise ExportError(f"{pixels} are given, but this export holds no encoder for a {modality}")

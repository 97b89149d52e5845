"""Assigns an encoder graph to each item of a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import EncoderGraph
from vlcache_fx.errors import ExportError
from vlcache_fx.integrations.encoder_cache import PIXELS
from vlcache_fx.integrations.stages import split_pixels


@dataclass(frozen=True)
class EncoderCall:
    """One call of an encoder: the graph, and its inputs in order."""

    spec: EncoderGraph
    values: tuple[Tensor, ...]


def encoder_inputs(manifest: Manifest, inputs: Mapping[str, Any]) -> Iterator[EncoderCall]:
    """Yield the encoder calls of a request, in the order of its items; none if the request has features.

    Raises:
        ExportError: no encoder was exported for an item's modality or grid.
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
        missing = [name for name in specs[0].fixed if not isinstance(inputs.get(name), Tensor)]
        if missing:
            raise ExportError(f"input {missing[0]!r} is missing: the encoder needs it for each item")
        fixed_inputs = {name: inputs[name] for name in specs[0].fixed}
        for part, fixed in split_pixels(values, fixed_inputs, grids):
            yield EncoderCall(_encoder_for(specs, fixed, modality), (part,))
    _check_modalities(manifest, inputs)


def _encoder_for(specs: list[EncoderGraph], fixed: Mapping[str, Tensor], modality: str) -> EncoderGraph:
    given = {name: tuple(value.flatten().tolist()) for name, value in fixed.items()}
    for spec in specs:
        if spec.fixed == given:
            return spec
    raise ExportError(
        f"no encoder was exported for {modality} items with {_format(given)}, only for "
        f"{'; '.join(_format(spec.fixed) for spec in specs)}: export with an example that contains such an "
        f"item, or pass its features ({', '.join(specs[0].features)})"
    )


def _format(fixed: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, value))}" for name, value in fixed.items())


def _check_modalities(manifest: Manifest, inputs: Mapping[str, Any]) -> None:
    exported = {spec.modality for spec in manifest.encoders}
    if "" in exported:
        return
    for modality, (pixels, _) in PIXELS.items():
        if isinstance(inputs.get(pixels), Tensor) and modality not in exported:
            raise ExportError(f"input {pixels!r}: this export has no {modality} encoder")

"""Inputs of one request, checked against the graphs' inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import TensorSpec, torch_dtype
from vlcache_fx.errors import ExportError
from vlcache_fx.integrations.encoder_cache import PIXELS
from vlcache_fx.integrations.stages import IGNORED_ARGUMENTS

POSITIONS = "position_ids"


def decoder_inputs(
    manifest: Manifest, given: Mapping[str, Any], features: Mapping[str, Tensor], device: torch.device
) -> list[Tensor]:
    """Return the inputs of the prefill graphs, in the order of ``manifest.inputs``.

    Args:
        manifest: the export's manifest.
        given: the request's inputs by name.
        features: encoder outputs of the request's items by name.
        device: the graphs' device.

    Raises:
        ExportError: an input is missing, unknown, or has another dtype or shape.
    """
    _check_names(manifest, given)
    specs = _specs(manifest)
    optional = {manifest.inputs[index] for index in manifest.decoder.spans.features}
    values = {**given, **features}
    ids = values.get("input_ids")
    if not optional & values.keys() and POSITIONS in specs and isinstance(ids, Tensor):
        values.setdefault(POSITIONS, _text_positions(specs[POSITIONS], ids.shape[-1]))
    found = []
    sizes: dict[str, tuple[int, str]] = {}
    for name in manifest.inputs:
        value, spec = values.get(name), specs.get(name)
        if value is None and spec is not None and name in optional:  # a prompt without items
            shape = [0 if isinstance(size, str) else size for size in spec.shape]
            value = torch.zeros(shape, dtype=torch_dtype(spec))
        if value is None and spec is None:  # an input of the encoder alone, in a prompt without items
            value = torch.zeros(0)
        if not isinstance(value, Tensor):
            raise ExportError(f"input {name!r} is missing; the request has: {', '.join(values) or 'none'}")
        if spec is not None:
            _check(name, value, spec)
            _check_sizes(name, value, spec, sizes)
        found.append(value.to(device))
    return found


def _check_sizes(name: str, value: Tensor, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> None:
    """Check that sizes of equal names are equal; ``sizes``: name -> size and input of its first use."""
    for want, size in zip(spec.shape, value.shape, strict=True):
        if isinstance(want, str) and sizes.setdefault(want, (size, name))[0] != size:
            other, owner = sizes[want]
            raise ExportError(f"input {name!r} has {size} {want}, but {owner!r} has {other}")


def with_a_row(value: Tensor) -> Tensor:
    """Replace an empty tensor by one row of zeros: graphs index rows before they select from them."""
    return value if value.numel() else value.new_zeros([max(1, size) for size in value.shape])


def num_tokens(manifest: Manifest, inputs: list[Tensor]) -> int:
    """Return the number of tokens of the prompt.

    Raises:
        ExportError: no input has a dimension of tokens.
    """
    specs = _specs(manifest)
    for name, value in zip(manifest.inputs, inputs, strict=True):
        shape = specs[name].shape if name in specs else ()
        if "tokens" in shape:
            return int(value.shape[shape.index("tokens")])
    raise ExportError("no input has a dimension of tokens")


def _specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """Specs of all inputs of the prefill graphs."""
    warm, cold = (manifest.graphs[program.graph].inputs for program in (manifest.warm, manifest.cold))
    return {**warm, **cold}


def _check_names(manifest: Manifest, given: Mapping[str, Any]) -> None:
    of_items = {name for pair in PIXELS.values() for name in pair}
    of_encoders = {name for spec in manifest.encoders for name in manifest.graphs[spec.graph].inputs}
    fixed = {name for spec in manifest.encoders for name in spec.fixed}
    expected = {*manifest.inputs, *of_items, *of_encoders, *fixed, *IGNORED_ARGUMENTS}
    unknown = [name for name in given if name not in expected]
    if unknown:
        valid = ", ".join(dict.fromkeys((*manifest.inputs, *sorted(of_encoders))))
        raise ExportError(f"input {unknown[0]!r} is unknown; the inputs of these graphs are: {valid}")
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise ExportError("attention_mask contains zeros: exported graphs do not support padding")


def _text_positions(spec: TensorSpec, length: int) -> Tensor:
    """Positions of a prompt without items."""
    sizes = [size if isinstance(size, int) else length for size in spec.shape]
    return torch.arange(length).expand(sizes)


def _check(name: str, value: Tensor, spec: TensorSpec) -> None:
    if value.dtype != torch_dtype(spec):
        raise ExportError(f"input {name!r} has dtype {value.dtype}; the graphs expect {torch_dtype(spec)}")
    fits = value.dim() == len(spec.shape) and all(
        isinstance(want, str) or size == want for size, want in zip(value.shape, spec.shape, strict=True)
    )
    if not fits:
        raise ExportError(
            f"input {name!r} has shape {list(value.shape)}; the graphs expect {list(spec.shape)}"
        )

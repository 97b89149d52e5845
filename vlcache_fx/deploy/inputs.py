"""The inputs of one request, checked against what the graphs take."""

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
    """What the prefill graphs are given, in the order of ``manifest.inputs``.

    Args:
        manifest: of the export.
        given: the request.
        features: of its items.
        device: where the graphs run.

    Raises:
        ExportError: an input is missing, unknown, or of another dtype or shape.
    """
    _check_names(manifest, given)
    specs = _specs(manifest)
    optional = {manifest.inputs[index] for index in manifest.decoder.spans.features}
    values = {**given, **features}
    ids = values.get("input_ids")
    if not optional & values.keys() and POSITIONS in specs and isinstance(ids, Tensor):
        values.setdefault(POSITIONS, _counted(specs[POSITIONS], ids.shape[-1]))
    found = []
    sizes: dict[str, tuple[int, str]] = {}
    for name in manifest.inputs:
        value, spec = values.get(name), specs.get(name)
        if value is None and spec is not None and name in optional:  # a prompt may hold no item
            form = [0 if isinstance(size, str) else size for size in spec.shape]
            value = torch.zeros(form, dtype=torch_dtype(spec))
        if value is None and spec is None:  # only an encoder reads it, and there is no item
            value = torch.zeros(0)
        if not isinstance(value, Tensor):
            raise ExportError(f"input {name!r} is missing; given were: {', '.join(values) or 'none'}")
        if spec is not None:
            _check(name, value, spec)
            _check_sizes(name, value, spec, sizes)
        found.append(value.to(device))
    return found


def _check_sizes(name: str, value: Tensor, spec: TensorSpec, known: dict[str, tuple[int, str]]) -> None:
    """Sizes of one name are equal; ``known`` has those of earlier inputs, and whose they are."""
    for want, size in zip(spec.shape, value.shape, strict=True):
        if isinstance(want, str) and known.setdefault(want, (size, name))[0] != size:
            other, whose = known[want]
            raise ExportError(f"input {name!r} has {size} {want}, {whose!r} has {other}")


def with_a_row(value: Tensor) -> Tensor:
    """Nothing becomes one row of zeros: graphs look rows up before they choose, so there must be one."""
    return value if value.numel() else value.new_zeros([max(1, size) for size in value.shape])


def num_tokens(manifest: Manifest, inputs: list[Tensor]) -> int:
    """Tokens of the prompt.

    Raises:
        ExportError: no input says it.
    """
    specs = _specs(manifest)
    for name, value in zip(manifest.inputs, inputs, strict=True):
        shape = specs[name].shape if name in specs else ()
        if "tokens" in shape:
            return int(value.shape[shape.index("tokens")])
    raise ExportError("no input says how many tokens the prompt has")


def _specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """Of every input of the prefill graphs."""
    warm, cold = (manifest.graphs[program.graph].inputs for program in (manifest.warm, manifest.cold))
    return {**warm, **cold}


def _check_names(manifest: Manifest, given: Mapping[str, Any]) -> None:
    of_items = {name for pair in PIXELS.values() for name in pair}
    of_encoders = {name for one in manifest.encoders for name in manifest.graphs[one.graph].inputs}
    told = {name for one in manifest.encoders for name in one.fixed}
    known = {*manifest.inputs, *of_items, *of_encoders, *told, *IGNORED_ARGUMENTS}
    unknown = [name for name in given if name not in known]
    if unknown:
        valid = ", ".join(dict.fromkeys((*manifest.inputs, *sorted(of_encoders))))
        raise ExportError(f"input {unknown[0]!r} is unknown; these graphs take: {valid}")
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise ExportError("attention_mask hides tokens; exported graphs take prompts without padding")


def _counted(spec: TensorSpec, length: int) -> Tensor:
    """Positions of a prompt of text alone."""
    sizes = [size if isinstance(size, int) else length for size in spec.shape]
    return torch.arange(length).expand(sizes)


def _check(name: str, value: Tensor, spec: TensorSpec) -> None:
    if value.dtype != torch_dtype(spec):
        raise ExportError(f"input {name!r} is {value.dtype}; the graphs take {torch_dtype(spec)}")
    fits = value.dim() == len(spec.shape) and all(
        isinstance(want, str) or size == want for size, want in zip(value.shape, spec.shape, strict=True)
    )
    if not fits:
        raise ExportError(
            f"input {name!r} has the shape {list(value.shape)}; the graphs take {list(spec.shape)}"
        )

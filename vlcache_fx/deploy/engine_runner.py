"""Runs graphs as TensorRT engines on a GPU: buffers shared with torch, one stream, no host copies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.deploy.engines import find_package
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import TORCH_DTYPES, EngineSpec
from vlcache_fx.errors import ExportError


class EngineRunner:
    """Runs the engines of one folder; loads each at its first use.

    Args:
        directory: the folder.
        manifest: its manifest.
        device: a GPU.

    Raises:
        ExportError: the folder has no engines, there is no GPU, or the engines were built for another GPU or
            by another package or version.
    """

    def __init__(self, directory: Path, manifest: Manifest, device: str | torch.device = "cuda") -> None:
        if not manifest.engines:
            raise ExportError(f"{directory} contains no engines: export with format='tensorrt'")
        if not torch.cuda.is_available():
            raise ExportError("engines need an NVIDIA GPU, and torch finds none: use OnnxSession")
        self.device = torch.device(device)
        major, minor = torch.cuda.get_device_capability(self.device)
        trt = check_engines(manifest, f"sm{major}{minor}")
        self._directory, self._manifest = directory, manifest
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._contexts: dict[str, tuple[Any, Any]] = {}

    def check(self, graph: str, inputs: Mapping[str, Tensor]) -> None:
        """Raise ExportError for inputs beyond the engine's sizes; ``inputs`` may be incomplete."""
        check_shapes(graph, self._manifest.engines[graph], inputs)

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a graph on the current stream; return its outputs by name.

        Raises:
            ExportError: inputs beyond the engine's sizes, or an error of TensorRT.
        """
        spec = self._manifest.engines[graph]
        check_shapes(graph, spec, inputs)
        missing = [name for name in spec.profile if name not in inputs]
        if missing:
            raise ExportError(f"{graph} lacks inputs: {', '.join(missing)}")
        if graph not in self._contexts:
            engine = self._runtime.deserialize_cuda_engine((self._directory / spec.file).read_bytes())
            if engine is None:
                raise ExportError(f"TensorRT cannot load {spec.file}")
            # A context does not keep its engine alive.
            self._contexts[graph] = (engine, engine.create_execution_context())
        context = self._contexts[graph][1]
        outputs, kept = bind(context, spec, inputs, self._manifest.graphs[graph].outputs, self.device)
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise ExportError(f"TensorRT cannot run {graph}")
        del kept  # the allocator frees it in stream order
        return outputs


def check_engines(manifest: Manifest, capability: str) -> Any:
    """Return the package that built the engines.

    Raises:
        ExportError: the installed version differs, or the engines were not built for ``capability``.
    """
    spec = next(iter(manifest.engines.values()))
    name, version = spec.builder.split()
    trt = find_package(name)
    if trt.__version__ != version:
        raise ExportError(
            f"the engines were built by {spec.builder}, but {trt.__version__} is installed: build them again"
        )
    if capability not in spec.compute_capabilities:
        built = ", ".join(spec.compute_capabilities)
        raise ExportError(
            f"the engines were built for {built}, but this GPU is {capability}: build them again"
        )
    return trt


def check_shapes(graph: str, spec: EngineSpec, inputs: Mapping[str, Tensor]) -> None:
    """Raise ExportError for inputs beyond the engine's sizes."""
    for name, (low, _, high) in spec.profile.items():
        if name not in inputs:
            continue
        shape = tuple(inputs[name].shape)
        if len(shape) != len(low) or any(
            not least <= size <= most for size, least, most in zip(shape, low, high, strict=True)
        ):
            raise ExportError(
                f"input {name!r} of {graph} has shape {list(shape)}; the engine accepts {list(low)} to "
                f"{list(high)}: export with larger sizes"
            )


def bind(
    context: Any,
    spec: EngineSpec,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Any],
    device: torch.device,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Bind inputs and new outputs to an execution context; return outputs, and tensors to keep alive."""
    kept = []
    for name in spec.profile:
        value = inputs[name].to(device=device, dtype=TORCH_DTYPES[spec.dtypes[name]]).contiguous()
        context.set_input_shape(name, tuple(value.shape))
        context.set_tensor_address(name, value.data_ptr())
        kept.append(value)
    made = {}
    for name in outputs:
        shape = tuple(context.get_tensor_shape(name))
        made[name] = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtypes[name]], device=device)
        context.set_tensor_address(name, made[name].data_ptr())
    return made, kept

"""Graphs as TensorRT engines on a GPU: device buffers shared with torch, one stream, no host copies."""

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
    """Runs the engines of one folder, each loaded when first used.

    Args:
        directory: of the engines.
        manifest: its description.
        device: a GPU.

    Raises:
        ExportError: the export holds no engines, there is no GPU, or engines and GPU or package do not fit.
    """

    def __init__(self, directory: Path, manifest: Manifest, device: str | torch.device = "cuda") -> None:
        if not manifest.engines:
            raise ExportError(f"{directory} holds no engines: export with format='tensorrt'")
        if not torch.cuda.is_available():
            raise ExportError("engines run on an NVIDIA GPU, and torch sees none here: use OnnxSession")
        self.device = torch.device(device)
        major, minor = torch.cuda.get_device_capability(self.device)
        trt = check_engines(manifest, f"sm{major}{minor}")
        self._directory, self._manifest = directory, manifest
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._contexts: dict[str, tuple[Any, Any]] = {}

    def check(self, graph: str, inputs: Mapping[str, Tensor]) -> None:
        """Raises ExportError for inputs beyond the sizes that the engine was built for; others may follow."""
        check_shapes(graph, self._manifest.engines[graph], inputs)

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a graph by name, on the current stream.

        Raises:
            ExportError: sizes that the engine was not built for, or TensorRT refuses.
        """
        spec = self._manifest.engines[graph]
        check_shapes(graph, spec, inputs)
        missing = [name for name in spec.profile if name not in inputs]
        if missing:
            raise ExportError(f"inputs of {graph} are missing: {', '.join(missing)}")
        if graph not in self._contexts:
            engine = self._runtime.deserialize_cuda_engine((self._directory / spec.file).read_bytes())
            if engine is None:
                raise ExportError(f"TensorRT cannot load {spec.file}")
            # The context does not keep its engine alive.
            self._contexts[graph] = (engine, engine.create_execution_context())
        context = self._contexts[graph][1]
        outputs, kept = bind(context, spec, inputs, self._manifest.graphs[graph].outputs, self.device)
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise ExportError(f"TensorRT cannot run {graph}")
        del kept  # freed in the order of the stream
        return outputs


def check_engines(manifest: Manifest, capability: str) -> Any:
    """The package that built the engines.

    Raises:
        ExportError: it is not there in the same version, or they were not built for GPUs of ``capability``.
    """
    spec = next(iter(manifest.engines.values()))
    name, version = spec.builder.split()
    trt = find_package(name)
    if trt.__version__ != version:
        raise ExportError(
            f"the engines were built by {spec.builder}; {trt.__version__} is installed: build them again"
        )
    if capability not in spec.compute_capabilities:
        built = ", ".join(spec.compute_capabilities)
        raise ExportError(f"the engines were built for {built}; this GPU is {capability}: build them again")
    return trt


def check_shapes(graph: str, spec: EngineSpec, inputs: Mapping[str, Tensor]) -> None:
    """Raises ExportError for inputs that the engine does not take."""
    for name, (low, _, high) in spec.profile.items():
        if name not in inputs:
            continue
        shape = tuple(inputs[name].shape)
        if len(shape) != len(low) or any(
            not least <= size <= most for size, least, most in zip(shape, low, high, strict=True)
        ):
            raise ExportError(
                f"input {name!r} of {graph} has the shape {list(shape)}; the engine takes {list(low)} to "
                f"{list(high)}: export with other sizes"
            )


def bind(
    context: Any,
    spec: EngineSpec,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Any],
    device: torch.device,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Hand tensors' memory to an execution context; its outputs, and what must live until it has run."""
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

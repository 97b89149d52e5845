"""Runs graphs with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.deploy.folder_checks import check_external_data
from vlcache_fx.deploy.manifest import Manifest, missing
from vlcache_fx.errors import ExportError

NUMPY_DTYPES = frozenset({"float", "float16", "double", "int64", "int32", "bool"})


class OnnxRunner:
    """Runs the graphs of one folder on the CPU; loads each at its first use.

    Args:
        directory: the folder.
        manifest: its manifest.
        providers: execution providers, in order.

    Raises:
        ExportError: ONNX Runtime is not installed, has no such provider, or the graphs have an input dtype
            that numpy lacks.
    """

    device = torch.device("cpu")

    def __init__(self, directory: Path, manifest: Manifest, providers: Sequence[str]) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing("onnxruntime", "onnx") from error
        available = onnxruntime.get_available_providers()
        for name in providers:
            if name not in available:
                raise ExportError(
                    f"ONNX Runtime has no provider {name!r}; available are {', '.join(available)}"
                )
        used = {spec.dtype for graph in manifest.graphs.values() for spec in graph.inputs.values()}
        for dtype in sorted(used - NUMPY_DTYPES):
            raise ExportError(
                f"ONNX Runtime does not accept {dtype} inputs from Python: export the model in float32 or "
                "float16"
            )
        self._directory, self._manifest, self._providers = directory, manifest, list(providers)
        self._loaded: dict[str, Any] = {}

    def check(self, graph: str, inputs: Mapping[str, Tensor]) -> None:
        """Accept any sizes, as ONNX Runtime does."""

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a graph; return its outputs by name.

        Raises:
            ExportError: ONNX Runtime rejects the graph or the inputs.
        """
        import onnxruntime

        if graph not in self._loaded:
            path = self._directory / self._manifest.graphs[graph].file
            check_external_data(path, self._manifest.files)
            try:
                self._loaded[graph] = onnxruntime.InferenceSession(str(path), providers=self._providers)
            except Exception as error:  # its exceptions have no common base class but Exception
                raise ExportError(f"ONNX Runtime cannot load {path.name}: {error}") from error
        names = list(self._manifest.graphs[graph].outputs)
        feeds = {name: value.contiguous().numpy() for name, value in inputs.items()}
        try:
            results = self._loaded[graph].run(names, feeds)
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot run {graph}: {error}") from error
        return {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}

"""Sessions on ONNX Runtime and TensorRT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlcache_fx.deploy.engine_runner import EngineRunner
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.onnx_runner import OnnxRunner
from vlcache_fx.deploy.session import Session


class OnnxSession(Session):
    """An exported folder on ONNX Runtime.

    Args:
        directory: a folder that ``vlcache_fx.export`` wrote.
        providers: execution providers of ONNX Runtime, in order.
        **options: see ``Options``.

    Raises:
        ExportError: the folder is missing or was changed, or a package is missing.
        OptionError, PolicyError: a bad option.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        **options: Any,
    ) -> None:
        manifest = Manifest.load(Path(directory))
        super().__init__(manifest, OnnxRunner(Path(directory), manifest, providers), options)


class EngineSession(Session):
    """An exported folder on TensorRT: tensors stay on the GPU; graphs run on torch's current stream.

    Args:
        directory: a folder that ``vlcache_fx.export(format="tensorrt")`` wrote.
        device: a GPU of a compute capability that the engines were built for.
        **options: see ``Options``.

    Raises:
        ExportError: see ``OnnxSession``; or no GPU, no engines, or engines of another GPU or version.
        OptionError, PolicyError: a bad option.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, device: str | torch.device = "cuda", **options: Any
    ) -> None:
        manifest = Manifest.load(Path(directory))
        super().__init__(manifest, EngineRunner(Path(directory), manifest, device), options)

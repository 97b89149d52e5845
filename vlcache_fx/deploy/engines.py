"""TensorRT engines of exported graphs, built by ``tensorrt`` or by ``tensorrt_rtx`` (similar APIs).

``tensorrt`` builds for the GPU of this machine. ``tensorrt_rtx`` builds ahead of time, without a GPU, for the
GPUs in ``AHEAD_OF_TIME``.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlcache_fx.deploy.manifest import Manifest, missing
from vlcache_fx.deploy.operators import ATTENTION_OPSET
from vlcache_fx.deploy.specs import COLD, WARM, EngineSpec, GraphSpec, TensorSpec
from vlcache_fx.errors import ExportError, OptionError

PACKAGES = ("tensorrt", "tensorrt_rtx")
AHEAD_OF_TIME = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""GPUs that ``tensorrt_rtx`` can build for ahead of time. It does not support data-centre GPUs from sm90 on:
build on these with ``tensorrt``."""

TIMING_CACHE = "timing.cache"
REQUIRED = (COLD, WARM)

Shape = tuple[int, ...]
Range = tuple[int, int, int]
"""Minimum, optimal and maximum size."""

DEFAULT_TOKENS: Range = (2, 1024, 8192)
DEFAULT_TAIL: Range = (1, 2, 2)


@dataclass(frozen=True)
class EngineOptions:
    """GPUs and sizes of engines.

    Attributes:
        package: ``tensorrt`` or ``tensorrt_rtx``; by default the first that is installed.
        compute_capabilities: GPUs for ``tensorrt_rtx``, such as ``("sm86", "sm89")``. ``tensorrt`` builds for
            the GPU of this machine.
        sizes: minimum, optimum and maximum of each dynamic size (``tokens``, ``image_tokens``,
            ``donor_rows``, ``rows_0``, ``past_tokens``, ...). The others default to the maximum of
            ``tokens``, which is 8,192 by default.

    Raises:
        OptionError: an unknown package or GPU, or sizes that are not sorted.
    """

    package: str | None = None
    compute_capabilities: tuple[str, ...] = ("sm80", "sm86", "sm89", "sm120")
    sizes: Mapping[str, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.package is not None and self.package not in PACKAGES:
            raise OptionError(f"package={self.package!r} is not valid: it must be {' or '.join(PACKAGES)}")
        for name in self.compute_capabilities:
            if name not in AHEAD_OF_TIME:
                raise OptionError(
                    f"no engine for {name!r} can be built ahead of time; valid compute capabilities are "
                    f"{', '.join(AHEAD_OF_TIME)}: for other GPUs, build on the GPU with package='tensorrt'"
                )
        if not self.compute_capabilities:
            raise OptionError("compute_capabilities is empty: name at least one")
        for name, sizes in self.sizes.items():
            is_range = isinstance(sizes, tuple | list) and len(sizes) == 3
            if (
                not is_range
                or not all(isinstance(size, int) for size in sizes)
                or not 1 <= sizes[0] <= sizes[1] <= sizes[2]
            ):
                raise OptionError(
                    f"sizes[{name!r}]={sizes!r} must be (minimum, optimum, maximum): sorted positive integers"
                )


def build_engines(manifest: Manifest, folder: Path, options: EngineOptions | None = None) -> Manifest:
    """Build an engine of every graph in ``folder``; return the manifest with them.

    Raises:
        ExportError: no such package, or it cannot build a prefill graph. Other graphs may fail; the report
            states the reason.
        OptionError: a name in ``sizes`` that no graph has.
    """
    options = options or EngineOptions()
    names = {
        size for graph in manifest.graphs.values() for spec in graph.inputs.values() for size in spec.shape
    }
    known = sorted(size for size in names if isinstance(size, str))
    for name in options.sizes:
        if name not in known:
            raise OptionError(f"sizes: these graphs have no size {name!r}; they have {', '.join(known)}")
    builder = _Builder(options, manifest.opset, folder)
    refused = list(manifest.report["refused"])
    engines: dict[str, EngineSpec] = {}
    for name, graph in manifest.graphs.items():
        try:
            engines[name] = builder.build(name, graph)
        except ExportError as error:
            if name in REQUIRED:
                raise
            refused.append({"graph": f"{name} (engine)", "reason": str(error)})
    return replace(manifest, engines=engines, report={**manifest.report, "refused": refused})


def find_package(name: str | None = None) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        ExportError: the package is not installed, or its libraries cannot be loaded.
    """
    failed: ImportError | OSError | None = None
    for candidate in PACKAGES if name is None else (name,):
        try:
            return importlib.import_module(candidate)
        except (ImportError, OSError) as error:
            failed = error
    wanted = (name or "tensorrt_rtx").replace("_", "-")
    raise ExportError(f"{missing(wanted, wanted)} ({failed})") from failed


class _Builder:
    def __init__(self, options: EngineOptions, opset: int, folder: Path) -> None:
        self._trt = find_package(options.package)
        self._options, self._opset, self._folder = options, opset, folder
        self._log = _logger(self._trt)
        self._builder = self._trt.Builder(self._log)

    def build(self, name: str, graph: GraphSpec) -> EngineSpec:
        started = time.perf_counter()
        network = self._parse(graph)
        config = self._builder.create_builder_config()
        capabilities = self._set_capabilities(config)
        cache = self._timing_cache(config)
        profile = {key: _range(spec, self._options.sizes) for key, spec in graph.inputs.items()}
        shapes = self._builder.create_optimization_profile()
        for key, (low, usual, high) in profile.items():
            if low != high or any(isinstance(size, str) for size in graph.inputs[key].shape):
                shapes.set_shape(key, low, usual, high)
        config.add_optimization_profile(shapes)
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise ExportError(f"{self._trt.__name__} cannot build {name}: {self._log.last}")
        file = f"{name}.engine"
        (self._folder / file).write_bytes(bytes(plan))
        if cache is not None:
            (self._folder / TIMING_CACHE).write_bytes(bytes(config.get_timing_cache().serialize()))
        return EngineSpec(
            file=file,
            builder=f"{self._trt.__name__} {self._trt.__version__}",
            compute_capabilities=capabilities,
            profile=profile,
            dtypes={key: spec.dtype for key, spec in {**graph.inputs, **graph.outputs}.items()},
            build_seconds=round(time.perf_counter() - started, 2),
        )

    def _parse(self, graph: GraphSpec) -> Any:
        flag = getattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self._builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self._trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(self._folder / graph.file)):
            problems = [str(parser.get_error(number)) for number in range(parser.num_errors)]
            raise ExportError(f"{self._trt.__name__} cannot parse {graph.file}: {'; '.join(problems)}")
        if self._opset >= ATTENTION_OPSET:
            _allow_decomposition(self._trt, network)
        return network

    def _set_capabilities(self, config: Any) -> tuple[str, ...]:
        """Set the GPUs; return their compute capabilities."""
        if not hasattr(config, "set_compute_capability"):
            import torch

            return (f"sm{''.join(map(str, torch.cuda.get_device_capability()))}",)
        names = self._options.compute_capabilities
        config.num_compute_capabilities = len(names)
        for number, name in enumerate(names):
            config.set_compute_capability(getattr(self._trt.ComputeCapability, name.upper()), number)
        return names

    def _timing_cache(self, config: Any) -> Any:
        """Kernel timings of the folder's earlier engines; None for tensorrt_rtx, which has no such cache."""
        if self._trt.__name__ != "tensorrt":
            return None
        path = self._folder / TIMING_CACHE
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        return cache


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let TensorRT decompose attention: float32 has no fused kernel, and the build would fail."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the API's way to cast a layer
            layer.attention.decomposable = True


def _range(spec: TensorSpec, sizes: Mapping[str, Range]) -> tuple[Shape, Shape, Shape]:
    tokens = sizes.get("tokens", DEFAULT_TOKENS)
    defaults = {"tokens": tokens, "rows_tail": DEFAULT_TAIL}
    ranges = [
        (size, size, size) if isinstance(size, int) else sizes.get(size, defaults.get(size, (1, *tokens[1:])))
        for size in spec.shape
    ]
    low, usual, high = (tuple(size[index] for size in ranges) for index in range(3))
    return low, usual, high


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error; the builder does not return it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason was logged"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = message

    return Logger()

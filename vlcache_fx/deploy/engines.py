"""TensorRT engines of exported graphs, built by ``tensorrt`` or by ``tensorrt_rtx``, whose APIs are alike.

``tensorrt`` builds for the GPU that is there. ``tensorrt_rtx`` builds ahead of time, without a GPU, for those
that ``AHEAD_OF_TIME`` lists.
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
"""GPUs that ``tensorrt_rtx`` can build for without having one. Data-centre GPUs from sm90 on are not among
them: build there, with ``tensorrt``."""

TIMINGS = "timing.cache"
NEEDED = (COLD, WARM)

Shape = tuple[int, ...]
Range = tuple[int, int, int]
"""Smallest, usual and largest size."""

USUAL_TOKENS: Range = (2, 1024, 8192)
USUAL_TAIL: Range = (1, 2, 2)


@dataclass(frozen=True)
class EngineOptions:
    """What engines are built for.

    Attributes:
        package: ``tensorrt`` or ``tensorrt_rtx``; by default the first that is installed.
        compute_capabilities: of the GPUs, such as ``("sm86", "sm89")``, for ``tensorrt_rtx``. ``tensorrt``
            builds for the GPU that is there.
        sizes: per name of a size that varies (``tokens``, ``image_tokens``, ``donor_rows``, ``rows_0``,
            ``past_tokens``, ...) the smallest, usual and largest. Those that are not named reach as far as
            ``tokens`` do: 8,192 by default.

    Raises:
        OptionError: an unknown package or GPU, or sizes that do not rise.
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
                    f"compute capability {name!r} cannot be built for ahead of time: valid are "
                    f"{', '.join(AHEAD_OF_TIME)}; build for others where they are, with package='tensorrt'"
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
                    f"sizes[{name!r}]={sizes!r} must be three numbers from 1 on that do not fall"
                )


def build_engines(manifest: Manifest, folder: Path, options: EngineOptions | None = None) -> Manifest:
    """Build an engine of every graph in ``folder``; returns the manifest with them.

    Raises:
        ExportError: no such package, or a prefill graph that it cannot build. Other graphs are left out, with
            the reason in the report.
        OptionError: ``sizes`` for names that the graphs do not have.
    """
    options = options or EngineOptions()
    names = {
        size for graph in manifest.graphs.values() for spec in graph.inputs.values() for size in spec.shape
    }
    known = sorted(size for size in names if isinstance(size, str))
    for name in options.sizes:
        if name not in known:
            raise OptionError(f"no size is named {name!r}; these graphs have {', '.join(known)}")
    builder = _Builder(options, manifest.opset, folder)
    refused = list(manifest.report["refused"])
    engines: dict[str, EngineSpec] = {}
    for name, graph in manifest.graphs.items():
        try:
            engines[name] = builder.build(name, graph)
        except ExportError as error:
            if name in NEEDED:
                raise
            refused.append({"graph": f"{name} (engine)", "reason": str(error)})
    return replace(manifest, engines=engines, report={**manifest.report, "refused": refused})


def find_package(name: str | None = None) -> Any:
    """The module ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        ExportError: it is not installed, or its libraries cannot be loaded.
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
        network = self._parsed(graph)
        config = self._builder.create_builder_config()
        capabilities = self._aim(config)
        cache = self._timings(config)
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
            (self._folder / TIMINGS).write_bytes(bytes(config.get_timing_cache().serialize()))
        return EngineSpec(
            file=file,
            builder=f"{self._trt.__name__} {self._trt.__version__}",
            compute_capabilities=capabilities,
            profile=profile,
            dtypes={key: spec.dtype for key, spec in {**graph.inputs, **graph.outputs}.items()},
            build_seconds=round(time.perf_counter() - started, 2),
        )

    def _parsed(self, graph: GraphSpec) -> Any:
        flag = getattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self._builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self._trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(self._folder / graph.file)):
            problems = [str(parser.get_error(number)) for number in range(parser.num_errors)]
            raise ExportError(f"{self._trt.__name__} cannot parse {graph.file}: {'; '.join(problems)}")
        if self._opset >= ATTENTION_OPSET:
            _allow_decomposition(self._trt, network)
        return network

    def _aim(self, config: Any) -> tuple[str, ...]:
        """Set the GPUs; returns their names."""
        if not hasattr(config, "set_compute_capability"):
            import torch

            return (f"sm{''.join(map(str, torch.cuda.get_device_capability()))}",)
        names = self._options.compute_capabilities
        config.num_compute_capabilities = len(names)
        for number, name in enumerate(names):
            config.set_compute_capability(getattr(self._trt.ComputeCapability, name.upper()), number)
        return names

    def _timings(self, config: Any) -> Any:
        """The timings of kernels that earlier engines of this folder took; tensorrt_rtx takes none."""
        if self._trt.__name__ != "tensorrt":
            return None
        path = self._folder / TIMINGS
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        return cache


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Attention in float32 has no fused kernel: without this, such a network is refused."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how this API casts a layer to its kind
            layer.attention.decomposable = True


def _range(spec: TensorSpec, sizes: Mapping[str, Range]) -> tuple[Shape, Shape, Shape]:
    tokens = sizes.get("tokens", USUAL_TOKENS)
    defaults = {"tokens": tokens, "rows_tail": USUAL_TAIL}
    ranges = [
        (size, size, size) if isinstance(size, int) else sizes.get(size, defaults.get(size, (1, *tokens[1:])))
        for size in spec.shape
    ]
    low, usual, high = (tuple(one[which] for one in ranges) for which in range(3))
    return low, usual, high


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error, which the builder does not return."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = message

    return Logger()

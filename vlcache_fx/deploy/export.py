"""``vlcache_fx.export``: writes the rewritten graphs to files.

::

    trace -> clean up, analyse -> [split encoder off] -> rewrite -> flatten -> ONNX -> [engines] -> manifest
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vlcache_fx.compiling import compiling
from vlcache_fx.deploy.decoder import describe_export
from vlcache_fx.deploy.describe import ExportReport, describe, wiring
from vlcache_fx.deploy.engines import EngineOptions, build_engines, find_package
from vlcache_fx.deploy.layer_groups import layer_groups
from vlcache_fx.deploy.manifest import FORMAT, Manifest, missing
from vlcache_fx.deploy.onnx import DEFAULT_OPSET, MAX_OPSET, MIN_OPSET, SharedWeights
from vlcache_fx.deploy.sample_calls import example_calls
from vlcache_fx.deploy.specs import COLD, DECODE, WARM, WEIGHTS, GraphSpec
from vlcache_fx.deploy.trace import capture_for_export
from vlcache_fx.deploy.writer import GraphWriter
from vlcache_fx.errors import ExportError, OptionError, PolicyError
from vlcache_fx.integrations.transformers import hooked_placeholder_check
from vlcache_fx.options import Options
from vlcache_fx.passes.configured import configured
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy
from vlcache_fx.version import VERSION

FORMATS = ("onnx", "tensorrt")


def export(
    model: nn.Module,
    example_inputs: Any,
    directory: str | os.PathLike[str],
    format: str = "onnx",  # noqa: A002 - the contract's name
    *,
    opset: int = DEFAULT_OPSET,
    dynamic_shapes: Any = None,
    engine: EngineOptions | None = None,
    **options: Any,
) -> ExportReport:
    """Write a model's encoder, cold and warm prefill and decoding step as graphs, with a manifest.

    Args:
        model: a vision-language model of the transformers library, or any model that ``torch.export`` can
            trace and that merges encoder features into its token embeddings. Traced in eval mode; unchanged.
        example_inputs: arguments of one prompt with an image: a mapping of keyword arguments, or a tuple of
            positional arguments. Later requests may differ in length and number of images, but not in the
            grids of images.
        directory: must not exist, or be empty. Removed if the export fails.
        format: ``"onnx"``, or ``"tensorrt"`` to build engines of the same graphs as well.
        opset: version of ONNX's default domain: attention is decomposed up to 22, one node from 23 on.
        dynamic_shapes: see ``torch.export.export``; for models of other libraries.
        engine: GPUs and sizes of the engines.
        **options: ``policy``, ``budget`` and ``profile`` (see ``Options``) decide which layers share their
            rows; sessions may use others that keep these groups. ``passes`` and ``dump_graphs`` apply to the
            exported graphs.

    Raises:
        OptionError, PolicyError: a bad value of an option or argument, or a profile of another model.
        ExportError: the directory is not empty, a package is missing, or the model cannot be exported.
        UnsupportedGraphError: a graph cannot be rewritten.
    """
    parsed = _parse_options(format, opset, options)
    if engine is not None and format != "tensorrt":
        raise OptionError(f"engine needs format='tensorrt', not {format!r}")
    target = _empty_target(Path(directory))
    if format == "tensorrt":
        find_package(None if engine is None else engine.package)  # before minutes of tracing
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _atomic_directory(target) as folder, hooked_placeholder_check(model), compiling():
            manifest = _write(model, example_inputs, folder, opset, dynamic_shapes, parsed)
            if format == "tensorrt":
                manifest = build_engines(manifest, folder, engine)
            manifest = manifest.save(folder)
    finally:
        for module, was_training in training.items():
            module.training = was_training
    return ExportReport.of(manifest, target)


def _parse_options(format: str, opset: int, options: dict[str, Any]) -> Options:  # noqa: A002
    if format not in FORMATS:
        raise OptionError(f"format={format!r} is not valid: it must be {' or '.join(map(repr, FORMATS))}")
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise OptionError(
            f"opset={opset!r} is not valid: it must be an integer from {MIN_OPSET} to {MAX_OPSET}"
        )
    known = ("policy", "budget", "profile", "passes", "dump_graphs")
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(f"unknown option {unknown[0]!r} of export; valid options are: {', '.join(known)}")
    for package in ("onnx", "onnxscript", "pydantic"):
        try:
            __import__(package)
        except ImportError as error:
            raise missing(package, "onnx") from error
    return Options.parse(options)


def _empty_target(directory: Path) -> Path:
    directory = directory.resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ExportError(
            f"{directory} exists and is not an empty directory: choose another path, or remove it"
        )
    return directory


@contextmanager
def _atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``; rename it to ``target``, or remove it on failure."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ExportError(f"cannot write to {target.parent}: {error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(
    model: nn.Module, example: Any, folder: Path, opset: int, dynamic_shapes: Any, options: Options
) -> Manifest:
    pipelines = configured(options)
    found = capture_for_export(model, example, dynamic_shapes, pipelines.cleanup)
    profile = None if options.profile is None else Profile.load(options.profile)
    policy = get_policy(options.policy)
    groups = layer_groups(policy, found.facts.num_layers, profile, options.budget)
    cold = cold_program(found.decoder, pipelines.cold, found.facts)
    warm = warm_program(found.decoder, pipelines.warm, found.facts)
    decoder = describe_export(found, cold.recorded, groups, options.passes_fingerprint)
    spec = decoder.spec
    mismatch = None if profile is None else profile.misfits(str(spec.model_fingerprint), spec.dtype)
    if mismatch is not None:
        raise PolicyError(mismatch)
    cold_call, warm_call = example_calls(found, decoder, cold, warm)
    refused: list[dict[str, str]] = []
    graphs: dict[str, GraphSpec] = {}
    with SharedWeights(folder / WEIGHTS) as weights:
        writer = GraphWriter(found, groups, opset, folder, weights, graphs)
        programs = {
            COLD: writer.program(COLD, cold, cold_call),
            WARM: writer.program(WARM, warm, warm_call),
        }
        prologue = writer.prologue(decoder)
        encoders = writer.encoders(refused)
        decode = writer.stage(DECODE, found.stages.decode, refused) if found.stages else None
    if found.stages is None:
        refused.append(
            {"graph": DECODE, "reason": "the KV cache is known only for models of the transformers library"}
        )
    return Manifest(
        format=FORMAT,
        library_version=VERSION,
        model=type(model).__name__,
        dtype=spec.dtype,
        opset=opset,
        policy=policy.name,
        budget=options.budget,
        profile_fingerprint=None if profile is None else profile.model_fingerprint,
        graphs=graphs,
        cold=programs[COLD],
        warm=programs[WARM],
        encoders=tuple(encoders),
        inputs=tuple(name for name in found.inputs if name),
        prologue=prologue,
        decoder=spec,
        decode=DECODE if decode else None,
        engines={},
        wiring=wiring(bool(found.stages)),
        report=describe(found.facts, warm, programs[WARM], refused),
        files={},
    )

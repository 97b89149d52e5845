"""Checks of a manifest before any of its folder's files is opened.

A digest proves that a manifest is intact, not who wrote it: anyone can compute a new digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch

from vlcache_fx.deploy.specs import (
    INPUT_VALUES,
    MASKS,
    SPANS,
    TORCH_DTYPES,
    EngineSpec,
    GraphSpec,
    TensorSpec,
)
from vlcache_fx.errors import ExportError
from vlcache_fx.plan.selection import InputPositions, SizeSum

if TYPE_CHECKING:
    from vlcache_fx.deploy.manifest import Manifest

MAX_SIZE = 1 << 40
"""Upper bound of a tensor's sizes, and of its number of values."""

MAX_LAYERS = 1 << 14

BUILDERS = ("tensorrt", "tensorrt_rtx")
"""Packages that build and run engines: the only modules that a manifest can make us import."""


def check_manifest(manifest: Manifest, directory: Path) -> None:
    """Raise ExportError for names, sizes or numbers that no export writes; name the field and its value."""
    for name, file in manifest.files.items():
        _check_name(f"files.{name}", name, directory)
        _check(file.size_bytes >= 0, f"files.{name}.size_bytes", file.size_bytes, "a number of bytes")
        is_digest = len(file.blake3) == 64 and not set(file.blake3) - set("0123456789abcdef")
        _check(is_digest, f"files.{name}.blake3", file.blake3, "64 hexadecimal digits")
    for name, graph in manifest.graphs.items():
        _check_name(f"graphs.{name}.file", graph.file, directory)
        _check_graph(f"graphs.{name}", graph)
    for name, engine in manifest.engines.items():
        _check_name(f"engines.{name}.file", engine.file, directory)
        _check_engine(f"engines.{name}", engine)
    _check_decoder(manifest)


def check_references(manifest: Manifest) -> None:
    """Raise ExportError if the manifest refers to a graph or a file that it does not list."""
    graphs = {"cold.graph": manifest.cold.graph, "warm.graph": manifest.warm.graph}
    graphs |= {f"encoders.{i}.graph": encoder.graph for i, encoder in enumerate(manifest.encoders)}
    graphs |= {"decode": manifest.decode} if manifest.decode is not None else {}
    prologue = manifest.prologue
    graphs |= {"prologue.spans": SPANS} if prologue.spans else {}
    graphs |= {"prologue.masks": MASKS} if prologue.masks else {}
    graphs |= {"prologue.input_values": INPUT_VALUES} if prologue.input_values else {}
    graphs |= {f"engines.{name}": name for name in manifest.engines}
    for field, name in graphs.items():
        _check(name in manifest.graphs, field, name, f"a graph; there are {', '.join(manifest.graphs)}")
    files = {f"graphs.{name}.file": spec.file for name, spec in manifest.graphs.items()}
    files |= {f"engines.{name}.file": spec.file for name, spec in manifest.engines.items()}
    for field, name in files.items():
        _check(name in manifest.files, field, name, "one of the files that the manifest lists")


def check_external_data(path: Path, files: Mapping[str, Any]) -> None:
    """Check that an ONNX graph reads its weights from listed files of its folder, within their sizes.

    Args:
        path: the graph.
        files: the files that the manifest lists; already checked.

    Raises:
        ExportError: another file, or a range beyond its size.
    """
    try:
        import onnx
    except ImportError:  # ONNX Runtime itself rejects files outside the graph's folder
        return
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001 - not a graph: loading it fails with a reason
        return
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        field = f"{path.name}: external_data of {tensor.name}"
        location = entries.get("location", "")
        _check_name(f"{field}: location", location, path.parent)
        _check(location in files, f"{field}: location", location, "a file that the manifest lists")
        bounds = {}
        for key in ("offset", "length"):
            value = entries.get(key, "0")
            _check(value.isascii() and value.isdigit(), f"{field}: {key}", value, "a number of bytes")
            bounds[key] = int(value)
        size = files[location].size_bytes
        end = bounds["offset"] + bounds["length"]
        _check(end <= size, f"{field}: offset + length", end, f"at most the file's {size} bytes")


def _tensors(graph: Any) -> Iterable[Any]:
    """Yield the tensors of a graph: initializers and attributes of nodes, with subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _tensors(inner)


def _check(is_valid: bool, field: str, value: object, wanted: str) -> None:
    if not is_valid:
        raise ExportError(f"the manifest's {field} is {value!r:.200}, which is not {wanted}")


def _check_name(field: str, name: str, directory: Path) -> None:
    is_plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}
    is_plain = is_plain and PurePosixPath(name).name == PureWindowsPath(name).name == name
    _check(is_plain, field, name, "the name of a file in its folder")
    path = directory / name
    if path.is_symlink():
        target = path.resolve()
        inside = target.parent == directory.resolve()
        _check(inside, field, f"{name} -> {target}", "a file in its folder")


def _check_graph(field: str, graph: GraphSpec) -> None:
    for kind, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        for name, spec in tensors.items():
            _check_tensor(f"{field}.{kind}.{name}", spec)


def _check_tensor(field: str, spec: TensorSpec) -> None:
    values = 1
    for size in spec.shape:
        is_named = isinstance(size, str) and bool(size)
        _check(
            is_named or (isinstance(size, int) and 0 <= size <= MAX_SIZE),
            f"{field}.shape",
            spec.shape,
            "a shape",
        )
        values *= size if isinstance(size, int) else 1
    _check(values <= MAX_SIZE, f"{field}.shape", spec.shape, f"a shape of at most {MAX_SIZE} values")


def _check_engine(field: str, engine: EngineSpec) -> None:
    builder = engine.builder.split()
    is_known = len(builder) == 2 and builder[0] in BUILDERS
    _check(is_known, f"{field}.builder", engine.builder, f"one of {', '.join(BUILDERS)} and a version")
    for name, shapes in engine.profile.items():
        low, usual, high = shapes
        fits = len(low) == len(usual) == len(high) and all(
            0 <= least <= middle <= most <= MAX_SIZE
            for least, middle, most in zip(low, usual, high, strict=True)
        )
        _check(fits, f"{field}.profile.{name}", shapes, "a minimum, optimal and maximum shape")
    for name, dtype in engine.dtypes.items():
        _check(dtype in TORCH_DTYPES, f"{field}.dtypes.{name}", dtype, f"one of {', '.join(TORCH_DTYPES)}")


def _check_decoder(manifest: Manifest) -> None:
    spec = manifest.decoder
    layers, groups = spec.num_layers, spec.layer_groups
    _check(1 <= layers <= MAX_LAYERS, "decoder.num_layers", layers, f"in 1 to {MAX_LAYERS}")
    adds_up = not groups or (sum(groups) == layers and min(groups) >= 1)
    _check(adds_up, "decoder.layer_groups", groups, f"groups of the {layers} layers")
    _check(0 <= spec.num_outputs <= MAX_LAYERS * 8, "decoder.num_outputs", spec.num_outputs, "a number")
    same = spec.num_results == spec.num_outputs
    _check(same, "decoder.num_results", spec.num_results, f"that of its {spec.num_outputs} outputs")
    for name in ("writes", "host_inputs", "weights", "other_weights"):
        _check(
            not getattr(spec, name),
            f"decoder.{name}",
            getattr(spec, name),
            "empty: exported graphs have no side effects",
        )
    _check(not spec.has_past, "decoder.has_past", spec.has_past, "that of a prefill with an empty cache")
    _check_prologue(manifest)
    indices = {"data": spec.data, "spans.features": spec.spans.features, "masks.inputs": spec.masks.inputs}
    indices["leaves"] = tuple(leaf.input for leaf in spec.leaves if leaf.input is not None)
    indices["spans.embeddings"] = () if spec.spans.embeddings is None else (spec.spans.embeddings,)
    indices["tail"] = tuple(_inputs_of_tail(() if spec.tail is None else spec.tail.bounds))
    count = len(manifest.inputs)
    for name, given in indices.items():
        inside = all(0 <= index < count for index in given)
        _check(inside, f"decoder.{name}", given, f"indices of the {count} inputs")
    for slot, row in spec.rows.items():
        field = f"decoder.rows.{slot}"
        _check(0 <= row.dim < len(row.sizes), f"{field}.dim", row.dim, f"a dimension of {row.sizes}")
        _check(
            all(size is None or 1 <= size <= MAX_SIZE for size in row.sizes),
            f"{field}.sizes",
            row.sizes,
            "sizes",
        )
        is_dtype = isinstance(getattr(torch, row.dtype, None), torch.dtype)
        _check(is_dtype, f"{field}.dtype", row.dtype, "a dtype of torch")


def _check_prologue(manifest: Manifest) -> None:
    """Check that the outputs of the prologue's graphs agree with the decoder's spec."""
    spans, masks, prologue = manifest.decoder.spans, manifest.decoder.masks, manifest.prologue
    merges, width = spans.num_merges, spans.width
    _check(0 <= merges <= len(spans.features), "decoder.spans.num_merges", merges, "that of its merges")
    _check(width is None or 1 <= width <= MAX_SIZE, "decoder.spans.width", width, "a width")
    made = sum(leaf.input is None for leaf in manifest.decoder.leaves)
    outputs = prologue.input_values
    _check(made == len(outputs), "prologue.input_values", outputs, f"{made} names")
    kinds = len(masks.sites)
    _check(
        all(site is None or 0 <= site < kinds for site in masks.site_of_layer),
        "decoder.masks.site_of_layer",
        masks.site_of_layer,
        f"indices of the {kinds} sites",
    )
    moves = [move for site in masks.sites for move in site.key_moves]
    _check(not moves, "decoder.masks.sites", moves, "that of a prefill with an empty cache")


def _inputs_of_tail(bounds: Iterable[object]) -> Iterable[int]:
    for bound in bounds:
        match bound:
            case InputPositions():
                yield bound.input
            case SizeSum():
                yield from (size.input for size in bound.sizes)

"""The parts of a manifest: plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_fx.analysis.decoder.computation import Digests
from vlcache_fx.errors import ExportError
from vlcache_fx.plan.selection import InputPositions, SizeSum


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: ONNX's name of its dtype in lower case; sizes, named where they vary."""

    dtype: str
    shape: tuple[int | str, ...]


COLD, WARM, DECODE = "prefill_cold", "prefill_warm", "decode"
SPANS, MASKS, LEAVES = "spans", "masks", "leaves"
"""Names of graphs."""

WEIGHTS = "weights.bin"
"""The file of the weights that graphs share."""

TORCH_DTYPES = {
    "float": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The dtype of a tensor.

    Raises:
        ExportError: one that no graph of ours has.
    """
    if spec.dtype not in TORCH_DTYPES:
        raise ExportError(f"dtype {spec.dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[spec.dtype]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file, and inputs and outputs in order."""

    file: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True)
class ProgramSpec:
    """How a program's graph is called.

    Attributes:
        graph: name of its graph.
        inputs: name of each input of the runtime's call, request data first, then ``slots``; None where the
            graph does not need it.
        slots: what passes added, in order.
        results: output of each result, those recorded included; None for what the traced code returned as a
            constant.
        recorded: names of the donor slots that the last results are for, in order.
    """

    graph: str
    inputs: tuple[str | None, ...]
    slots: tuple[str, ...]
    results: tuple[str | None, ...]
    recorded: tuple[str, ...]


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder.

    Attributes:
        graph: name of its graph.
        modality: ``image``, ``video``, or empty for one that takes the request's inputs as they are.
        fixed: what an item must be like: inputs beside its pixels (its grid) with their values, which
            are constants of the graph.
        features: outputs, which are inputs of the prefill graphs under the same names.
    """

    graph: str
    modality: str
    fixed: dict[str, tuple[int, ...]]
    features: tuple[str, ...]


@dataclass(frozen=True)
class RowSpec:
    """The form of one slot's donor rows: see ``RowForm``."""

    dim: int
    dtype: str
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class MaskSpec:
    """One kind of attention whose mask is looked at in every call: see ``MaskSite``."""

    node: str
    source_line: str | None
    has_mask: bool
    rule: str


@dataclass(frozen=True)
class LeafSpec:
    """One value that keys hold: see ``LeafForm``.

    Attributes:
        input: index of the input that it is; None for the next output of the graph ``leaves``.
    """

    input: int | None
    token_dim: int | None
    is_index: bool
    is_beside: bool
    group: int


@dataclass(frozen=True)
class DecoderSpec:
    """What the runtime knows of the decoder: see ``DecoderForm``. Indices are those of ``inputs``.

    Attributes:
        embeddings: the input whose rows may be marked as spans, where nothing is merged.
        leaves: other values that keys hold.
        site_of_layer: per layer, the index of its kind of attention among ``mask_sites``, if any.
        leaf_outputs: outputs of the graph ``leaves``, in order.
        spans: outputs of the graph ``spans``: the masks of merges and additions, in order.
        masks: outputs of the graph ``masks``: the masks of ``mask_sites`` that have one, in order.
    """

    inputs: tuple[str, ...]
    num_layers: int
    layer_groups: tuple[int, ...]
    num_outputs: int
    tail: tuple[int | SizeSum | InputPositions | None, ...] | None
    rows: dict[str, RowSpec]
    layout: str
    computation: Digests
    model_fingerprint: str
    features: tuple[int, ...]
    num_merges: int
    width: int | None
    embeddings: int | None
    leaves: tuple[LeafSpec, ...]
    mask_sites: tuple[MaskSpec, ...]
    mask_inputs: tuple[int, ...]
    site_of_layer: tuple[int | None, ...]
    every_layer_has_a_mask: bool
    spans: tuple[str, ...]
    masks: tuple[str, ...]
    leaf_outputs: tuple[str, ...]


@dataclass(frozen=True)
class EngineSpec:
    """A TensorRT engine of one graph.

    Attributes:
        file: its plan.
        builder: package and version that built it, and that must run it.
        compute_capabilities: of the GPUs that it runs on.
        profile: input -> smallest, usual and largest shape.
        dtypes: input or output -> dtype.
        build_seconds: how long that took.
    """

    file: str
    builder: str
    compute_capabilities: tuple[str, ...]
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    dtypes: dict[str, str]
    build_seconds: float


@dataclass(frozen=True)
class FileSpec:
    """Size and BLAKE3 of a file."""

    size_bytes: int
    blake3: str

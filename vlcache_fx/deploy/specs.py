"""The parts of a manifest: plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_fx.errors import ExportError
from vlcache_fx.spec.program import ProgramSpec


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: ONNX's name of its dtype in lower case; sizes, named where they vary."""

    dtype: str
    shape: tuple[int | str, ...]


COLD, WARM, DECODE = "prefill_cold", "prefill_warm", "decode"
SPANS, MASKS, INPUT_VALUES = "spans", "masks", "leaves"
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
class ProgramGraph:
    """How a program's graph is called.

    Attributes:
        graph: name of its graph.
        inputs: name of each input of the runtime's call, request data first, then the program's slots; None
            where the graph does not need it.
        results: output of each result, those recorded included; None for what the traced code returned as a
            constant.
        program: the runtime's description of it.
    """

    graph: str
    inputs: tuple[str | None, ...]
    results: tuple[str | None, ...]
    program: ProgramSpec


@dataclass(frozen=True)
class EncoderGraph:
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
class PrologueGraphs:
    """The graphs that run before a decoder: outputs of each, in order; empty where there is no such graph.

    Attributes:
        spans, masks, input_values: see ``Prologue``.
    """

    spans: tuple[str, ...]
    masks: tuple[str, ...]
    input_values: tuple[str, ...]


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

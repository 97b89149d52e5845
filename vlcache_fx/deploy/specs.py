"""Plain data in a manifest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlcache_fx.errors import ExportError
from vlcache_fx.spec.program import ProgramSpec


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: ONNX's name of its dtype in lower case, and its sizes (names for dynamic sizes)."""

    dtype: str
    shape: tuple[int | str, ...]


COLD, WARM, DECODE = "prefill_cold", "prefill_warm", "decode"
SPANS, MASKS, INPUT_VALUES = "spans", "masks", "leaves"
"""Names of graphs."""

WEIGHTS = "weights.bin"
"""File of the weights that graphs share."""

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
    """Return the torch dtype of a tensor.

    Raises:
        ExportError: a dtype that no exported graph has.
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
    """A prefill program, and the names of its graph's inputs and outputs.

    Attributes:
        graph: name of its graph.
        inputs: per input of the runtime's call (request data, then the program's slots), the graph's input;
            None for an unused input.
        results: per result (recorded tensors included), the graph's output; None for a constant.
        program: the runtime's spec of the program.
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
        modality: ``image``, ``video``, or empty for an encoder of the request's unmodified inputs.
        fixed: required values of an item's other inputs (its grid); they are constants of the graph.
        features: names of its outputs, and of the prefill graphs' inputs.
    """

    graph: str
    modality: str
    fixed: dict[str, tuple[int, ...]]
    features: tuple[str, ...]


@dataclass(frozen=True)
class PrologueGraphs:
    """Outputs of the graphs that run before a decoder, in order; empty for a graph that does not exist.

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
        file: the serialised engine.
        builder: package and version that built the engine; required to run it.
        compute_capabilities: supported GPUs.
        profile: input -> minimum, optimal and maximum shape.
        dtypes: input or output -> dtype.
        build_seconds: duration of the build.
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

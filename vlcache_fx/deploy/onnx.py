"""Converts flat graphs to ONNX models that share one file of weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import blake3
import torch
from torch import Tensor, nn

from vlcache_fx.deploy.specs import GraphSpec, TensorSpec
from vlcache_fx.errors import ExportError

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 18, 23, 22
"""Opsets of the default domain. Up to 22, attention is decomposed, for all importers; from 23 on it is one
``Attention`` node. 22 is the first opset whose convolutions support bfloat16."""

NOISY = ("torch.onnx", "onnxscript", "onnx_ir")

SHARED_FROM_BYTES = 1024
ALIGNMENT_BYTES = 64


def to_onnx(
    module: nn.Module,
    examples: Mapping[str, Tensor],
    dynamic_shapes: Any,
    outputs: Sequence[str],
    opset: int,
) -> Any:
    """Convert a module.

    Args:
        module: the tensors of ``examples`` in order -> a tuple.
        examples: input name -> value.
        dynamic_shapes: per parameter of the module, dynamic dimension -> name; equal names are equal sizes.
        outputs: names of the results.
        opset: version of the default domain.

    Returns:
        ``onnx_ir.Model``.

    Raises:
        ExportError: torch's converter fails; with the first line of its reason.
    """
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                # Cloned: the exporter would merge two inputs that are the same tensor.
                tuple(value.clone() for value in examples.values()),
                input_names=list(examples),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the converter raises many types
        raise ExportError(f"torch cannot convert the graph to ONNX: {_reason(error)}") from error
    assert program is not None
    _simplify_sizes(program.model)
    for node in program.model.graph:  # origins of nodes: megabytes, and paths of this machine
        node.metadata_props.clear()
    return program.model


def _reason(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter: it warns of optional packages, of its own deprecations and of shared sizes."""
    loggers = {name: logging.getLogger(name) for name in NOISY}
    before = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])


def _simplify_sizes(model: Any) -> None:
    """Simplify sizes that the tracer left, such as ``((2*tokens)//tokens)``, which is 2."""
    import onnx_ir
    import sympy

    def simple(dim: Any) -> Any:
        text = getattr(dim, "value", None)
        if not isinstance(text, str) or "//" not in text:
            return dim
        value = sympy.sympify(text)
        return int(value) if value.is_Integer else onnx_ir.SymbolicDim(str(value))

    for value in [*model.graph.outputs, *(out for node in model.graph for out in node.outputs)]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([simple(dim) for dim in value.shape])


class SharedWeights:
    """A file with the weights of several graphs; equal bytes are written once.

    Args:
        path: the new file; graphs that refer to it are in the same folder.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offsets = path, dict[str, int]()
        self._file: BinaryIO = path.open("wb")

    def __enter__(self) -> SharedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def save(self, model: Any, path: Path, names: Mapping[str, str]) -> GraphSpec:
        """Write a model with its large weights in the shared file, and check it.

        Args:
            model: ``onnx_ir.Model``; modified.
            path: the graph's file.
            names: initialiser -> its name in the file.

        Raises:
            ExportError: ONNX's checker rejects the model.
        """
        import onnx
        import onnx_ir

        initializers = model.graph.initializers
        for name in list(initializers):
            value = initializers[name]
            tensor = value.const_value
            if tensor.nbytes >= SHARED_FROM_BYTES:
                offset = self._offset(tensor.tobytes())
                value.const_value = onnx_ir.ExternalTensor(
                    self._path.name, offset, tensor.nbytes, tensor.dtype,
                    shape=tensor.shape, name=names.get(name, name), base_dir=path.parent,
                )  # fmt: skip
            if name in names:
                value.name = names[name]
        self._file.flush()
        onnx_ir.save(model, path)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            path.unlink()
            raise ExportError(f"{path.name} is not a valid ONNX model: {error}") from error
        return GraphSpec(
            path.name,
            {value.name: _spec(value) for value in model.graph.inputs},
            {value.name: _spec(value) for value in model.graph.outputs},
        )

    def _offset(self, content: bytes) -> int:
        key = blake3.blake3(content).hexdigest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT_BYTES))
            self._offsets[key] = self._file.tell()
            self._file.write(content)
        return self._offsets[key]


def _spec(value: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.dtype.name.lower(), shape)

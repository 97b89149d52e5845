"""The TensorRT lowering: compile regions of a program to engines with Torch-TensorRT.

Cache operators stay outside the engines. Needs a CUDA GPU and the package ``torch_tensorrt``; ``dry_run``
needs neither.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from vlcache_fx.errors import LoweringError, OptionError
from vlcache_fx.ir.copies import copy_module
from vlcache_fx.runtime.programs.lowered import Lowered, resolved

__all__ = ["DryRun", "TensorRtLowering", "dry_run"]

MIN_NODES = 3
"""Smallest region that becomes an engine."""


@dataclass(frozen=True)
class DryRun:
    """Partition of a program into engines.

    Attributes:
        engines: names of the nodes of each engine, in order.
        outside: name of each other node -> reason for running it outside.
    """

    engines: tuple[tuple[str, ...], ...]
    outside: Mapping[str, str]


class _Convertible(OperatorSupportBase):
    """Nodes that can run in an engine: ATen operators, and the sizes that they need."""

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: fx.Node) -> bool:  # noqa: ARG002
        return exclusion_reason(node) is None


def exclusion_reason(node: fx.Node) -> str | None:
    """Return the reason for running a node outside of engines, or None."""
    if node.op != "call_function":
        return "not a call"
    namespace = getattr(node.target, "namespace", None)
    if namespace == "vlcache":
        return "a cache operator: it reads stored rows"
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return "an input mutation: engines are functional"
    value = node.meta.get("val")
    if namespace == "aten" and isinstance(value, torch.Tensor) and value.dtype == torch.float64:
        return "TensorRT has no float64"
    return None


def _partitions(program: fx.GraphModule) -> list[Any]:
    found = CapabilityBasedPartitioner(
        program, _Convertible(), allows_single_node_partition=True
    ).propose_partitions()
    return [partition for partition in found if len(partition.nodes) >= MIN_NODES]


def dry_run(program: fx.GraphModule) -> DryRun:
    """Return the partition of a program into engines, without compiling it."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    groups = [sorted(partition.nodes, key=order.__getitem__) for partition in _partitions(program)]
    groups.sort(key=lambda nodes: order[nodes[0]])
    inside = {node for nodes in groups for node in nodes}
    outside = {
        node.name: exclusion_reason(node) or f"a region of fewer than {MIN_NODES} nodes"
        for node in program.graph.nodes
        if node.op == "call_function" and node not in inside
    }
    return DryRun(tuple(tuple(node.name for node in nodes) for nodes in groups), outside)


class TensorRtLowering:
    """Lowering that compiles the regions between cache operators, each in its first run.

    Raises:
        OptionError: there is no CUDA GPU, or ``torch_tensorrt`` is not installed.
    """

    name = "tensorrt"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise OptionError(
                "lowering='tensorrt' needs an NVIDIA GPU, and torch finds none: use 'inductor' or 'eager', "
                "or build engines ahead of time with vlcache_fx.export(format='tensorrt')"
            )
        try:
            importlib.import_module("torch_tensorrt")
        except (ImportError, OSError) as error:
            raise OptionError(
                f"lowering='tensorrt' needs the package torch-tensorrt ({error}); pip install torch-tensorrt"
            ) from error

    def lower(self, program: fx.GraphModule, *, name: str) -> Lowered:
        """See ``Lowering.lower``."""
        copy = copy_module(program)
        partitioner = CapabilityBasedPartitioner(copy, _Convertible(), allows_single_node_partition=True)
        wanted = [part for part in partitioner.propose_partitions() if len(part.nodes) >= MIN_NODES]
        try:
            fused = partitioner.fuse_partitions(wanted, prefix="engine_")
        except Exception as error:
            raise LoweringError(f"program {name!r} cannot be cut into engines: {error}") from error
        for child, module in list(fused.named_children()):
            if child.startswith("engine_"):
                setattr(fused, child, torch.compile(module, backend="torch_tensorrt", dynamic=True))

        def run(args: Sequence[Any]) -> tuple[Any, ...]:
            with torch.no_grad():
                result = fused(*map(resolved, args))
            return tuple(result) if isinstance(result, tuple | list) else (result,)

        return run

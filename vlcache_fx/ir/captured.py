"""The intermediate representation (IR) of analysis and passes."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from vlcache_fx.spec.mutations import Write, num_results


class InputKind(StrEnum):
    """Kind of a graph input, from the source of its value, never from its name."""

    WEIGHT = "weight"  # parameter or constant buffer of the traced module: the same tensor in every request
    DATA = "data"  # a tensor of this request
    SIZE = "size"  # an int or SymInt


@dataclass(frozen=True)
class Captured:
    """A traced graph as functional, pre-dispatch ATen with scaled-dot-product attention as one call.

    Attributes:
        graph_module: flat graph with one placeholder per entry of ``kinds`` and a flat tuple as output. Nodes
            have ``meta["val"]`` (fake values) and, where tracing recorded it, ``stack_trace``.
        kinds: kind of each placeholder, in order.
        specialised: ``(input index, value)`` of 0-d inputs that were folded in as Python numbers; a call with
            another value must not use this graph.
        writes: input mutations of the traced code, in order. Their outputs come after the traced code's own.
    """

    graph_module: fx.GraphModule
    kinds: tuple[InputKind, ...]
    specialised: tuple[tuple[int, float | int | bool], ...] = ()
    writes: tuple[Write, ...] = ()

    @property
    def placeholders(self) -> list[fx.Node]:
        """The placeholder nodes, in input order."""
        return [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]

    def inputs_of(self, kind: InputKind) -> list[fx.Node]:
        """Return the placeholder nodes of ``kind``, in input order."""
        return [node for node, other in zip(self.placeholders, self.kinds, strict=True) if other is kind]

    def indices_of(self, kind: InputKind) -> tuple[int, ...]:
        """Return the indices of the inputs of ``kind``."""
        return tuple(index for index, other in enumerate(self.kinds) if other is kind)

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the graph, those for input mutations included."""
        output = self.graph_module.graph.output_node()
        results = output.args[0]
        assert isinstance(results, tuple | list)
        return len(results)

    @property
    def num_results(self) -> int:
        """Number of outputs of the traced code."""
        return num_results(self.writes, self.num_outputs)

    def holds_for(self, args: tuple[Any, ...] | list[Any]) -> bool:
        """Return True if this call has the folded-in numbers."""
        return all(_number(args[index]) == value for index, value in self.specialised)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value

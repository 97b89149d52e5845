"""The one intermediate representation (IR) that analysis and passes work on."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from vlcache_fx.spec.mutations import Write, num_results


class InputKind(StrEnum):
    """What a graph input is: decided from where the value came from, never from its name."""

    WEIGHT = "weight"  # parameter or buffer of the traced module that it does not write to: the same tensor
    # in every request
    DATA = "data"  # a tensor of this request
    SIZE = "size"  # an int or SymInt


@dataclass(frozen=True)
class Captured:
    """A traced graph as functional, pre-dispatch ATen with scaled-dot-product attention kept whole.

    Attributes:
        graph_module: flat graph; every input is a placeholder, one for each entry of ``kinds``; the output is
            a flat tuple. Nodes carry ``meta["val"]`` (fake values) and, where tracing gave it,
            ``stack_trace``.
        kinds: what each placeholder is, in order.
        specialised: ``(input index, value)`` of 0-d inputs that were folded in as Python numbers; a call in
            which one differs must not use this graph.
        writes: what the traced code writes to its inputs, in order. The outputs for it stand behind the
            traced code's own.
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
        """The placeholder nodes of that kind, in input order."""
        return [node for node, own in zip(self.placeholders, self.kinds, strict=True) if own is kind]

    def indices_of(self, kind: InputKind) -> tuple[int, ...]:
        """The indices of the inputs of that kind."""
        return tuple(index for index, own in enumerate(self.kinds) if own is kind)

    @property
    def num_outputs(self) -> int:
        """Number of entries that the graph returns, those for writes included."""
        output = self.graph_module.graph.output_node()
        results = output.args[0]
        assert isinstance(results, tuple | list)
        return len(results)

    @property
    def num_results(self) -> int:
        """Number of entries that the traced code returns."""
        return num_results(self.writes, self.num_outputs)

    def holds_for(self, args: tuple[Any, ...] | list[Any]) -> bool:
        """True where the folded-in numbers are still those of this call."""
        return all(_number(args[index]) == value for index, value in self.specialised)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value

"""Values of a call that stored rows depend on: positions, token ids and other inputs of the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.analysis.computation import Leaf
from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.capture.subgraph import extract
from vlcache_fx.runtime.on_cpu import evaluated_on_cpu
from vlcache_fx.store.keys import Part


@dataclass(frozen=True)
class LeafForm:
    """How one such value is laid out, known when the graph is compiled: see ``analysis.computation.Leaf``."""

    token_dim: int | None
    batch_dim: int | None = None
    is_index: bool = False
    is_beside: bool = True

    def of_sample(self, value: Any, sample: int) -> Any:
        """The part that belongs to one sample."""
        return value if self.batch_dim is None else value.narrow(self.batch_dim, sample, 1)

    def of_item(self, value: Any, start: int, length: int) -> Part:
        """What the rows of an item depend on, given the part of its sample.

        Positions count from the item's first token: the same pixels laid out in another grid attend to each
        other differently, and the same layout at another offset does not.
        """
        if self.token_dim is None or not isinstance(value, Tensor):
            return value  # type: ignore[no-any-return]
        own = value.narrow(self.token_dim, start, length).movedim(self.token_dim, -1)
        if self.is_index or own.is_floating_point() or own.dtype == torch.bool:
            return own  # differences of cos and sin mean nothing: such donors serve one offset
        return own - own[..., :1]


@dataclass(frozen=True)
class Leaves:
    """The values that keys hold, of one graph.

    Attributes:
        forms: of each value.
        read: from the graph's inputs to the values: tensors, and numbers.
    """

    forms: tuple[LeafForm, ...]
    read: Callable[[Sequence[Any]], Sequence[Any]]

    @classmethod
    def of(cls, captured: Captured, leaves: Sequence[Leaf]) -> Leaves:
        """Of a captured graph."""
        index = {node: i for i, node in enumerate(captured.placeholders)}
        made = [leaf.node for leaf in leaves if leaf.node not in index]
        data = captured.indices_of(InputKind.DATA)
        run = evaluated_on_cpu(extract(captured.graph_module, made), data)[0] if made else None

        def read(args: Sequence[Any]) -> list[Any]:
            computed = iter(run(*args) if run is not None else ())
            return [args[index[leaf.node]] if leaf.node in index else next(computed) for leaf in leaves]

        return cls(forms_of(leaves), read)

    def of_item(self, values: Sequence[Any], sample: int, start: int, length: int) -> list[Part]:
        """What layers read beside the features of an item, as parts of its donor's key."""
        return [
            form.of_item(form.of_sample(value, sample), start, length)
            for form, value in zip(self.forms, values, strict=True)
            if form.is_beside
        ]


def forms_of(leaves: Sequence[Leaf]) -> tuple[LeafForm, ...]:
    """Plain data of what analysis found."""
    return tuple(LeafForm(one.token_dim, one.batch_dim, one.is_index, one.is_beside) for one in leaves)

"""Values of a call that stored rows depend on: positions, token ids and other inputs of the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlcache_fx.analysis.decoder.computation import Leaf
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.keys.digest import Part
from vlcache_fx.runtime.requests.on_cpu import evaluated_on_cpu


@dataclass(frozen=True)
class LeafForm:
    """How one such value is laid out, known when the graph is compiled: see ``analysis.computation.Leaf``.

    Values of one ``group`` may be one value that the graph makes several times.
    """

    token_dim: int | None
    batch_dim: int | None = None
    is_index: bool = False
    is_beside: bool = True
    group: int = 0

    def of_sample(self, value: Any, sample: int) -> Any:
        """The part that belongs to one sample."""
        return value if self.batch_dim is None else value.narrow(self.batch_dim, sample, 1)

    def by_token(self, value: Any, num_tokens: int) -> Tensor | None:
        """[tokens, ...], without dimensions of size 1, in which graphs of one model differ; None where it has
        no dimension over tokens."""
        if self.token_dim is None or not isinstance(value, Tensor):
            return None
        length = value.shape[self.token_dim]
        rows = value.narrow(self.token_dim, length - num_tokens, num_tokens).movedim(self.token_dim, 0)
        return rows.reshape(num_tokens, *(size for size in rows.shape[1:] if size != 1))

    def of_item(self, value: Any, start: int, length: int, num_tokens: int) -> Part:
        """What the rows of an item depend on, given the part of its sample.

        Positions count from the item's first token: the same pixels laid out in another grid attend to each
        other differently, and the same layout at another offset does not.
        """
        rows = self.by_token(value, num_tokens)
        if rows is None:
            return value  # type: ignore[no-any-return]
        own = rows[start : start + length]
        if self.is_index or own.is_floating_point() or own.dtype == torch.bool:
            return own  # differences of cos and sin mean nothing: such donors serve one offset
        return own - own[:1]


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

    def of_item(
        self, values: Sequence[Any], sample: int, start: int, length: int, num_tokens: int
    ) -> tuple[bool, list[Part]]:
        """What layers read beside the features of an item, for its donor's key: see ``unified``."""
        return unified(
            [
                (form.group, form.of_item(form.of_sample(value, sample), start, length, num_tokens))
                for form, value in zip(self.forms, values, strict=True)
                if form.is_beside
            ]
        )

    def of_prompt(
        self, values: Sequence[Any], sample: int, num_tokens: int
    ) -> tuple[bool, tuple[Tensor, ...], tuple[Part, ...]]:
        """The same for all tokens of a prompt, as they are: values by token, [tokens, ...], and others."""
        own = [form.of_sample(value, sample) for form, value in zip(self.forms, values, strict=True)]
        own = [value.detach().cpu() if isinstance(value, Tensor) else value for value in own]
        rows = [form.by_token(value, num_tokens) for form, value in zip(self.forms, own, strict=True)]
        tokens = [(form.group, part) for form, part in zip(self.forms, rows, strict=True) if part is not None]
        others = [
            (form.group, value)
            for form, part, value in zip(self.forms, rows, own, strict=True)
            if part is None
        ]
        (first, by_token), (second, whole) = unified(tokens), unified(others)
        if not (first and second):
            by_token, whole = ([part for _, part in parts] for parts in (tokens, others))
        return first and second, tuple(by_token), tuple(whole)


Value = TypeVar("Value", bound=Part)


def unified(parts: Sequence[tuple[int, Value]]) -> tuple[bool, list[Value]]:
    """Whether the parts of each group are one; then one of each group, else all of them.

    Args:
        parts: the group of each, and the part.
    """
    firsts: dict[int, Value] = {}
    for group, part in parts:
        first = firsts.setdefault(group, part)
        if first is part:
            continue
        if not (isinstance(first, Tensor) and isinstance(part, Tensor)):
            same = type(first) is type(part) and first == part
        else:
            same = first.shape == part.shape and torch.equal(first, part)
        if not same:
            return False, [part for _, part in parts]
    return True, list(firsts.values())


def forms_of(leaves: Sequence[Leaf]) -> tuple[LeafForm, ...]:
    """Plain data of what analysis found."""
    kinds = list(dict.fromkeys(leaf.kind for leaf in leaves))
    return tuple(
        LeafForm(one.token_dim, one.batch_dim, one.is_index, one.is_beside, kinds.index(one.kind))
        for one in leaves
    )

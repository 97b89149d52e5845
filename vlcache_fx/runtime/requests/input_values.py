"""Values of a call that stored rows depend on: positions, token ids and other inputs of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlcache_fx.keys.digest import Part
from vlcache_fx.runtime.requests.prologue import Values
from vlcache_fx.spec.decoder import InputValueSpec


class InputValues:
    """The values that keys hold, of one graph.

    Args:
        specs: of each value.
        made: the program that gives those that are no inputs.
    """

    def __init__(self, specs: Sequence[InputValueSpec], made: Values) -> None:
        self._specs, self._made = tuple(specs), made

    def read(self, args: Sequence[Any]) -> list[Any]:
        """The values of a call with these inputs: tensors, and numbers."""
        made = iter(self._made(*args))
        return [next(made) if spec.input is None else args[spec.input] for spec in self._specs]

    def of_item(
        self, values: Sequence[Any], sample: int, start: int, length: int, num_tokens: int
    ) -> tuple[bool, list[Part]]:
        """What layers read beside the features of an item, for its donor's key: see ``unified``."""
        return unified(
            [
                (spec.group, _of_item(spec, _of_sample(spec, value, sample), start, length, num_tokens))
                for spec, value in zip(self._specs, values, strict=True)
                if spec.is_beside
            ]
        )

    def of_prompt(
        self, values: Sequence[Any], sample: int, num_tokens: int
    ) -> tuple[bool, tuple[Tensor, ...], tuple[Part, ...]]:
        """The same for all tokens of a prompt, as they are: values by token, [tokens, ...], and others."""
        own = [_of_sample(spec, value, sample) for spec, value in zip(self._specs, values, strict=True)]
        own = [value.detach().cpu() if isinstance(value, Tensor) else value for value in own]
        rows = [_by_token(spec, value, num_tokens) for spec, value in zip(self._specs, own, strict=True)]
        groups = [spec.group for spec in self._specs]
        tokens = [(group, part) for group, part in zip(groups, rows, strict=True) if part is not None]
        others = [
            (group, value) for group, part, value in zip(groups, rows, own, strict=True) if part is None
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


def _of_sample(spec: InputValueSpec, value: Any, sample: int) -> Any:
    """The part that belongs to one sample."""
    return value if spec.batch_dim is None else value.narrow(spec.batch_dim, sample, 1)


def _by_token(spec: InputValueSpec, value: Any, num_tokens: int) -> Tensor | None:
    """[tokens, ...], without dimensions of size 1, in which graphs of one model differ; None where it has
    no dimension over tokens."""
    if spec.token_dim is None or not isinstance(value, Tensor):
        return None
    length = value.shape[spec.token_dim]
    rows = value.narrow(spec.token_dim, length - num_tokens, num_tokens).movedim(spec.token_dim, 0)
    return rows.reshape(num_tokens, *(size for size in rows.shape[1:] if size != 1))


def _of_item(spec: InputValueSpec, value: Any, start: int, length: int, num_tokens: int) -> Part:
    """What the rows of an item depend on, given the part of its sample.

    Positions count from the item's first token: the same pixels laid out in another grid attend to each
    other differently, and the same layout at another offset does not.
    """
    rows = _by_token(spec, value, num_tokens)
    if rows is None:
        return value  # type: ignore[no-any-return]
    own = rows[start : start + length]
    if spec.is_index or own.is_floating_point() or own.dtype == torch.bool:
        return own  # differences of cos and sin mean nothing: such donors serve one offset
    return own - own[:1]

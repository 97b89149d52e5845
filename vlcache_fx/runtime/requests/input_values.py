"""Values of a call on which stored rows depend: positions, token ids and other inputs of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlcache_fx.keys.digest import Part
from vlcache_fx.runtime.requests.prologue import Values
from vlcache_fx.spec.decoder import InputValueSpec


class InputValues:
    """The values of one graph that enter keys.

    Args:
        specs: the values, in order.
        computed: the program that returns those that are not inputs.
    """

    def __init__(self, specs: Sequence[InputValueSpec], computed: Values) -> None:
        self._specs, self._computed = tuple(specs), computed

    def read(self, args: Sequence[Any]) -> list[Any]:
        """Return the values of a call, tensors and numbers, given the graph's inputs."""
        computed = iter(self._computed(*args))
        return [next(computed) if spec.input is None else args[spec.input] for spec in self._specs]

    def of_item(
        self, values: Sequence[Any], sample: int, start: int, length: int, num_tokens: int
    ) -> tuple[bool, list[Part]]:
        """Return the values at the tokens of a media span, as parts of its donor's key; see ``unified``."""
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
        """Return ``(is_unified, values [tokens, ...], other values)`` of a prompt; see ``unified``."""
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
    """Return ``(True, a part per group)`` if the parts of each group are equal, else ``(False, all parts)``.

    Args:
        parts: ``(group, part)``.
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
    """Return the slice of one sample."""
    return value if spec.batch_dim is None else value.narrow(spec.batch_dim, sample, 1)


def _by_token(spec: InputValueSpec, value: Any, num_tokens: int) -> Tensor | None:
    """Return a value as [tokens, ...]; None where it has no token dimension.

    Dims of size 1 are dropped: graphs of one model differ in them.
    """
    if spec.token_dim is None or not isinstance(value, Tensor):
        return None
    length = value.shape[spec.token_dim]
    rows = value.narrow(spec.token_dim, length - num_tokens, num_tokens).movedim(spec.token_dim, 0)
    return rows.reshape(num_tokens, *(size for size in rows.shape[1:] if size != 1))


def _of_item(spec: InputValueSpec, value: Any, start: int, length: int, num_tokens: int) -> Part:
    """Return the value at the tokens of a media span, given the slice of its sample.

    Positions are relative to the first token: a span keeps its key at another offset, but not with another
    grid, in which its tokens attend to each other differently.
    """
    rows = _by_token(spec, value, num_tokens)
    if rows is None:
        return value  # type: ignore[no-any-return]
    own = rows[start : start + length]
    if spec.is_index or own.is_floating_point() or own.dtype == torch.bool:
        return own  # cos and sin cannot be made relative: such donors serve one offset
    return own - own[:1]

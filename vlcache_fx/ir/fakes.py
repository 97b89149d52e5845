"""Fake values in a shape environment of their own.

Rewriting adds sizes (rows per layer, donor rows) that the traced graph does not have. Guards on them must not
reach the environment of Dynamo's guards, so no condition is evaluated there: expressions are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from vlcache_fx.ir.sizes import Size, equal, evaluated, expression, hint

FIRST_HINT_BESIDE = 50
"""Index of the first example value beside an environment's own."""


class Shapes:
    """A shape environment and its fake tensor mode.

    Args:
        mode: an existing mode with an environment; None for new ones.
    """

    def __init__(self, mode: FakeTensorMode | None = None) -> None:
        if mode is None:
            mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
        assert mode.shape_env is not None
        self.env, self.mode = mode.shape_env, mode

    def symbol(self, name: str, example: int) -> sympy.Symbol:
        """Return a new symbol, at least 2, independent of symbols with the same example."""
        from torch._dynamo.source import ConstantSource  # here, because it imports all of Dynamo

        symbol = self.env.create_symbol(example, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        if not isinstance(symbol, sympy.Symbol):
            raise ValueError(f"no symbol for the example {example}")
        return symbol

    def size(self, value: Size, examples: Mapping[sympy.Symbol, int]) -> int | torch.SymInt:
        """Return a size of this environment; ``examples`` has the value of each backed symbol."""
        if isinstance(value, int):
            return value
        if value.is_number:
            return int(value)
        size: int | torch.SymInt = self.env.create_symintnode(value, hint=evaluated(value, examples))
        return size

    def empty(
        self,
        sizes: Sequence[int | torch.SymInt],
        strides: Sequence[int | torch.SymInt],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Return a fake tensor without autograd state."""
        with self.mode, torch.no_grad():
            return torch.empty_strided(tuple(sizes), tuple(strides), dtype=dtype, device=device)


class FakeInputs:
    """Fake tensors with fresh symbolic sizes; sizes of the same name share a symbol.

    Args:
        derived: sizes that are another size plus a number (0 or more), as ``{name: (other, number)}``.
        beside: a fake tensor to whose environment the sizes are added; by default they have one of their own.
    """

    def __init__(
        self, derived: Mapping[str, tuple[str, int]] | None = None, beside: torch.Tensor | None = None
    ) -> None:
        self._shapes = Shapes(None if beside is None else mode_of(beside))
        self.env, self.mode = self._shapes.env, self._shapes.mode
        self._derived = dict(derived or {})
        self._sizes: dict[str, torch.SymInt] = {}
        self._first_hint = 0 if beside is None else FIRST_HINT_BESIDE

    def size(self, name: str) -> torch.SymInt:
        """Return the symbolic size called ``name``, at least 2."""
        if name in self._derived:
            other, more = self._derived[name]
            return self.size(other) + more
        if name not in self._sizes:
            example = hint(self._first_hint + len(self._sizes))
            symbol = self._shapes.symbol(f"vlcache_{name}", example)
            size = self._shapes.size(symbol, {symbol: example})
            assert isinstance(size, torch.SymInt)
            self._sizes[name] = size
        return self._sizes[name]

    def tensor(
        self, sizes: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a contiguous fake tensor."""
        with self.mode:
            return torch.empty(tuple(sizes), dtype=dtype, device=device)

    def like(self, value: Any) -> Any:
        """Return the counterpart of a fake tensor or SymInt of another environment, with the same layout."""
        if isinstance(value, torch.Tensor):
            sizes = [self._translate(size) for size in value.shape]
            if _is_row_major(value):
                return self.tensor(sizes, value.dtype, value.device)
            strides = [self._translate(stride) for stride in value.stride()]
            return self._shapes.empty(sizes, strides, value.dtype, value.device)
        if isinstance(value, torch.SymInt):
            return self._translate(value)
        return value

    def _translate(self, size: int | torch.SymInt) -> int | torch.SymInt:
        found = expression(size)
        if isinstance(found, int):
            return found
        more, symbol = found.as_coeff_Add()
        if symbol.is_Symbol and more.is_Integer and more > 0:  # a cache and the token that is appended to it
            return self.size(str(symbol)) + int(more)
        # Not computed from its symbols: a difference (240 - s9) may be negative for other values, so it
        # becomes a size of its own.
        return self.size(str(found))


def mode_of(value: torch.Tensor) -> FakeTensorMode:
    """Return the mode of a fake tensor."""
    assert isinstance(value, FakeTensor)
    return value.fake_mode


def _is_row_major(value: torch.Tensor) -> bool:
    """Return True for contiguous strides. Torch's helpers would add guards on sizes with a hint."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not equal(stride, expected):
            return False
        expected = expected * expression(size)
    return True

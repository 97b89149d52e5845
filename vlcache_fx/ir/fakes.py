"""Fake inputs of a program in a shape environment of its own.

Rewriting adds sizes (rows per layer, donor rows) that the traced graph does not know, and guards about them
must not reach the environment that Dynamo makes its guards from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

FIRST_HINT = 1009  # hints are distinct and large, so that no guard is added by a coincidence of sizes


class FakeInputs:
    """Makes fake tensors with fresh symbolic sizes; sizes of the same name share a symbol.

    Args:
        known: sizes that are another one plus a number (0 or more), where the trace had symbols for both.
    """

    def __init__(self, known: Mapping[str, tuple[str, int]] | None = None) -> None:
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env)
        self._known = dict(known or {})
        self._sizes: dict[str, torch.SymInt] = {}

    def size(self, name: str) -> torch.SymInt:
        """The symbolic size called ``name``, at least 2."""
        if name in self._known:
            other, more = self._known[name]
            return self.size(other) + more
        if name not in self._sizes:
            hint = FIRST_HINT + 101 * len(self._sizes)
            source = ConstantSource(f"vlcache_{name}")
            symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            made = self.env.create_symintnode(symbol, hint=hint, source=source)
            assert isinstance(made, torch.SymInt)
            self._sizes[name] = made
        return self._sizes[name]

    def tensor(
        self, sizes: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A contiguous fake tensor."""
        with self.mode:
            return torch.empty(tuple(sizes), dtype=dtype, device=device)

    def like(self, value: Any) -> Any:
        """The counterpart of another environment's fake tensor or SymInt, laid out alike."""
        if isinstance(value, torch.Tensor):
            sizes = [self._translate(size) for size in value.shape]
            if _is_row_major(value):
                return self.tensor(sizes, value.dtype, value.device)
            strides = [self._translate(stride) for stride in value.stride()]
            with self.mode:
                return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        if isinstance(value, torch.SymInt):
            return self._translate(value)
        return value

    def _translate(self, size: int | torch.SymInt) -> int | torch.SymInt:
        found = expression_of(size)
        if isinstance(found, int):
            return found
        more, symbol = found.as_coeff_Add()
        if symbol.is_Symbol and more.is_Integer and more > 0:  # a cache and the token that joins it
            return self.size(str(symbol)) + int(more)
        # Not computed from the symbols in it: a difference (240 - s9) need not be positive for another value
        # of its symbol, so it becomes a size of its own.
        return self.size(str(found))


def expression_of(size: int | torch.SymInt) -> Any:
    """The number, or the sympy expression behind a symbolic size."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if isinstance(expression, sympy.Integer) else expression


def _is_row_major(value: torch.Tensor) -> bool:
    """Contiguity as the expressions say it: asking the tensor would add a guard."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if expression_of(stride) != expected:
            return False
        expected = expected * expression_of(size)
    return True

"""Fake inputs in their own shape environment."""

from __future__ import annotations

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from vlcache_fx.ir.fakes import FakeInputs


def foreign(hint: int) -> torch.SymInt:
    env = ShapeEnv()
    source = ConstantSource("elsewhere")
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def test_size_same_name() -> None:
    fakes = FakeInputs()
    rows = fakes.size("rows_0")
    assert str(rows) == str(fakes.size("rows_0"))
    assert str(rows) != str(fakes.size("rows_1"))
    tensor = fakes.tensor([1, rows, 4], torch.bfloat16, torch.device("cpu"))
    assert tensor.dtype is torch.bfloat16
    assert str(tensor.shape[1]) == str(rows)


def test_size_distinct_without_guards() -> None:
    """Hints are distinct: sizes are never equal by accident."""
    fakes = FakeInputs()
    sizes = [fakes.size(f"rows_{index}") for index in range(50)]
    assert len({size.node.hint for size in sizes}) == 50
    assert all(size.node.hint >= 2 for size in sizes)
    assert fakes.env.guards == []


def test_like_own_sizes() -> None:
    tokens = foreign(12)
    mode = FakeTensorMode(shape_env=tokens.node.shape_env)
    with mode:
        value = torch.empty(1, tokens, 2 * tokens + 1)
    before = len(tokens.node.shape_env.guards)
    fakes = FakeInputs()
    copy = fakes.like(value)
    own = fakes.size(str(tokens.node.expr))
    derived = fakes.size(str((2 * tokens + 1).node.expr))
    assert copy.fake_mode is fakes.mode
    assert [str(size) for size in copy.shape] == ["1", str(own), str(derived)]
    assert str(copy.stride()[1]) == str(derived)  # still row-major
    assert str(fakes.like(tokens)) == str(own)
    assert len(tokens.node.shape_env.guards) == before  # nothing reaches the environment of the trace


def test_like_sum_of_size_and_number() -> None:
    tokens = foreign(12)
    fakes = FakeInputs()
    own = fakes.like(tokens)
    assert str(fakes.like(tokens + 1) - own) == "1"
    assert str(fakes.like(tokens - 1) - own) != "-1"  # may be none for another number of tokens


def test_like_strides() -> None:
    value = torch.empty(2, 3, 4).transpose(0, 2)
    assert FakeInputs().like(value).stride() == value.stride()


def test_like_plain_values() -> None:
    fakes = FakeInputs()
    assert fakes.like(3) == 3
    assert fakes.like(None) is None
    assert tuple(fakes.like(torch.ones(2, 3)).shape) == (2, 3)


def test_size_derived() -> None:
    fakes = FakeInputs({"b": ("a", 3), "c": ("b", 0)})
    assert str(fakes.size("b") - fakes.size("a")) == "3"
    assert str(fakes.size("c") - fakes.size("b")) == "0"

"""The bfloat16 CPU kernel for linear layers with few rows, against products in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.ops import linear as module
from vlcache_fx.ops.linear import FEW_ROWS, MAX_ROWS, decompose_linear, linear
from vlcache_fx.options import Options

from .helpers import kernel_calls, needs_kernel


def operands(
    *sizes: int, outputs: int, seed: int = 0, with_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def one(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    return one(*sizes), one(outputs, sizes[-1]), one(outputs) if with_bias else None


def exact(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows.double(), weight.double(), None if bias is None else bias.double())


def close(got: Tensor, want: Tensor, width: int) -> None:
    """Allow for rounding to bfloat16 and for float32 sums of ``width`` products."""
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-18 * (width + 8))


@needs_kernel
@given(
    lead=st.sampled_from([(), (1,), (2, 1)]), rows=st.integers(1, MAX_ROWS + 2), width=st.integers(1, 200),
    outputs=st.integers(1, 100), with_bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@example(lead=(), rows=1, width=64, outputs=32, with_bias=False, seed=0)
@example(lead=(), rows=6, width=63, outputs=33, with_bias=True, seed=1)
@example(lead=(), rows=7, width=63, outputs=33, with_bias=True, seed=1)
@example(lead=(), rows=16, width=2 * 2048 + 34, outputs=37, with_bias=True, seed=2)
@example(lead=(), rows=17, width=2, outputs=1, with_bias=True, seed=3)
@example(lead=(2,), rows=40, width=2050, outputs=100, with_bias=False, seed=4)
@settings(max_examples=100)
def test_linear_equals_definition(
    lead: tuple[int, ...], rows: int, width: int, outputs: int, with_bias: bool, seed: int
) -> None:
    given_ = operands(*lead, rows, width, outputs=outputs, seed=seed, with_bias=with_bias)
    close(linear(*given_), exact(*given_), width)


@needs_kernel
@pytest.mark.parametrize("rows", [2, 20, 70])
def test_linear_is_as_accurate_as_pytorch(rows: int) -> None:
    given_ = operands(rows, 4096, outputs=500)
    want = exact(*given_)
    assert (linear(*given_) - want).abs().max() <= 1.1 * (F.linear(*given_) - want).abs().max()


@needs_kernel
@pytest.mark.parametrize(("count", "width"), [(1, 33), (9, 34)])
def test_linear_reads_no_values_past_the_end(count: int, width: int) -> None:
    rows, weight, _ = operands(count, width, outputs=3)
    padded = torch.full((3 * width + 40,), float("nan"), dtype=torch.bfloat16)
    padded[: 3 * width] = weight.flatten()
    close(linear(rows, padded[: 3 * width].view(3, width), None), exact(rows, weight, None), width)


@needs_kernel
def test_linear_of_any_layout() -> None:
    rows, weight, bias = operands(2, 3, 40, outputs=24)
    assert bias is not None
    want = linear(rows, weight, bias)
    turned = weight.t().contiguous().t()
    assert torch.equal(linear(rows.transpose(0, 1).contiguous().transpose(0, 1), turned, bias), want)
    assert torch.equal(linear(rows, weight, torch.stack([bias, bias], 1)[:, 0]), want)


@pytest.mark.parametrize("sizes", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_linear_of_empty_tensors(sizes: tuple[int, ...]) -> None:
    given_ = operands(*sizes, outputs=4)
    assert torch.equal(linear(*given_), F.linear(*given_))


@needs_kernel
@pytest.mark.parametrize("sizes", [(2, 16), (1, MAX_ROWS + 1, 16)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_opcheck(sizes: tuple[int, ...], with_bias: bool) -> None:
    torch.library.opcheck(
        torch.ops.vlcache.linear.default,
        operands(*sizes, outputs=5, with_bias=with_bias),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_kernel
def test_linear_uses_kernel_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = kernel_calls(module, monkeypatch)
    for amx, rows, width, calls in (
        (False, MAX_ROWS, 16, 1),
        (False, MAX_ROWS + 1, 16, 0),
        (False, FEW_ROWS + 1, 15, 0),
        (False, FEW_ROWS, 15, 1),
        (True, FEW_ROWS + 1, 16, 0),
        (True, FEW_ROWS, 16, 1),
    ):
        seen.clear()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        given_ = operands(rows, width, outputs=5)
        close(linear(*given_), exact(*given_), width)
        assert len(seen) == calls


def test_linear_without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernel", lambda: None)
    given_ = operands(2, 16, outputs=5)
    assert torch.equal(linear(*given_), F.linear(*given_))
    assert decompose_linear(*given_) is NotImplemented


@needs_kernel
@pytest.mark.parametrize(
    "change",
    [
        lambda rows, weight, bias: (rows.float(), weight.float(), bias.float()),
        lambda rows, weight, bias: (rows, weight.t().contiguous().t(), bias),
        lambda rows, weight, bias: (rows, weight.clone().requires_grad_(), bias),
        lambda rows, weight, bias: (rows, weight[0], bias[0]),
        lambda rows, weight, bias: (rows.repeat(41, 1), weight, bias),
    ],
    ids=["float32", "turned weights", "gradient", "a vector", "many rows"],
)
def test_decompose_linear_rejects_other_layers(change: Any) -> None:
    given_ = operands(2, 16, outputs=5)
    assert decompose_linear(*given_) is not NotImplemented
    assert decompose_linear(*change(*given_)) is NotImplemented


@needs_kernel
def test_decompose_linear_with_symbolic_rows() -> None:
    rows, weight, bias = operands(90, 16, outputs=5)
    traced = make_fx(decompose_linear, tracing_mode="symbolic")(rows, weight, bias)
    assert torch.ops.vlcache.linear.default in {node.target for node in traced.graph.nodes}
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(one) for one in (rows, weight)]
        assert decompose_linear(*fakes) is NotImplemented


class Layer(torch.nn.Module):
    def forward(self, rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.linear(rows.relu(), weight, bias) * 2,)


@needs_kernel
@pytest.mark.parametrize(("lowering", "calls"), [("inductor", 2), ("eager", 0)])
def test_linear_in_lowered_programs(lowering: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = kernel_calls(module, monkeypatch)
    run = None
    for rows in (90, 20, 1):
        given_ = operands(1, rows, 16, outputs=5)
        if run is None:
            traced = make_fx(Layer(), tracing_mode="symbolic", pre_dispatch=True)(*given_)
            run = Engine(Options(lowering=lowering)).lowering.lower(traced, name="layer")
        (got,) = run(given_)
        close(got, 2 * exact(given_[0].relu(), *given_[1:]), 16)
    assert len(seen) == calls

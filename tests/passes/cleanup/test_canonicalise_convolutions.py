"""``canonicalise_convolutions``: convolutions over earlier tokens become one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.capture import capture_dynamo
from vlcache_fx.ir import Captured
from vlcache_fx.passes import Program
from vlcache_fx.passes.cleanup import CanonicaliseConvolutions
from vlcache_fx.testing.graphs import traced_graphs

from ...runtime.helpers import own_compiler_state
from ..programs import before_and_after, unchanged
from .graphs import program_of

CHANNELS, TOKENS, WIDTH, PAST = 5, 7, 4, 3
CONV = torch.ops.vlcache.causal_conv1d.default
Function = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def operands(tokens: int = TOKENS, past: int = PAST) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values of tokens, weight, bias and values of earlier tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, CHANNELS, tokens), (CHANNELS, 1, WIDTH), (CHANNELS,), (1, CHANNELS, past))
    x, weight, bias, before = (torch.randn(*size, generator=generator) for size in sizes)
    return x, weight, bias, before


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Convolve each channel, padded on both sides by default."""
    return F.conv1d(x, weight, bias, **{"padding": WIDTH - 1, "groups": CHANNELS, **options})


def padded_on_both_sides(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(x, weight, bias)[..., : x.shape[-1]] * 2,)


def padded_on_the_left(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(F.pad(x, (WIDTH - 1, 0)), weight, bias, padding=0) * 2,)


def without_bias(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(x, weight)[..., : x.shape[-1]],)


def sliced_twice(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    rows = convolved(x, weight, bias)
    return (rows[..., : x.shape[-1]].sigmoid() * rows[..., : x.shape[-1]],)


def behind_earlier_tokens(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    joined = torch.cat([before, x], -1)
    rows = convolved(joined, weight, bias)[..., : joined.shape[-1]]
    return (F.silu(rows.to(torch.float64))[..., -x.shape[-1] :],)


def behind_earlier_tokens_from_the_start(
    x: Tensor, weight: Tensor, bias: Tensor, before: Tensor
) -> tuple[Tensor]:
    """As above, without a bias, and counted from the front."""
    joined = torch.cat([before, x], 2)
    rows = convolved(F.pad(joined, (WIDTH - 1, 0)), weight, padding=0)
    return (rows[:, :, before.shape[-1] :],)


class Convolving(nn.Module):
    """One of these functions, with a weight and a bias of its own."""

    def __init__(self, form: Function) -> None:
        super().__init__()
        self.form = form
        _, weight, bias, _ = operands()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        return self.form(x, self.weight, self.bias, before)


FORMS = [
    padded_on_both_sides,
    padded_on_the_left,
    without_bias,
    sliced_twice,
    behind_earlier_tokens,
    behind_earlier_tokens_from_the_start,
]


def calls(program: Program) -> list[tuple[Any, ...]]:
    """Return the arguments of the operator's calls."""
    return [node.args for node in program.graph.find_nodes(op="call_function", target=CONV)]


@pytest.mark.parametrize("form", [padded_on_both_sides, padded_on_the_left, behind_earlier_tokens])
def test_graph(form: Function, golden: Callable[[str, str], None]) -> None:
    program = program_of(form, *operands())
    name = form.__name__
    golden(f"canonicalise_convolutions_{name}", before_and_after(CanonicaliseConvolutions(), program))


@pytest.mark.parametrize("form", FORMS)
def test_numbers(form: Function) -> None:
    inputs = operands()
    program = program_of(form, *inputs)
    rewrite(program)
    (got,), (want,) = program.graph_module(*inputs), form(*inputs)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_any_size(form: Function) -> None:
    """As Dynamo traces it: sizes of tokens are symbols."""
    model = Convolving(form)
    captures: list[Captured] = []
    calls = []
    for tokens, past in ((TOKENS, PAST), (11, 5)):
        x, _, _, before = operands(tokens, past)
        calls.append({"x": x, "before": before})
    with own_compiler_state():
        (graph,) = traced_graphs(
            model, *calls, dynamic=True, seen=lambda *given: captures.append(capture_dynamo(*given))
        )
    (captured,) = captures
    program = Program(captured.graph_module)
    rewrite(program)
    (result,) = program.graph.output_node().args[0]
    assert not isinstance(result.meta["val"].shape[-1], int)
    with torch.no_grad():
        for args, call in zip(graph.calls, calls, strict=True):
            got, want = program.graph_module(*args)[0], model(**call)[0]
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def rewrite(program: Program) -> None:
    """Run the pass, which leaves one call of the operator and no other convolution."""
    assert CanonicaliseConvolutions().run(program)
    program.graph.lint()
    program.graph.eliminate_dead_code()
    assert len(calls(program)) == 1
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.conv1d.default)
    assert unchanged(CanonicaliseConvolutions(), program)
    program.graph_module.recompile()


@pytest.mark.parametrize("form", [behind_earlier_tokens, behind_earlier_tokens_from_the_start])
def test_earlier_tokens_are_an_operand(form: Function) -> None:
    """Then the result has the rows of this call's tokens alone."""
    program = program_of(form, *operands())
    CanonicaliseConvolutions().run(program)
    program.graph.eliminate_dead_code()
    x, _, _, before = program.graph.find_nodes(op="placeholder")
    ((first, _, _, last),) = calls(program)
    assert (first, last) == (x, before)
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


def test_values_of_inserted_nodes() -> None:
    program = program_of(behind_earlier_tokens, *operands())
    CanonicaliseConvolutions().run(program)
    program.graph.eliminate_dead_code()
    (result,) = program.graph.output_node().args[0]
    assert result.meta["val"].shape == (1, CHANNELS, TOKENS)
    assert result.meta["val"].dtype is torch.float64


# Forms that stay as they are --------------------------------------------------------------------------------


def dilated(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(x, weight, bias, padding=2 * (WIDTH - 1), dilation=2)[..., : x.shape[-1]],)


def strided(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(torch.cat([x, x], -1), weight, bias, stride=2)[..., : x.shape[-1]],)


def full_channels(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(x, weight.expand(-1, CHANNELS, -1), bias, groups=1)[..., : x.shape[-1]],)


def several_filters(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    """Two results per channel."""
    return (convolved(x, torch.cat([weight, weight]))[..., : x.shape[-1]],)


def centred(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    """A token sees later ones."""
    return (convolved(x, weight, bias, padding=1),)


def later_rows(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(x, weight, bias)[..., 1 : x.shape[-1] + 1],)


def one_row_more(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(x, weight, bias)[..., : x.shape[-1] + 1],)


def also_read_whole(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    rows = convolved(x, weight, bias)
    return (rows[..., : x.shape[-1]] + rows.sum(-1, keepdim=True),)


def padded_with_ones(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(F.pad(x, (WIDTH - 1, 0), value=1.0), weight, bias, padding=0),)


def padded_on_the_right(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(F.pad(x, (0, WIDTH - 1)), weight, bias, padding=0),)


def padded_too_little(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    return (convolved(F.pad(x, (WIDTH - 2, 0)), weight, bias, padding=0),)


OTHERS = [
    dilated,
    strided,
    full_channels,
    several_filters,
    centred,
    later_rows,
    one_row_more,
    also_read_whole,
    padded_with_ones,
    padded_on_the_right,
    padded_too_little,
]


@pytest.mark.parametrize("form", OTHERS)
def test_keeps_other_convolutions(form: Function) -> None:
    assert unchanged(CanonicaliseConvolutions(), program_of(form, *operands()))


def cut_elsewhere(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    joined = torch.cat([before, x], -1)
    return (convolved(joined, weight, bias)[..., : joined.shape[-1]][..., 1:],)


def read_uncut(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    joined = torch.cat([before, x], -1)
    rows = convolved(joined, weight, bias)[..., : joined.shape[-1]]
    return rows[..., -x.shape[-1] :], rows.relu()


def three_parts(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    joined = torch.cat([before, before, x], -1)
    return (convolved(joined, weight, bias)[..., : joined.shape[-1]][..., -x.shape[-1] :],)


def normed_before_the_cut(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    joined = torch.cat([before, x], -1)
    rows = convolved(joined, weight, bias)[..., : joined.shape[-1]]
    return (rows.softmax(-1)[..., -x.shape[-1] :],)


def multiplied_by_itself(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    """One operand, twice: all its places would have to change."""
    joined = torch.cat([before, x], -1)
    rows = convolved(joined, weight, bias)[..., : joined.shape[-1]]
    return ((rows * rows)[..., -x.shape[-1] :],)


def exponent(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor]:
    """The operand is not the first one."""
    joined = torch.cat([before, x], -1)
    rows = convolved(joined, weight, bias)[..., : joined.shape[-1]]
    return ((2.0**rows)[..., -x.shape[-1] :],)


@pytest.mark.parametrize(
    "form",
    [cut_elsewhere, read_uncut, three_parts, normed_before_the_cut, multiplied_by_itself, exponent],
)
def test_keeps_earlier_tokens_joined(form: Function) -> None:
    """The operator convolves all of them, and other readers cut the result."""
    inputs = operands()
    program = program_of(form, *inputs)
    assert CanonicaliseConvolutions().run(program)
    program.graph.lint()
    ((first, *others),) = calls(program)
    assert first.target is torch.ops.aten.cat.default
    assert len(others) <= 2
    program.graph_module.recompile()
    for got, want in zip(program.graph_module(*inputs), form(*inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)

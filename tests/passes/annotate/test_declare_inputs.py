"""``declare_inputs``: every input has a fake value of one shape environment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from vlcache_fx.errors import PassError
from vlcache_fx.passes import Pipeline, Program
from vlcache_fx.passes.annotate import DeclareInputs
from vlcache_fx.passes.standard import cold_program, warm_program

from .. import hybrids
from ..programs import (
    bare,
    everything,
    everything_of_both,
    nothing_stored,
    run,
    small,
    two_samples,
)


def declared(program: Program) -> str:
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            lines.append(f"{node.name}: {value.dtype} {[str(size) for size in value.shape]}".replace("'", ""))
    return "\n".join(lines)


def test_graph(golden: Callable[[str, str], None]) -> None:
    captured = small(last_only=False)[0]
    before = declared(bare(captured))
    golden("declare_inputs", f"before\n{before}\n\nafter\n{declared(warm_program(captured))}")


def test_graph_of_two_samples(golden: Callable[[str, str], None]) -> None:
    """Rows, positions and sources have a batch dim; donor tables are common to all samples."""
    golden("declare_inputs_two_samples", declared(warm_program(two_samples()[0])))


@pytest.mark.parametrize("make", [cold_program, warm_program])
@pytest.mark.parametrize("last_only", [True, False])
def test_values_propagate_for_two_samples(make: Callable[..., Program], last_only: bool) -> None:
    captured, graph, want = two_samples(num_layers=2, last_only=last_only)
    program = make(captured)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in values if isinstance(value, torch.Tensor))
    results = FakeTensorProp(program.graph_module, mode).propagate_dont_convert_inputs(*values)
    assert tuple(results[0].shape) == tuple(want.shape)
    donors = nothing_stored(program) if make is warm_program else None
    got = run(program, graph.calls[0], everything_of_both(program), donors)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [cold_program, warm_program])
@pytest.mark.parametrize("last_only", [True, False])
def test_values_propagate(make: Callable[..., Program], last_only: bool) -> None:
    program = make(small(num_layers=2, last_only=last_only)[0])
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in values if isinstance(value, torch.Tensor))
    assert all(value.fake_mode is mode for value in values)
    results = FakeTensorProp(program.graph_module, mode).propagate_dont_convert_inputs(*values)
    assert tuple(results[0].shape) == (1, 1 if last_only else 10, 200)


@pytest.mark.parametrize("make", [cold_program, warm_program])
@pytest.mark.parametrize("last_only", [True, False])
def test_values_propagate_through_recurrent_layers(
    make: Callable[..., Program], last_only: bool, golden: Callable[[str, str], None]
) -> None:
    """Maps, records and last inputs have sizes of their own; donors of equal layers have equal ones."""
    program = make(hybrids.small("dcap", last_only)[0])
    if make is warm_program and not last_only:
        golden("declare_inputs_recurrent_layers", declared(program))
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in values if isinstance(value, torch.Tensor))
    assert all(value.fake_mode is mode for value in values)
    results = FakeTensorProp(program.graph_module, mode).propagate_dont_convert_inputs(*values)
    assert tuple(results[0].shape) == (1, 1 if last_only else hybrids.TOKENS, 200)


def test_numbers() -> None:
    captured, graph, want = small()
    program = warm_program(captured)
    results = run(program, graph.calls[0], everything(captured), nothing_stored(program))
    torch.testing.assert_close(results[0], want, atol=1e-5, rtol=1e-5)


def test_requires_facts() -> None:
    program = bare(small()[0])
    before = str(program.graph)
    with pytest.raises(PassError, match=r"declare_inputs.*requires facts"):
        Pipeline((DeclareInputs(),)).run(program)
    assert str(program.graph) == before

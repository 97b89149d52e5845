"""The Inductor lowering: equal to eager at every size, one compilation per structure, no recompiles."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from vlcache_fx.errors import LoweringError
from vlcache_fx.lowering import CompileCache, EagerLowering, InductorLowering
from vlcache_fx.lowering.outline import outline
from vlcache_fx.lowering.values import program_values

from .stack import Stack, Warm, trace

LAYERS = 3

Traced: TypeAlias = tuple[GraphModule, list[Any]]

# Inductor imports parts of torch that use torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack(LAYERS).eval()


@pytest.fixture(scope="module")
def cold(stack: Stack) -> Traced:
    return trace(stack, (prompt(37),), ({1},))


@pytest.fixture(scope="module")
def cache() -> CompileCache:
    return CompileCache()


def prompt(length: int) -> torch.Tensor:
    return torch.randn(1, length, 64)


def warm_inputs(total: int, counts: tuple[int, ...], donor: int) -> tuple[Any, ...]:
    """Return random nested row sets of the given sizes, and donors of ``donor`` rows."""
    counts = (*counts, counts[-1])
    rows, keeps, sources = [torch.sort(torch.randperm(total)[: counts[0]]).values], [], []
    for layer in range(LAYERS):
        keep = torch.sort(torch.randperm(counts[layer])[: counts[layer + 1]]).values
        source = torch.randint(0, donor, (total,))
        source[rows[layer]] = -1 - torch.arange(counts[layer])
        keeps.append(keep)
        sources.append(source)
        rows.append(rows[layer][keep])
    donors = tuple(torch.randn(donor, 32) for _ in range(2 * LAYERS))
    cos, sin = torch.randn(2, 1, 1, total, 16).unbind()
    return prompt(counts[0]), cos, sin, tuple(rows[:LAYERS]), tuple(keeps), tuple(sources), donors


WARM_DIMS = ({1}, {2}, {2}, ({0},) * LAYERS, ({0},) * LAYERS, ({0},) * LAYERS, ({0},) * 2 * LAYERS)


def close(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.stride() == want.stride()


def test_eager_equals_model(stack: Stack, cold: Traced) -> None:
    program, lifted = cold
    run = EagerLowering().lower(program, name="cold")
    x = prompt(50)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(run([*lifted, x]), stack(x), strict=True))


def test_lengths_share_compilations(stack: Stack, cold: Traced, cache: CompileCache) -> None:
    program, lifted = cold
    run = InductorLowering(cache).lower(program, name="cold")
    names = [name for name, _ in cache.stats.compilations if name.startswith("cold")]
    assert names.count("cold/layer.0") <= 1
    assert not any(f"layer.{i}" in name for name in names for i in range(1, LAYERS))
    before = len(cache.stats.compilations)
    for length in (2, 3, 7, 64, 65, 130, 1021):
        x = prompt(length)
        with torch.no_grad():
            close(run([*lifted, x]), stack(x))
    assert len(cache.stats.compilations) == before
    assert not any(cache.stats.conditions.values())


def test_programs_share_structures(stack: Stack, cold: Traced, cache: CompileCache) -> None:
    InductorLowering(cache).lower(cold[0], name="one")
    before, hits = len(cache.stats.compilations), cache.stats.hits
    other = Stack(LAYERS + 1).eval()
    program, lifted = trace(other, (prompt(29),), ({1},))
    run = InductorLowering(cache).lower(program, name="two")
    assert len(cache.stats.compilations) == before
    assert cache.stats.hits == hits + LAYERS + 3
    x = prompt(11)
    with torch.no_grad():  # weights are inputs, so the code contains nothing of the first model
        close(run([*lifted, x]), other(x))


def test_row_counts_share_compilations(stack: Stack, cache: CompileCache) -> None:
    program, lifted = trace(Warm(stack), warm_inputs(41, (23, 17, 11), 37), WARM_DIMS)
    run = InductorLowering(cache).lower(program, name="warm")
    oracle = EagerLowering().lower(program, name="warm")
    before = len(cache.stats.compilations)
    assert sum("warm/layer" in name for name, _ in cache.stats.compilations) == 1
    for total, counts, donor in (
        (50, (50, 50, 50), 50),
        (64, (64, 32, 2), 64),
        (130, (16, 16, 16), 2),
        (3, (2, 2, 2), 4),
        (4100, (90, 70, 64), 3000),
    ):
        args = [*lifted, *pytree.tree_leaves(warm_inputs(total, counts, donor))]
        close(run(args), oracle(args))
    assert len(cache.stats.compilations) == before


def test_single_row_compiles_variant(stack: Stack, cold: Traced) -> None:
    cache = CompileCache()
    program, lifted = cold
    run = InductorLowering(cache).lower(program, name="cold")
    for _ in range(2):
        x = prompt(1)
        with torch.no_grad():
            close(run([*lifted, x]), stack(x))
    assert cache.stats.variants == 3  # prelude, layer, tail


class Halves(nn.Module):
    """Requires even lengths, and takes another path from length 100 on."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.view(2, -1, 4).sum(1), x[:100] * 2)


class Counting(nn.Module):
    """Compares positions of tokens, vectors computed from sizes, in both layers."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        places = torch.arange(x.shape[0], device=x.device) * 2
        pairs = places.unsqueeze(1) < torch.arange(x.shape[0], device=x.device)
        first = (x * places).cumsum(0) + pairs.sum(1)
        return first, (first * places).cumsum(0) + pairs.sum(0), torch.arange(x.shape[0])


def test_outline_repeats_vectors_of_sizes() -> None:
    program, lifted = trace(Counting(), (torch.randn(36),), ({0},))
    layers = {"mul_1": "layer.0", "add": "layer.0", "mul_2": "layer.1", "add_1": "layer.1"}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default):
        node.meta["segment"] = "prelude"
    for node in program.graph.nodes:
        if node.name in layers:
            node.meta["segment"] = layers[node.name]
    segments = outline(program, program_values(program))
    assert [segment.name for segment in segments] == ["prelude", "layer.0", "layer.1"]
    arange = torch.ops.aten.arange.default
    counts = [len(segment.module.graph.find_nodes(op="call_function", target=arange)) for segment in segments]
    assert counts == [3, 1, 1]  # one of the three is a result
    # Values computed from a tensor of tokens x tokens cross segments.
    crossing = [[getattr(node, "name", "") for node in segment.outputs] for segment in segments]
    assert crossing[0] == ["sum_1", "sum_2", "arange_2"]
    run = InductorLowering().lower(program, name="counting")
    x = torch.randn(51)
    close(run([*lifted, x]), Counting()(x))


def test_conditions_checked_per_call() -> None:
    cache = CompileCache()
    program, lifted = trace(Halves(), (torch.randn(36, 4),), ({0},))
    run = InductorLowering(cache).lower(program, name="halves")
    assert any(cache.stats.conditions.values())
    for length in (36, 40, 200, 300):
        x = torch.randn(length, 4)
        close(run([*lifted, x]), Halves()(x))


class Aliases(nn.Module):
    """Returns its input, a view of it, two views of a buffer, and a value twice."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = x * 2 + y
        return x, x.transpose(0, 1), z, z.view(-1), z, y[1:]


def test_outputs_alias() -> None:
    program, lifted = trace(Aliases(), (torch.randn(6, 4), torch.randn(6, 4)), ({0}, {0}))
    run = InductorLowering().lower(program, name="aliases")
    x, y = torch.randn(9, 4), torch.randn(9, 4)
    found = run([*lifted, x, y])
    close(found, Aliases()(x, y))
    assert found[0] is x
    assert found[1].data_ptr() == x.data_ptr()
    assert found[3].data_ptr() == found[2].data_ptr() == found[4].data_ptr()


def test_parameters_require_grad(stack: Stack, cold: Traced, cache: CompileCache) -> None:
    program, lifted = cold
    assert lifted[0].requires_grad
    run = InductorLowering(cache).lower(program, name="cold")
    assert torch.is_grad_enabled()
    assert not any(value.requires_grad for value in run([*lifted, prompt(5)]))


def test_inputs_of_another_layout(stack: Stack, cold: Traced, cache: CompileCache) -> None:
    program, lifted = cold
    run = InductorLowering(cache).lower(program, name="cold")
    x = torch.randn(1, 64, 12).transpose(1, 2)
    with torch.no_grad():
        close(run([*lifted, x]), stack(x.contiguous()))
    assert x.shape == (1, 12, 64)


def test_int_inputs_and_outputs() -> None:
    """Dynamo passes sizes as placeholders, and programs may return sizes."""
    program, _ = trace(Aliases(), (torch.randn(6, 4), torch.randn(6, 4)), ({0}, {0}))
    first = next(iter(program.graph.nodes))
    size = first.meta["val"].size(0)
    with program.graph.inserting_before(first):
        number = program.graph.placeholder("s0")
        number.meta["val"] = size
    output = next(iter(program.graph.find_nodes(op="output")))
    with program.graph.inserting_before(output):
        more = program.graph.call_function(torch.ops.aten.sym_size.int, (output.args[0][2], 0))
        rows = program.graph.call_function(torch.ops.aten.arange.default, (number,))
    output.args = ((output.args[0][2], number, more, 7, None, rows),)
    program.recompile()
    run = InductorLowering().lower(program, name="numbers")
    x = torch.ones(9, 4)
    found = run([9, x, x])
    assert found[1:5] == (9, 9, 7, None)
    assert torch.equal(found[5], torch.arange(9))
    with pytest.raises(LoweringError, match="takes 3 inputs"):
        run([x, x])


def test_failure_names_segment() -> None:
    program, _ = trace(Aliases(), (torch.randn(6, 4), torch.randn(6, 4)), ({0}, {0}))
    lowering = InductorLowering(CompileCache({"config_patches": {"no_such_option": 1}}))
    with pytest.raises(LoweringError, match=r"program 'bad', segment 'prelude'.*no_such_option"):
        lowering.lower(program, name="bad")
    for node in program.graph.find_nodes(op="placeholder"):
        node.meta.clear()
    with pytest.raises(LoweringError, match="no meta"):
        InductorLowering().lower(program, name="bare")


def test_kernels_not_run_at_compile_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    compile_segment = torch._inductor.standalone_compile

    def compile_and_note(*args: Any, options: dict[str, Any], **kwargs: Any) -> Any:
        found.append(options)
        return compile_segment(*args, options=options, **kwargs)

    monkeypatch.setattr("vlcache_fx.lowering.variant.standalone_compile", compile_and_note)
    program, _ = trace(Aliases(), (torch.randn(6, 4), torch.randn(6, 4)), ({0}, {0}))
    InductorLowering(CompileCache({"config_patches": {"max_autotune": False}})).lower(program, name="one")
    patches = {"triton.autotune_at_compile_time": False, "max_autotune": False}
    assert found == [{"config_patches": patches}] * len(found)
    assert found


def test_decompositions_applied() -> None:
    with torch.library._scoped_library("vlcache_lowering_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x.new_full((), float("nan")), "CPU")
        torch.library.register_fake("vlcache_lowering_test::double", torch.empty_like, lib=library)
        operator = torch.ops.vlcache_lowering_test.double.default
        program, lifted = trace(Aliases(), (torch.randn(6, 4), torch.randn(6, 4)), ({0}, {0}))
        product = next(n for n in program.graph.nodes if n.target == torch.ops.aten.mul.Tensor)
        product.target, product.args = operator, (product.args[0],)
        program.recompile()
        run = InductorLowering(decompositions={operator: lambda x: x + x}).lower(program, name="custom")
        x, y = torch.randn(9, 4), torch.randn(9, 4)
        close(run([*lifted, x, y]), Aliases()(x, y))

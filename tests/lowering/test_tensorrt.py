"""The TensorRT lowering, without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import fx
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import vlcache_fx
from vlcache_fx.analysis import analyze
from vlcache_fx.capture.exported import capture_exported
from vlcache_fx.errors import OptionError
from vlcache_fx.ir import Captured
from vlcache_fx.lowering import TensorRtLowering
from vlcache_fx.lowering.tensorrt import MIN_NODES, dry_run, exclusion_reason
from vlcache_fx.options import Options
from vlcache_fx.passes import Program
from vlcache_fx.passes.partition.split_encoder import split_encoder
from vlcache_fx.passes.standard import CLEANUP, cold_program, warm_program
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def made(build: Callable[[Captured], Program]) -> fx.GraphModule:
    inputs = tiny_vlm_inputs(5, 4, [(20, 0)])
    captured = capture_exported(torch.export.export(tiny_vlm(num_layers=2), (), inputs))
    CLEANUP.run(Program(captured.graph_module))
    split = split_encoder(captured, analyze(captured).encoder)
    assert split is not None
    return build(split.decoder).graph_module


@pytest.fixture(scope="module")
def warm() -> fx.GraphModule:
    """Return the warm program of a tiny VLM."""
    return made(warm_program)


@pytest.fixture(scope="module", params=["warm", "cold"])
def program(request: pytest.FixtureRequest, warm: fx.GraphModule) -> fx.GraphModule:
    """Return a program of a tiny VLM."""
    return warm if request.param == "warm" else made(cold_program)


def test_dry_run_covers_all_calls(program: fx.GraphModule) -> None:
    before = str(program.graph)
    run = dry_run(program)
    inside = [name for names in run.engines for name in names]
    calls = [node.name for node in program.graph.nodes if node.op == "call_function"]
    assert len(inside) == len(set(inside))
    assert set(inside) | run.outside.keys() == set(calls)
    assert not set(inside) & run.outside.keys()
    assert all(reason for reason in run.outside.values())
    assert str(program.graph) == before


def test_dry_run_engines_in_order(program: fx.GraphModule) -> None:
    run = dry_run(program)
    order = {node.name: index for index, node in enumerate(program.graph.nodes)}
    assert run.engines
    for names in run.engines:
        assert len(names) >= MIN_NODES
        assert sorted(names, key=order.__getitem__) == list(names)
    firsts = [order[names[0]] for names in run.engines]
    assert firsts == sorted(firsts)
    products = {
        node.name
        for node in program.graph.nodes
        if str(node.target) in ("aten.linear.default", "aten.mm.default", "aten.addmm.default")
    }
    inside = {name for names in run.engines for name in names}
    assert products
    assert products <= inside


def test_dry_run_excludes_cache_operators(warm: fx.GraphModule) -> None:
    run = dry_run(warm)
    ours = {
        node.name
        for node in warm.graph.nodes
        if node.op == "call_function" and getattr(node.target, "namespace", None) == "vlcache"
    }
    assert ours
    assert ours <= run.outside.keys()
    for name in ours:
        assert run.outside[name] == "a cache operator: it reads stored rows"


def test_dry_run_engines_are_acyclic(program: fx.GraphModule) -> None:
    """No engine reads results of a later engine."""
    run = dry_run(program)
    engine_of = {name: number for number, names in enumerate(run.engines) for name in names}
    needs: dict[int, set[int]] = {number: set() for number in range(len(run.engines))}
    seen: dict[fx.Node, set[int]] = {}
    for node in program.graph.nodes:
        above = set().union(*(seen[used] for used in node.all_input_nodes)) if node.all_input_nodes else set()
        own = engine_of.get(node.name)
        if own is not None:
            needs[own] |= above - {own}
            above |= {own}
        seen[node] = above
    assert not [(a, b) for a in needs for b in needs[a] if a in needs[b]]


def graph_of(function: Callable[..., object], *examples: torch.Tensor) -> fx.GraphModule:
    traced: fx.GraphModule = make_fx(function, tracing_mode="fake")(*examples)
    return traced


def test_dry_run_excludes_float64() -> None:
    traced = graph_of(lambda x: (x.double() * 2).float() + 1, torch.ones(3))
    reasons = {node.name: exclusion_reason(node) for node in traced.graph.nodes if node.op == "call_function"}
    assert "TensorRT has no float64" in reasons.values()
    assert None in reasons.values()
    assert dry_run(traced).engines == ()


def test_dry_run_excludes_small_regions() -> None:
    traced = graph_of(lambda x: x * 2 + 1, torch.ones(3))
    run = dry_run(traced)
    assert run.engines == ()
    assert set(run.outside.values()) == {f"a region of fewer than {MIN_NODES} nodes"}
    assert len(dry_run(graph_of(lambda x: (x * 2 + 1).tanh(), torch.ones(3))).engines) == 1


def test_dry_run_excludes_input_mutations() -> None:
    def write(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (cache.index_copy_(0, torch.arange(2), rows.tanh() * 2 + 1) * 2).tanh() + 1

    run = dry_run(graph_of(write, torch.ones(5, 3), torch.ones(2, 3)))
    assert run.outside["index_copy_"].startswith("an input mutation")
    assert run.engines


def test_exclusion_reason_placeholder() -> None:
    traced = graph_of(lambda x: x * 2, torch.ones(3))
    (placeholder,) = traced.graph.find_nodes(op="placeholder")
    assert exclusion_reason(placeholder) == "not a call"


@without_gpu
def test_lowering_without_gpu() -> None:
    for make in (
        TensorRtLowering,
        lambda: vlcache_fx.Engine(Options(lowering="tensorrt")),
        lambda: vlcache_fx.compile(tiny_vlm(), lowering="tensorrt"),
    ):
        with pytest.raises(OptionError, match=r"needs an NVIDIA GPU.*'inductor' or 'eager'.*export"):
            make()


def test_lowering_without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(OptionError, match=r"needs the package torch-tensorrt .*pip install torch-tensorrt"):
        TensorRtLowering()


def test_lower_compiles_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake of Torch-TensorRT, results equal those of the model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    compiled: list[set[str]] = []

    def compile_eagerly(module: fx.GraphModule, *, backend: str, dynamic: bool) -> fx.GraphModule:
        assert (backend, dynamic) == ("torch_tensorrt", True)
        compiled.append({getattr(node.target, "namespace", "") for node in module.graph.nodes})
        return module

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    model = tiny_vlm(num_layers=2)
    shapes = {"input_ids": {1: Dim("tokens", min=4)}, "pixel_values": {0: Dim("patches", min=2)}}
    exported = torch.export.export(model, (), tiny_vlm_inputs(5, 4, [(20, 0)]), dynamic_shapes=shapes)
    with_reuse = vlcache_fx.compile_exported(exported, lowering="tensorrt", policy="full", strict=True)
    for before, mode in ((5, "cold"), (9, "warm"), (30, "warm")):
        inputs = tiny_vlm_inputs(before, 4, [(20, 0)])
        with torch.no_grad():
            torch.testing.assert_close(with_reuse(**inputs), model(**inputs), atol=2e-6, rtol=1e-5)
        assert with_reuse.vlcache.last_report is not None
        assert with_reuse.vlcache.last_report["mode"] == mode
    assert len(compiled) > 2
    assert not any("vlcache" in namespaces for namespaces in compiled)


def test_lower_keeps_program(warm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    parts: list[fx.GraphModule] = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: parts.append(module) or module)
    before = str(warm.graph)
    TensorRtLowering().lower(warm, name="warm")
    assert str(warm.graph) == before
    assert len(parts) == len(dry_run(warm).engines)

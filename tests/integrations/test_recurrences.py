"""Recurrences of transformers' models are traced as one node each, and by our backends alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import vlcache_fx
from vlcache_fx import api, backend
from vlcache_fx.integrations.recurrences import substitute_recurrences, takes_recurrences
from vlcache_fx.testing.graphs import TracedGraph, traced_graphs

from ..runtime.helpers import own_compiler_state

pytest.importorskip("transformers")
from transformers import DynamicCache
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from .hybrids import CONFIGS, HIDDEN, RECURRENT_LAYERS, tiny_hybrid

Graphs = list[fx.GraphModule]


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def recurrences(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is torch.ops.vlcache.recur]


def embeds(tokens: int) -> Tensor:
    return torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def states(outputs: Any) -> list[Tensor]:
    """Return the recurrent states in the cache that a model returns."""
    cache = outputs.get("past_key_values") or outputs.cache_params
    kept = [getattr(layer, "recurrent_states", None) for layer in cache.layers]
    return [state for layer in kept if layer for state in layer.values()]


def kept_in(graphs: Graphs) -> Callable[..., Any]:
    """Return a backend that appends its graphs to ``graphs``, and runs them as they are."""

    def keep(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    return keep


def graph_of(graph: TracedGraph) -> fx.Graph:
    return graph.graph_module.graph


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_node_per_layer(kind: str) -> None:
    """... whose graph serves all lengths, and computes what the model computes."""
    model = tiny_hybrid(kind).base_model
    substitute_recurrences(model)
    graphs: Graphs = []
    compiled = torch.compile(model, backend=takes_recurrences(kept_in(graphs)), dynamic=True)
    with torch.no_grad():
        for tokens in (70, 130):
            call = {"inputs_embeds": embeds(tokens), "use_cache": True}
            got, expected = compiled(**call), model(**call)
            torch.testing.assert_close(
                got.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5
            )
            wanted = states(expected)
            assert len(wanted) == RECURRENT_LAYERS[kind]
            torch.testing.assert_close(states(got), wanted, rtol=1e-4, atol=1e-5)
    (graph,) = graphs
    nodes = recurrences(graph.graph)
    assert len(nodes) == RECURRENT_LAYERS[kind]
    assert all(isinstance(node.meta["example_value"][0].shape[1], torch.SymInt) for node in nodes)


def test_graphs_do_not_grow_with_the_length() -> None:
    model = tiny_hybrid("qwen3_next").base_model
    calls = [{"inputs_embeds": embeds(tokens), "use_cache": True} for tokens in (70, 400)]
    short, long = (traced_graphs(model, call)[0] for call in calls)
    assert len(graph_of(short).nodes) == len(graph_of(long).nodes)
    first, second = traced_graphs(model, *calls)  # with symbols from the second length on
    assert [len(recurrences(graph_of(graph))) for graph in (first, second)] == [1, 1]
    assert isinstance(recurrences(graph_of(second))[0].meta["example_value"][0].shape[1], torch.SymInt)


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """The graphs that either door gives to the compiler, which leaves them as they are."""
    graphs: Graphs = []

    def record(graph: fx.GraphModule, _: Any, engine: Any) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            engine.note_graph_call()
            return graph(*args)

        return run

    for door in (api, backend):
        monkeypatch.setattr(door, "compile_graph", record)
    return graphs


def conversation(model: nn.Module) -> list[Tensor]:
    """Return the outputs of a prompt, a second turn, a decoding step and a third turn, with one cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        return [
            model(inputs_embeds=embeds(tokens), past_key_values=cache).last_hidden_state
            for tokens in (70, 20, 1, 30)
        ]


@pytest.mark.parametrize("door", ["api", "backend"])
def test_conversation_through_both_doors(compiled_graphs: Graphs, door: str) -> None:
    model = tiny_hybrid("qwen3_5_text").base_model
    expected = conversation(model)
    if door == "api":
        compiled = vlcache_fx.compile(model, lowering="eager")
    else:
        compiled = torch.compile(model, backend="vlcache", options={"lowering": "eager"})
    torch.testing.assert_close(conversation(compiled), expected, rtol=1e-4, atol=1e-5)
    # Decoding steps are not changed: their loop is one iteration.
    assert [len(recurrences(graph.graph)) for graph in compiled_graphs] == [1, 1, 0, 1]


@pytest.mark.parametrize("kind", ["kimi_linear", "nemotron_h"])
def test_generate(compiled_graphs: Graphs, kind: str) -> None:
    model = tiny_hybrid(kind)
    prompt = {"input_ids": torch.arange(3, 40)[None], "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**prompt)
    got = vlcache_fx.compile(model, lowering="eager").generate(**prompt)
    assert got.tolist() == expected.tolist()
    assert len(recurrences(compiled_graphs[0].graph)) == 1


def test_graphs_of_other_backends_are_not_changed() -> None:
    model = tiny_hybrid("qwen3_5_text").base_model

    def traced() -> str:
        graphs: Graphs = []
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=kept_in(graphs))(inputs_embeds=embeds(70))
        (graph,) = graphs
        return str(graph.graph)

    before = traced()
    (ours,) = traced_graphs(model, {"inputs_embeds": embeds(70)})
    assert len(recurrences(graph_of(ours))) == 1
    assert traced() == before
    assert "recur" not in before.replace("recurrent", "")


def test_backends_in_one_process_do_not_share_code() -> None:
    """Without a reset between them: Dynamo keeps the code of each backend apart."""
    model, inputs = OwnCode(qwen.torch_chunk_gated_delta_rule), rule_inputs()
    substitute_recurrences()
    graphs: Graphs = []
    others: Graphs = []
    ours = torch.compile(model, backend=takes_recurrences(kept_in(graphs)))
    other = torch.compile(model, backend=kept_in(others))
    for compiled in (ours, other, ours, other):
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert [len(recurrences(graph.graph)) for graph in (*graphs, *others)] == [1, 0]


class OwnCode(nn.Module):
    """A model with code of its own, which calls the recurrence of its module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        outputs: Tensor = self.function(*inputs, **options)[0]
        return outputs


@pytest.fixture
def own_code(monkeypatch: pytest.MonkeyPatch) -> OwnCode:
    """A model whose module was imported just now, as ``trust_remote_code`` does."""
    code = qwen.torch_chunk_gated_delta_rule.__wrapped__
    function = FunctionType(code.__code__, code.__globals__, code.__name__, code.__defaults__)
    module = ModuleType("transformers_modules.recurrent")
    module.torch_chunk_gated_delta_rule = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return OwnCode(function)


def test_functions_that_kernels_made_modules(own_code: OwnCode) -> None:
    """The library ``kernels`` does so, to exchange them."""
    func = own_code.function

    class Func(nn.Module):
        kernel_layer_name = "chunk_gated_delta_rule"

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    module = Func()
    sys.modules["transformers_modules.recurrent"].torch_chunk_gated_delta_rule = module  # type: ignore[attr-defined]
    assert func in substitute_recurrences()
    graphs: Graphs = []
    model = OwnCode(module)
    compiled = torch.compile(model, backend=takes_recurrences(kept_in(graphs)))
    torch.testing.assert_close(compiled(*rule_inputs()), model(*rule_inputs()), rtol=1e-4, atol=1e-5)
    assert [len(recurrences(graph.graph)) for graph in graphs] == [1]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function with the signature of ``fla``, which forbids Dynamo to trace it."""

    @torch.compiler.disable
    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        head_first: bool = False,
    ) -> Any:
        assert not head_first
        assert scale is None
        return qwen.torch_chunk_gated_delta_rule.__wrapped__(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state
        )

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return chunk_gated_delta_rule


class Calling(OwnCode):
    """A model that calls a library's kernel by keywords."""

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        named = dict(zip(("q", "k", "v", "g", "beta"), inputs, strict=True))
        outputs: Tensor = self.function(**named, **options)[0] + 1
        return outputs


def test_kernels_of_libraries(kernel: Callable[..., Any]) -> None:
    model, inputs = Calling(kernel), rule_inputs()
    expected = model(*inputs)
    before: Graphs = []
    torch.compile(model, backend=kept_in(before))(*inputs)
    assert kernel in substitute_recurrences()
    graphs: Graphs = []
    compiled = torch.compile(model, backend=takes_recurrences(kept_in(graphs)))
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert [len(recurrences(graph.graph)) for graph in graphs] == [1]
    torch._dynamo.reset()
    after: Graphs = []
    assert torch.equal(torch.compile(model, backend=kept_in(after))(*inputs), expected)
    assert [str(graph.graph) for graph in after] == [str(graph.graph) for graph in before]


def rule_inputs(tokens: int = 70) -> list[Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, tokens, 2, 4) / 4 for _ in range(3))
    return [query, key, value, -torch.rand(1, tokens, 2), torch.rand(1, tokens, 2)]


def test_modules_that_are_imported_late(compiled_graphs: Graphs, own_code: OwnCode) -> None:
    """The backend had no chance to substitute the function before Dynamo has traced it."""
    torch.compile(nn.Linear(2, 2), backend="vlcache")  # torch looks the backend up once per process
    compiled = torch.compile(own_code, backend="vlcache", dynamic=True)
    with torch.no_grad():
        for inputs in (rule_inputs(), rule_inputs(200)):
            torch.testing.assert_close(compiled(*inputs), own_code(*inputs), rtol=1e-4, atol=1e-5)
    assert [len(recurrences(graph.graph)) for graph in compiled_graphs] == [1]


def test_functions_are_substituted_once(own_code: OwnCode) -> None:
    assert own_code.function in substitute_recurrences()
    assert substitute_recurrences() == []
    torch._dynamo.reset()
    assert substitute_recurrences() == []


def test_gradients_flow_through_the_original(compiled_graphs: Graphs) -> None:
    model, inputs = OwnCode(qwen.torch_chunk_gated_delta_rule), rule_inputs()
    compiled = torch.compile(model, backend="vlcache", options={"lowering": "eager"})
    gradients = []
    for function in (model, compiled):
        query = inputs[0].clone().requires_grad_()
        function(query, *inputs[1:]).sum().backward()
        gradients.append(query.grad)
    torch.testing.assert_close(*gradients)
    assert [len(recurrences(graph.graph)) for graph in compiled_graphs] == [0]


def test_unknown_arguments_reach_the_original() -> None:
    model, inputs = OwnCode(qwen.torch_chunk_gated_delta_rule), rule_inputs()
    compiled = torch.compile(model, backend=takes_recurrences(lambda graph, _: graph))
    substitute_recurrences()
    with pytest.raises(ValueError, match="packed sequences"):
        compiled(*inputs, cu_seqlens=torch.tensor([0, 70]))


IMPORT = """
from torch._dynamo.variables import PolyfilledFunctionVariable
import sys, types
module = sys.modules["transformers_modules.own"] = types.ModuleType("own")
def chunk_gated_delta_rule(query, key, value, g, beta): ...
module.chunk_gated_delta_rule = chunk_gated_delta_rule
import vlcache_fx, vlcache_fx.api, vlcache_fx.backend, vlcache_fx.entry
import vlcache_fx.integrations.recurrences
handlers = PolyfilledFunctionVariable._get_polyfill_handlers()
print(chunk_gated_delta_rule in handlers)
vlcache_fx.entry.vlcache
print(chunk_gated_delta_rule in handlers)
"""


def test_imports_substitute_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]

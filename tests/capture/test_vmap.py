"""Functions under ``torch.vmap`` become operators on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from vlcache_fx.capture.vmap import CLOSE, OPEN, inline_vmap
from vlcache_fx.testing.graphs import captured_graph, traced_graphs
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_attention import rotary_angles
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import own_compiler_state, with_backend

SIZES = (2, 5)


class Of(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **call: Tensor) -> Any:
        return self.function(**call)


def call(samples: int = SIZES[0], tokens: int = SIZES[1]) -> dict[str, Tensor]:
    kept = torch.ones(samples, tokens, dtype=torch.bool)
    kept[0, :2] = False
    return {"x": torch.arange(float(samples * tokens)).reshape(samples, tokens), "kept": kept}


def masked(x: Tensor, kept: Tensor) -> Tensor:
    """A mask as a function of one sample, head, query and key."""

    def may_see(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & kept[sample, key] & (head >= 0)

    places = torch.arange(x.shape[1])
    made = may_see
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        made = torch.vmap(made, in_dims=dims, out_dims=0)
    mask = made(torch.arange(x.shape[0]), torch.arange(1), places, places)
    return torch.where(mask[:, 0], x[:, None], 0.0).sum(-1)


def once(x: Tensor, kept: Tensor) -> Tensor:
    return torch.vmap(lambda row, flags: row.cumsum(0) * flags)(x, kept) + 1


def last_dimension(x: Tensor, kept: Tensor) -> Tensor:
    return torch.vmap(lambda column: column.sum() + kept.sum(), in_dims=1)(x) * 2


def turned(x: Tensor, kept: Tensor) -> Tensor:
    return torch.vmap(lambda row: row.flip(0), out_dims=1)(x) @ kept.float()


def twice(x: Tensor, kept: Tensor) -> Tensor:
    """Two regions; the second reads the result of the first."""
    first = torch.vmap(lambda row: row - row.mean())(x)
    return first + torch.vmap(lambda row, flags: (row * row).sum() * flags)(first, kept)


def several_results(x: Tensor, kept: Tensor) -> Any:
    totals, rows = torch.vmap(lambda row, flags: (row.sum(), row * flags))(x, kept)
    return rows + totals[:, None], totals


def constants(x: Tensor, kept: Tensor) -> Tensor:
    return torch.vmap(lambda row: row * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))(x) * kept


FUNCTIONS = [masked, once, last_dimension, turned, twice, several_results, constants]


def graph_of(function: Callable[..., Any], dynamic: bool | None = None) -> tuple[fx.GraphModule, list[Any]]:
    (graph,) = traced_graphs(Of(function), call(), dynamic=dynamic)
    return graph.graph_module, list(graph.calls[0])


def has_levels(module: fx.GraphModule) -> bool:
    return any(node.target in (OPEN, CLOSE) for node in module.graph.nodes)


def equal(got: Any, want: Any) -> None:
    got, want = ((one,) if isinstance(one, Tensor) else one for one in (got, want))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: one.__name__)
def test_inline_vmap_values(function: Callable[..., Any]) -> None:
    module, args = graph_of(function)
    assert has_levels(module)
    assert inline_vmap(module)
    assert not has_levels(module)
    want = function(**call())
    equal(module(*args), want if isinstance(want, tuple) else (want,))


@pytest.mark.parametrize("function", [masked, once, twice], ids=lambda one: one.__name__)
@pytest.mark.parametrize("dynamic", [None, True])
def test_inline_vmap_in_capture(function: Callable[..., Any], dynamic: bool | None) -> None:
    """After capture, every node has a value; symbolic sizes stay symbolic."""
    other = call(3, 7) if dynamic else call()
    captured, graph = captured_graph(Of(function), call(), other, dynamic=dynamic)
    for given, args in zip((call(), other), graph.calls, strict=True):
        assert captured.holds_for(args)
        equal(captured.graph_module(*args)[0], function(**given))


def test_inline_vmap_without_vmap() -> None:
    module, _ = graph_of(lambda x, kept: x * kept)
    before = str(module.graph)
    assert not inline_vmap(module)
    assert str(module.graph) == before


def test_inline_vmap_twice() -> None:
    module, _ = graph_of(masked)
    assert inline_vmap(module)
    before = str(module.graph)
    assert not inline_vmap(module)
    assert str(module.graph) == before


def test_inline_vmap_failure_closes_levels() -> None:
    """A function that cannot be batched is refused; later traces are not affected."""
    module, _ = graph_of(once)
    for node in module.graph.nodes:
        if node.target == "cumsum":
            node.target = "no_such_method"
    module.recompile()
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    with pytest.raises(AttributeError, match="no_such_method"):
        inline_vmap(module)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == depth
    module, args = graph_of(once)
    assert inline_vmap(module)
    equal(module(*args), (once(**call()),))


class Vmapped(TinyVlm):
    """Its mask is a vmapped function of one query and one key."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        x = embeds.masked_scatter(image, self.encoder(pixel_values))
        places = torch.arange(x.shape[1])
        row = torch.vmap(lambda query, key: key <= query, in_dims=(None, 0))
        mask = torch.vmap(row, in_dims=(0, None))(places, places)[None, None]
        for layer in self.decoder.layers:
            x = layer(x, rotary_angles(places, self.decoder.shape.rotary_dim), mask)
        logits: Tensor = self.decoder.head(self.decoder.norm(x))
        return logits


def test_compile_vmapped_mask() -> None:
    model: Any = tiny_vlm(cls=Vmapped, last_only=False)
    with own_compiler_state():
        pair = with_backend(model, policy="full")
        off, report = pair.run(**tiny_vlm_inputs(3, 5, [(20, 0)]))
        assert (off, report["mode"]) == (0.0, "cold")
        off, report = pair.run(**tiny_vlm_inputs(9, 4, [(20, 0)], text_seed=1))
        assert report["mode"] == "warm"
        assert off <= 1e-5
        assert pair.engine.refusals == []

"""Recurrences and convolutions of a decoder: what they read, and the layers that they form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from vlcache_fx.analysis import DecoderFacts, analyze
from vlcache_fx.analysis.attention.sites import Site
from vlcache_fx.analysis.recurrences import (
    Convolution,
    Recurrence,
    convolution_of,
    find_mixers,
    is_state,
    recurrence_of,
    rows_after,
)
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.ir.copies import copy_captured
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_hybrid import HEADS, KEY, VALUE, WIDTH, tiny_hybrid

from .graphs import CALL, attend, capture, captured_vlm

recur = torch.ops.vlcache.recur
X = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(1))


@functools.cache  # analysis changes nothing in it
def captured_hybrid(kinds: str, dynamic: bool | None = None) -> Captured:
    return captured_graph(tiny_hybrid(kinds), CALL, dynamic=dynamic)[0]


def letters(facts: DecoderFacts) -> list[str]:
    """Return the mixers of each layer, a letter each."""
    names = {Site: "a", Recurrence: "r", Convolution: "c"}
    return ["".join(names[type(mixer)] for mixer in mixers) for mixers in facts.stream.mixers]


# Layers -----------------------------------------------------------------------------------------------------


# Mixers are found by operators, whatever the sizes; other analyses of such graphs have static ones.
@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ("da", ["cr", "a"]),
        ("ad", ["a", "cr"]),
        ("dda", ["cr", "cr", "a"]),
        ("cac", ["c", "a", "c"]),
        ("sca", ["cr", "c", "a"]),
        ("ap", ["a", "acr"]),
        ("pd", ["acr", "cr"]),
        ("pcp", ["acr", "c", "acr"]),
    ],
)
def test_mixers_of_layers(kinds: str, want: list[str], dynamic: bool | None) -> None:
    """A convolution in front of a recurrence is in its layer, as is a state space beside attention."""
    facts = analyze(captured_hybrid(kinds, dynamic))
    assert letters(facts) == want
    boundaries = facts.stream.boundaries
    assert len(boundaries) == len(kinds) + 1
    assert str(boundaries[0].target) == "aten.masked_scatter.default"
    assert all(str(boundary.target) == "aten.add.Tensor" for boundary in boundaries[1:])
    assert {str(boundary.meta["val"].shape) for boundary in boundaries} == {
        str(boundaries[0].meta["val"].shape)
    }
    parts = [node for members in facts.stream.members for node in members]
    assert len(parts) == len(set(parts))
    assert set(facts.stream.nodes) == {boundaries[0], *parts, *facts.stream.tail}


@pytest.mark.parametrize("kinds", ["dca", "pd", "sap"])
def test_parts_cover_layer(kinds: str) -> None:
    facts = analyze(captured_hybrid(kinds))
    for layer, members, mixers in zip(facts.layers, facts.stream.members, facts.stream.mixers, strict=True):
        parts = [*layer.kv_part, *layer.full_part, *layer.q_part]
        assert len(parts) == len(set(parts))
        assert set(parts) == set(members)
        carrying = [mixer.node for mixer in mixers if not isinstance(mixer, Site)]
        assert set(carrying) <= set(layer.kv_part)  # each row needs the rows before
        assert [mixer.node for mixer in (*layer.convolutions, *layer.recurrences)] == carrying
        assert (layer.site is None) == (not any(isinstance(mixer, Site) for mixer in mixers))
        assert layer.site is None or layer.site.node in layer.q_part
        assert (layer.key_frontier is None) == (layer.site is None)
    assert {node for layer in facts.layers for node in (*layer.kv_part, *layer.q_part)} <= set(facts.flows)


def test_slots_of_states() -> None:
    facts = analyze(captured_hybrid("dcap"))
    assert [str(tail.slot) for tail in facts.tails] == ["0.inputs.0", "1.inputs.0", "3.inputs.0"]
    assert [tail.convolution.width for tail in facts.tails] == [WIDTH, 3, WIDTH]
    assert [str(state.slot) for state in facts.states] == ["0.matrix.0", "3.matrix.0"]
    assert {state.recurrence.state_sizes for state in facts.states} == {(HEADS, KEY, VALUE)}
    assert [str(frontier.slot) for frontier in facts.frontiers] == ["2.k", "2.v", "3.k", "3.v"]
    assert facts.past == frozenset()
    assert len(facts.sites) == 2


def test_decoder_of_attention_has_no_states() -> None:
    facts = analyze(captured_vlm())
    assert (facts.tails, facts.states) == ((), ())
    assert letters(facts) == ["a", "a"]


def test_facts_of_copy() -> None:
    captured = captured_hybrid("dcap")
    before = str(captured.graph_module.graph)
    nodes: dict[Node, Node] = {}
    copy = copy_captured(captured, nodes)
    assert analyze(captured).on(nodes) == analyze(copy)
    assert str(captured.graph_module.graph) == before


# Operators --------------------------------------------------------------------------------------------------


def graph_of(function: Callable[..., Any], **call: Tensor) -> list[Node]:
    """Return the calls of a graph."""
    graph = capture(function, call or {"x": X}).graph_module.graph
    return [node for node in graph.nodes if node.op == "call_function"]


def heads(x: Tensor) -> Tensor:
    """[batch, tokens, width] -> one head of it."""
    return x[:, :, None]


def gated(x: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """A recurrence of one head, with all its results."""
    results: tuple[Tensor, ...] = recur(
        heads(x), heads(x), heads(x), -heads(x).square().sum(-1), heads(x).sigmoid().mean(-1), **options
    )
    return results


def linear(x: Tensor) -> Tensor:
    """A recurrence of one head, without a delta rule."""
    rows: Tensor = recur(heads(x), heads(x), heads(x), -heads(x).square().sum(-1))[0]
    return rows[:, :, 0]


def delta(x: Tensor) -> Tensor:
    """A recurrence of one head."""
    return gated(x)[0][:, :, 0]


def convolved(x: Tensor) -> Tensor:
    """Each channel with the two tokens before."""
    x = x.transpose(1, 2)
    return F.conv1d(x, WEIGHT, padding=2, groups=4)[..., : x.shape[-1]].transpose(1, 2)


@pytest.mark.parametrize(("function", "count"), [(delta, 5), (linear, 4)])
def test_recurrence_of(function: Callable[[Tensor], Tensor], count: int) -> None:
    (found,) = [r for node in graph_of(function) if (r := recurrence_of(node)) is not None]
    assert found.sources == found.operands == found.node.args[:count]
    assert len(found.operands) == count
    assert found.state is None
    assert found.state_sizes == (1, 4, 4)
    assert found.dtype is torch.float32


def test_recurrence_with_a_state() -> None:
    def continued(x: Tensor, state: Tensor) -> Tensor:
        rows: Tensor = recur(heads(x), heads(x), heads(x), -heads(x).square().sum(-1), None, state)[0]
        return rows

    nodes = graph_of(continued, x=X.to(torch.float64), state=torch.ones(1, 1, 4, 4, dtype=torch.float64))
    (found,) = [r for node in nodes if (r := recurrence_of(node)) is not None]
    assert len(found.operands) == 4
    assert found.state is not None
    assert found.state.op == "placeholder"
    assert found.dtype is torch.float64


def test_convolution_of() -> None:
    (found,) = [c for node in graph_of(convolved) if (c := convolution_of(node)) is not None]
    assert (found.width, found.dim, found.before) == (3, 2, None)
    assert found.sources == (found.source,)
    assert str(found.source.target) == "aten.transpose.int"


def test_convolution_behind_earlier_inputs() -> None:
    def continued(x: Tensor, past: Tensor) -> Tensor:
        joined = torch.cat([past, x.transpose(1, 2)], -1)
        rows = F.conv1d(joined, WEIGHT, padding=2, groups=4)[..., : joined.shape[-1]]
        return rows.exp()[..., -x.shape[1] :]

    nodes = graph_of(continued, x=X, past=torch.ones(1, 4, 3))
    (found,) = [c for node in nodes if (c := convolution_of(node)) is not None]
    assert found.before is not None
    assert found.before.op == "placeholder"
    assert found.source.meta["val"].shape == (1, 4, 6)


def test_other_operators_are_neither() -> None:
    nodes = graph_of(lambda x: attend(x).cumsum(1))
    assert nodes
    assert not any(recurrence_of(node) or convolution_of(node) for node in nodes)


def test_states_are_no_rows() -> None:
    """What is computed from the last state alone depends on no row."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, state, *_ = gated(x)
        return rows.exp(), state.sigmoid()

    nodes = graph_of(both)
    (call,) = [node for node in nodes if recurrence_of(node)]
    (state,) = [node for node in nodes if is_state(node)]
    assert state.args == (call, 1)
    after = [str(node.target) for node in rows_after(call)]
    assert "aten.exp.default" in after
    assert "aten.sigmoid.default" not in after


def test_find_mixers_within() -> None:
    captured = captured_hybrid("dca")
    graph = captured.graph_module.graph
    every = find_mixers(graph, (), None)
    assert [type(mixer) for mixer in every] == [Convolution, Recurrence, Convolution]
    assert find_mixers(graph, (), {every[1].node: None}) == every[1:2]
    assert find_mixers(graph, (), {}) == ()


# Hand-written decoders --------------------------------------------------------------------------------------


def layers_of(*steps: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a decoder that adds each step's result to the residual stream."""

    def decoder(x: Tensor) -> Tensor:
        x = x * 2
        for step in steps:
            x = x + step(x)
        return x

    return decoder


def facts_of(function: Callable[..., Any], **call: Tensor) -> DecoderFacts:
    return analyze(capture(function, call or {"x": X}))


def refused(function: Callable[..., Any], **call: Tensor) -> UnsupportedGraphError:
    captured = capture(function, call or {"x": X})
    before = str(captured.graph_module.graph)
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(captured)
    assert str(captured.graph_module.graph) == before
    return refusal.value


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        ((attend, delta), ["a", "r"]),
        ((delta, attend), ["r", "a"]),
        ((linear, delta, attend, convolved), ["r", "r", "a", "c"]),
        ((lambda x: attend(x) + delta(x), attend), ["ar", "a"]),
        ((lambda x: attend(x) * convolved(x).sigmoid(), attend), ["ac", "a"]),
        ((lambda x: delta(convolved(convolved(x))), attend), ["ccr", "a"]),
        ((lambda x: delta(x) + linear(x.exp()), attend), ["rr", "a"]),
    ],
)
def test_hand_written_layers(steps: tuple[Callable[[Tensor], Tensor], ...], want: list[str]) -> None:
    assert letters(facts_of(layers_of(*steps))) == want


def test_recurrences_are_numbered_in_a_layer() -> None:
    facts = facts_of(layers_of(lambda x: delta(x) + linear(x.exp()), attend))
    assert [str(state.slot) for state in facts.states] == ["0.matrix.0", "0.matrix.1"]


def test_past_has_states_of_earlier_calls() -> None:
    def continued(x: Tensor, state: Tensor, past: Tensor) -> Tensor:
        x = x * 2
        joined = torch.cat([past, x.transpose(1, 2)], -1)
        rows = F.conv1d(joined, WEIGHT, padding=2, groups=4)[..., : joined.shape[-1]][..., -x.shape[1] :]
        values = heads(rows.transpose(1, 2))
        x = x + recur(values, values, values, -values.square().sum(-1), None, state)[0][:, :, 0]
        return x + attend(x)

    facts = facts_of(continued, x=X, state=torch.ones(1, 1, 4, 4), past=torch.ones(1, 4, 3))
    assert sorted(node.name for node in facts.past) == sorted(
        node.name for node in (facts.states[0].recurrence.state, facts.tails[0].convolution.before) if node
    )
    assert len(facts.past) == 2


# Refusals ---------------------------------------------------------------------------------------------------


def test_refuses_recurrence_of_attention() -> None:
    """Rows of the attention are computed for fewer tokens than the recurrence needs."""
    refusal = refused(layers_of(lambda x: delta(attend(x)), attend))
    assert refusal.reason is Reason.TOKEN_MIXING
    assert "a recurrence of the same layer reads its result" in refusal.detail


def test_refuses_recurrence_with_padding_of_its_own() -> None:
    def padded(x: Tensor) -> Tensor:
        values = heads(x)
        count = torch.full((x.shape[0],), 3)
        decay = -values.square().sum(-1)
        args = (values, values, values, decay, *[None] * 8, count)
        return recur(*args)[0][:, :, 0]

    refusal = refused(layers_of(padded, attend))
    assert refusal.reason is Reason.TOKEN_MIXING
    assert "padding of its own" in refusal.detail


def test_refuses_convolved_attention() -> None:
    assert refused(layers_of(lambda x: convolved(attend(x)), attend)).reason is Reason.TOKEN_MIXING


def test_samples_of_recurrent_layers() -> None:
    facts = facts_of(layers_of(lambda x: delta(convolved(x)), attend), x=torch.cat([X, X]))
    assert facts.batch_dims is not None
    carriers = [facts.states[0].recurrence.node, facts.tails[0].convolution.node]
    assert [facts.batch_dims[node] for node in carriers] == [0, 0]


def test_refuses_several_prompts_that_continue() -> None:
    """Rows of shorter samples would have zeros between them and the inputs of earlier calls."""

    def continued(x: Tensor, past: Tensor) -> Tensor:
        joined = torch.cat([past, x.transpose(1, 2) * 2], -1)
        rows = F.conv1d(joined, WEIGHT, padding=2, groups=4)[..., : joined.shape[-1]][..., -x.shape[1] :]
        x = x + rows.transpose(1, 2)
        return x + attend(x)

    refusal = refused(continued, x=torch.cat([X, X]), past=torch.ones(2, 4, 3))
    assert refusal.reason is Reason.BATCHED
    assert "inputs of earlier calls" in refusal.detail


def test_refuses_decoders_without_attention() -> None:
    assert refused(layers_of(delta, convolved)).reason is Reason.NO_ATTENTION


def test_refuses_recurrence_over_another_dimension() -> None:
    def across(x: Tensor) -> Tensor:
        return delta(x.transpose(1, 2)).transpose(1, 2)

    assert refused(layers_of(across, attend)).reason is Reason.TOKEN_MIXING


def test_refuses_operands_without_tokens() -> None:
    """A decay that is a weight per position, for example."""

    def decayed(x: Tensor) -> Tensor:
        rows: Tensor = recur(heads(x), heads(x), heads(x), -torch.ones(1, 6, 1))[0]
        return rows[:, :, 0]

    refusal = refused(layers_of(decayed, attend))
    assert refusal.reason is Reason.TOKEN_MIXING
    assert "an operand of the recurrence has no row per token" in refusal.detail


# What a cache keeps -----------------------------------------------------------------------------------------


def cached(keep: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a decoder that returns some of the convolution's inputs; ``keep`` also gets earlier ones."""

    def decoder(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        inputs = x.sigmoid().transpose(1, 2)
        rows = F.conv1d(inputs, WEIGHT, padding=2, groups=4)[..., : inputs.shape[-1]]
        x = x + rows.transpose(1, 2)
        return (x + attend(x))[:, -1:], keep(inputs, past)

    return decoder


PAST = torch.ones(1, 4, 3)
KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last three": lambda inputs, past: inputs[..., -3:],
    "last two": lambda inputs, past: inputs[..., -2:].clone(),
    "written": lambda inputs, past: past.clone().copy_(inputs[..., -3:]),
    "moved": lambda inputs, past: inputs[..., -3:].transpose(1, 2).to(torch.bfloat16),
    "behind earlier ones": lambda inputs, past: torch.cat([past, inputs], -1)[..., -3:],
    "cast": lambda inputs, past: inputs.to(torch.bfloat16)[..., -3:],
}


@pytest.mark.parametrize("name", KEPT)
def test_cache_keeps_last_inputs(name: str) -> None:
    facts = facts_of(cached(KEPT[name]), x=X, past=PAST)
    assert letters(facts) == ["c", "a"]
    assert facts.layers[0].full_part


NOT_KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last five": lambda inputs, past: inputs[..., -5:],
    "first ones": lambda inputs, past: inputs[..., :3],
    "one in the middle": lambda inputs, past: inputs[..., -3:-1],
    "every second": lambda inputs, past: inputs[..., -3::2],
    "five, moved": lambda inputs, past: inputs.transpose(1, 2)[:, -5:],
    "all, moved": lambda inputs, past: inputs.transpose(1, 2).exp(),
    "five behind earlier ones": lambda inputs, past: torch.cat([past, inputs], -1)[..., -5:],
    "a sum": lambda inputs, past: inputs.sum(-1),
    "before earlier ones": lambda inputs, past: torch.cat([inputs, past], -1)[..., -3:],
    "channels": lambda inputs, past: inputs[:, -3:],
}


@pytest.mark.parametrize("name", NOT_KEPT)
def test_refuses_caches_of_other_inputs(name: str) -> None:
    """Warm programs have a few stored inputs between the computed rows, not all tokens."""
    assert refused(cached(NOT_KEPT[name]), x=X, past=PAST).reason is Reason.TOKEN_MIXING


def test_refuses_caches_of_other_rows() -> None:
    """Rows of a layer, besides the inputs of its convolution, are not stored."""

    def decoder(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        inputs = x.sigmoid()
        x = x + convolved(inputs)
        return (x + attend(x))[:, -1:], inputs[:, -3:].exp()

    assert refused(decoder).reason is Reason.TOKEN_MIXING


@pytest.mark.parametrize("beside", [False, True])
def test_cache_keeps_the_last_state(beside: bool) -> None:
    def decoder(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        rows, state, *_ = gated(x)
        x = x + rows[:, :, 0] + (attend(x) if beside else 0)
        return (x + attend(x))[:, -1:], state.to(torch.bfloat16)

    facts = facts_of(decoder)
    assert letters(facts) == ["ra" if beside else "r", "a"]
    assert any(is_state(node) for node in facts.layers[0].full_part)

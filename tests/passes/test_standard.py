"""The cold and warm programs against the unmodified model and a plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir.copies import copy_captured
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.types import Span
from vlcache_fx.spec.slots import Key, Value
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_attention import DecoderShape
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from . import reference
from .programs import Rows, everything, nothing_stored, plan_for, run, small

shapes = st.builds(
    DecoderShape,
    num_layers=st.integers(1, 3),
    heads=st.just(4),
    kv_heads=st.sampled_from([1, 2, 4]),
    norm=st.sampled_from(["rms", "layer"]),
    norm_place=st.sampled_from(["pre", "branch", "post"]),
    rope=st.sampled_from(["full", "partial", "none"]),
    qk_norm=st.booleans(),
    fused_qkv=st.booleans(),
    bias=st.booleans(),
    parallel=st.booleans(),
    explicit_mask=st.booleans(),
    last_only=st.booleans(),
)


@st.composite
def nested_rows(draw: st.DrawFn, length: int, num_layers: int) -> tuple[tuple[int, ...], ...]:
    rows = sorted(draw(st.sets(st.integers(0, length - 1))))
    per_layer = []
    for _ in range(num_layers):
        per_layer.append(tuple(rows))
        rows = [row for row in rows if draw(st.booleans())]
    return tuple(per_layer)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@settings(max_examples=6)
@given(shape=shapes, data=st.data())
def test_programs_equal_reference(shape: DecoderShape, data: st.DataObject) -> None:
    model = tiny_vlm(shape, seed=1)
    length, before, donor_before, after = (
        data.draw(st.integers(low, high), label=name)
        for name, low, high in (("length", 2, 6), ("before", 2, 5), ("donor_before", 2, 5), ("after", 2, 4))
    )
    donor_call = tiny_vlm_inputs(donor_before, 3, [(length, 5)], text_seed=1)
    call = tiny_vlm_inputs(before, after, [(length, 5)], text_seed=2)
    num_tokens = before + length + after
    captured, graph = captured_graph(model, donor_call, call, dynamic=True)
    donor_args, args = graph.calls
    assert captured.holds_for(args)
    every = [torch.arange(num_tokens)] * (shape.num_layers + 1)
    with torch.no_grad():
        want = model(**call)
        plain, _ = reference.forward(model, call, every)
        close(plain[:, -1:] if shape.last_only else plain, want)  # the reference itself

    # The cold program, on both prompts; the first one records the donor.
    cold = cold_program(captured)
    close(run(cold, args, plan_for(cold, num_tokens, [], Rows(())))[0], want)
    donor_tokens = donor_before + length + 3
    with torch.no_grad():
        donor_want = model(**donor_call)
        donor_rows = [torch.arange(donor_tokens)] * (shape.num_layers + 1)
        _, donor_states = reference.forward(model, donor_call, donor_rows)
    donor_logits, *recorded = run(cold, donor_args, plan_for(cold, donor_tokens, [], Rows(())))
    if shape.last_only:
        close(donor_logits, donor_want)
    else:  # all rows remain
        assert torch.equal(donor_logits, donor_want)
    warm = warm_program(captured)
    tables = {}
    for slot, value in zip(cold.recorded, recorded, strict=True):
        if isinstance(slot, Key | Value):
            parts = warm.decoder.layers[slot.layer]
            dim = warm.decoder.flows[
                parts.key_frontier if isinstance(slot, Key) else parts.value_frontier
            ].dim
        else:
            dim = warm.decoder.tail_rows.axis
        tables[slot] = value.narrow(dim, donor_before, length)

    # All rows recomputed: the unmodified model, whatever is stored.
    hit = Span(0, before, length, "key", True)
    all_rows = Rows((tuple(range(length)),) * shape.num_layers)
    nonsense = {slot: torch.full_like(table, float("nan")) for slot, table in tables.items()}
    close(run(warm, args, plan_for(warm, num_tokens, [hit], all_rows), nonsense)[0], want)

    # Some rows: the reference with the donor's keys and values.
    rows = Rows(data.draw(nested_rows(length, shape.num_layers), label="rows"))
    plan = plan_for(warm, num_tokens, [hit], rows)
    got = run(warm, args, plan, tables)[0]
    stored = []
    for key, value in donor_states:
        full_key, full_value = (
            torch.full((1, shape.kv_heads, num_tokens, shape.head_dim), float("nan")) for _ in "kv"
        )
        full_key[:, :, before : before + length] = key[:, :, donor_before : donor_before + length]
        full_value[:, :, before : before + length] = value[:, :, donor_before : donor_before + length]
        stored.append((full_key, full_value))
    with torch.no_grad():
        partial, _ = reference.forward(model, call, plan.rows, stored)
    if shape.last_only:
        close(got, partial[:, torch.searchsorted(plan.rows[-1], torch.tensor([num_tokens - 1]))])
    else:  # rows that are not active at the end come from the donor's last residual
        close(got[:, plan.rows[-1]], partial)


def test_cold_and_warm_program_copy_graph() -> None:
    captured, graph, want = small()
    before = str(captured.graph_module.graph)
    cold_program(captured)
    warm_program(captured)
    assert str(captured.graph_module.graph) == before
    copy = copy_captured(captured)
    assert str(copy.graph_module.graph) == before
    assert not set(copy.graph_module.graph.nodes) & set(captured.graph_module.graph.nodes)
    with torch.no_grad():
        assert torch.equal(copy.graph_module(*graph.calls[0])[0], want)


def test_warm_program_is_deterministic() -> None:
    captured, _, _ = small(num_layers=2)
    assert str(warm_program(captured).graph) == str(warm_program(captured).graph)
    assert str(cold_program(captured).graph) == str(cold_program(captured).graph)


def test_warm_program_reads_donor() -> None:
    """Other tests could pass because nothing is reused."""
    captured, graph, want = small()
    warm = warm_program(captured)
    tables = {slot: torch.zeros_like(table) for slot, table in nothing_stored(warm).items()}
    plan = plan_for(warm, 10, [Span(0, 3, 5, "key", True)], Rows(((),)))
    assert not torch.allclose(run(warm, graph.calls[0], plan, tables)[0], want, atol=1e-3)
    close(run(warm, graph.calls[0], everything(captured), tables)[0], want)


def test_warm_program_one_of_two_images_stored() -> None:
    """The other image is computed like text."""
    model = tiny_vlm(num_layers=2, last_only=False)
    call = tiny_vlm_inputs(2, 3, [(3, 0), (4, 1)])
    captured, graph = captured_graph(model, call)
    cold, warm = cold_program(captured), warm_program(captured)
    span = Span(0, 7, 4, "key", True)
    with torch.no_grad():
        want = model(**call)
    _, *recorded = run(cold, graph.calls[0], plan_for(cold, 14, [], Rows(())))
    tables = {slot: value[:, 7:11] for slot, value in zip(cold.recorded, recorded, strict=True)}
    got = run(warm, graph.calls[0], plan_for(warm, 14, [span], Rows(((), ()))), tables)[0]
    close(got, want)  # its own donor at its own position: exact


@pytest.mark.parametrize("make", [cold_program, warm_program])
def test_cold_and_warm_program_refuse_graph(make: object) -> None:
    captured, _, _ = small(learned_positions=True)
    before = str(captured.graph_module.graph)
    with pytest.raises(UnsupportedGraphError) as refusal:
        make(captured)  # type: ignore[operator]
    assert refusal.value.reason is Reason.POSITION_IN_STREAM
    assert str(captured.graph_module.graph) == before

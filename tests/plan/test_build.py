"""Plans against their definition, for any spans, policy and outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.plan import Plan, Span, SpanContext, build_plan, token_layer_allowance
from vlcache_fx.policies.full import Full
from vlcache_fx.policies.none import NoRows
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.uniform import Uniform


@dataclass(frozen=True)
class Given:
    """A policy that returns the test's rows for every span."""

    rows: Sequence[Tensor]
    ignores_budget: bool = False

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return self.rows


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def span(start: int, length: int, hit: bool = True, sample: int = 0) -> Span:
    return Span(sample, start, length, f"key{start}", hit)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Any layout of spans and any rows: sorted or not, nested or not, inside the span or not."""
    position, spans = 0, []
    for _ in range(draw(st.integers(0, 3))):
        position += draw(st.integers(0, 4))
        spans.append(span(position, draw(st.integers(1, 9)), draw(st.booleans())))
        position = spans[-1].end
    num_tokens = max(1, position + draw(st.integers(0, 4)))
    layers = draw(st.integers(1, 5))
    rows = [ids(*draw(st.lists(st.integers(-1, 9), max_size=8))) for _ in range(layers)]
    if draw(st.booleans()):
        rows = [rows[0]] * layers
    outputs = draw(st.none() | st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=4))
    return {
        "num_tokens": num_tokens,
        "spans": spans,
        "num_layers": layers,
        "policy": Given(rows, draw(st.booleans())),
        "budget": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "output_rows": None if outputs is None else ids(*outputs),
    }


@given(requests())
def test_rows_are_sorted_and_nested(request: dict[str, Any]) -> None:
    plan = build_plan(**request)
    layers, tokens = request["num_layers"], request["num_tokens"]
    assert (len(plan.rows), len(plan.source), len(plan.keep)) == (layers + 1, layers + 1, layers)
    for before, keep, after in zip(plan.rows[:-1], plan.keep, plan.rows[1:], strict=True):
        assert torch.equal(before[keep], after)
    for rows in plan.rows:
        assert rows.dtype == torch.int64
        assert torch.equal(rows, torch.unique(rows))
        assert len(rows) >= min(2, tokens)
        assert 0 <= rows[0] <= rows[-1] < tokens
    assert plan.rows_per_layer == tuple(len(rows) for rows in plan.rows)


@given(requests())
def test_source_covers_every_token(request: dict[str, Any]) -> None:
    plan = build_plan(**request)
    hits = [s for s in request["spans"] if s.hit]
    hit_tokens = [token for s in hits for token in range(s.start, s.end)]
    donors = torch.tensor([1000 + token for token in hit_tokens], dtype=torch.int64)
    for layer, (rows, source) in enumerate(zip(plan.rows, plan.source, strict=True)):
        assert source.shape == (request["num_tokens"],)
        computed = set(rows.tolist())
        for token, value in enumerate(source.tolist()):
            if token in computed:
                assert rows[-(value + 1)] == token
            elif token in hit_tokens:
                assert donors[value] == 1000 + token
            else:
                # Computed everywhere but after the last layer.
                assert layer == request["num_layers"]
                assert value == 0


@given(requests())
def test_required_rows_are_computed(request: dict[str, Any]) -> None:
    plan = build_plan(**request)
    outputs = request["output_rows"]
    reused = {token for s in request["spans"] if s.hit for token in range(s.start, s.end)}
    always = set(range(request["num_tokens"])) - reused
    if outputs is not None:
        always |= set(outputs.tolist())
        assert set(outputs.tolist()) <= set(plan.rows[-1].tolist())
        assert len(plan.rows[-1]) <= max(2, len(set(outputs.tolist())))
    else:
        assert plan.rows[-1] is plan.rows[-2]
    for rows in plan.rows[:-1]:
        assert always <= set(rows.tolist())


@given(requests())
def test_token_layer_fraction_of_hit_spans(request: dict[str, Any]) -> None:
    plan = build_plan(**request)
    hits = [s for s in request["spans"] if s.hit]
    total = sum(s.length for s in hits) * request["num_layers"]
    computed = sum(int(((rows >= s.start) & (rows < s.end)).sum()) for rows in plan.rows[:-1] for s in hits)
    assert plan.token_layer_fraction == pytest.approx(computed / total if total else 0.0)
    if request["output_rows"] is None and not request["policy"].ignores_budget and not plan.explanations:
        allowed = sum(token_layer_allowance(request["budget"], s.length, request["num_layers"]) for s in hits)
        assert computed <= allowed


@given(requests())
def test_strict_rejects_every_repair(request: dict[str, Any]) -> None:
    repairs = [note for note in build_plan(**request).explanations if note.startswith("span")]
    if repairs:
        with pytest.raises(PlanError, match="strict mode"):
            build_plan(**request, strict=True)
    else:
        assert build_plan(**request, strict=True).explanations == build_plan(**request).explanations


def one_span(rows: Sequence[Tensor], budget: float = 1.0, **more: Any) -> Plan:
    return build_plan(
        num_tokens=12, spans=[span(2, 8)], num_layers=len(rows), policy=Given(rows), budget=budget, **more
    )


def test_equal_layers_share_tensors() -> None:
    plan = one_span([ids(0, 1), ids(0, 1), ids(0), ids(0)])
    assert plan.rows[0] is plan.rows[1]
    assert plan.source[0] is plan.source[1]
    assert plan.rows[2] is plan.rows[3] is plan.rows[4]
    assert plan.keep[2] is plan.keep[3]
    assert plan.rows[1] is not plan.rows[2]
    assert plan.explanations == ()


def test_repair_drops_rows_skipped_in_an_earlier_layer() -> None:
    plan = one_span([ids(0, 1), ids(0), ids(0, 1), ids(0, 1)])
    assert [rows.tolist() for rows in plan.rows] == [[0, 1, 2, 3, 10, 11]] + [[0, 1, 2, 10, 11]] * 4
    assert plan.explanations == (
        "span [2, 10): dropped rows that were not computed in the layer before (2 layers, the first is 2); "
        "row sets must shrink with depth",
    )


def test_repair_drops_rows_outside_the_span() -> None:
    plan = one_span([ids(-1, 0, 8)])
    assert plan.rows[0].tolist() == [0, 1, 2, 10, 11]
    assert plan.explanations == ("span [2, 10): dropped rows outside the span (layer 0)",)


def test_repair_drops_the_latest_rows_over_budget() -> None:
    plan = one_span([torch.arange(8)] * 4, budget=0.3)  # floor(0.3 * 8 * 4) = 9 token-layers: two rows
    assert [rows.tolist() for rows in plan.rows] == [[0, 1, 2, 3, 10, 11]] * 5
    assert plan.token_layer_fraction == 2 / 8
    assert (
        "asked for 32 token-layers, the budget allows 9; dropped the latest rows, 8 are left"
        in (plan.explanations[0])
    )


def test_budget_zero_and_smaller_than_a_row() -> None:
    assert one_span([ids(0, 1)] * 3, budget=0.0).token_layer_fraction == 0.0
    assert one_span([ids(0, 1)] * 3, budget=0.001).token_layer_fraction == 1 / 8


def test_full_policy_ignores_the_budget() -> None:
    plan = build_plan(num_tokens=9, spans=[span(0, 8)], num_layers=3, policy=Full(), budget=0.01)
    assert plan.token_layer_fraction == 1.0
    assert plan.explanations == ()
    assert all(rows is plan.rows[0] for rows in plan.rows)


def test_single_output_row_gets_an_active_neighbour() -> None:
    spans = [span(1, 6)]
    common: dict[str, Any] = {"num_tokens": 9, "spans": spans, "num_layers": 2, "budget": 0.2}
    last = build_plan(policy=Uniform(), output_rows=ids(8), **common)
    assert last.rows[-1].tolist() == [7, 8]
    inside = build_plan(policy=Uniform(), output_rows=ids(5), **common)
    assert inside.rows[-1].tolist() == [1, 5]
    assert inside.token_layer_fraction == 2 / 6  # the policy's row and the row that the output needs
    first = build_plan(policy=Uniform(), output_rows=ids(0), **common)
    assert first.rows[-1].tolist() == [0, 1]


def test_at_least_two_rows() -> None:
    common: dict[str, Any] = {"spans": [span(0, 5)], "num_layers": 2, "policy": NoRows(), "budget": 0.0}
    plan = build_plan(num_tokens=5, **common)
    assert [rows.tolist() for rows in plan.rows] == [[3, 4]] * 3
    assert plan.explanations == ("rows [3, 4] are computed as well: every layer needs at least two",)
    assert build_plan(num_tokens=5, output_rows=ids(0), **common).rows[-1].tolist() == [0, 1]
    assert build_plan(num_tokens=5, output_rows=ids(4), **common).rows[-1].tolist() == [3, 4]


def test_prompt_of_one_token() -> None:
    plan = build_plan(num_tokens=1, spans=[span(0, 1)], num_layers=2, policy=NoRows(), budget=0.0)
    assert [rows.tolist() for rows in plan.rows] == [[0]] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": [span(8, 5)]}, "not inside"),
        ({"spans": [span(-1, 5)]}, "not inside"),
        ({"spans": [span(3, 0)]}, "not inside"),
        ({"spans": [span(0, 5), span(4, 2)]}, "overlaps"),
        ({"spans": [span(6, 2), span(0, 2)]}, "not sorted"),
        ({"spans": [span(0, 2), span(6, 2, sample=1)]}, "one sample"),
        ({"num_tokens": 0, "spans": []}, "tokens and layers"),
        ({"num_layers": 0}, "tokens and layers"),
        ({"budget": 1.5}, "not a share"),
        ({"budget": float("nan")}, "not a share"),
        ({"output_rows": ids()}, "empty"),
        ({"output_rows": ids(12)}, "inside"),
        ({"output_rows": ids(-1)}, "inside"),
        ({"output_rows": ids(1).unsqueeze(0)}, "one-dimensional"),
        ({"output_rows": torch.tensor([True])}, "integer"),
        ({"policy": Given([ids(0)])}, "chose rows for 1 layers; the model has 2"),
        ({"policy": Given([torch.tensor([0.0])] * 2)}, "tensor of integers"),
        ({"policy": Given([ids(0).unsqueeze(0)] * 2)}, "one-dimensional"),
    ],
)
def test_build_plan_rejects_invalid_requests(change: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {
        "num_tokens": 12,
        "spans": [span(0, 4)],
        "num_layers": 2,
        "policy": Uniform(),
        "budget": 0.5,
    }
    with pytest.raises(PlanError, match=message):
        build_plan(**request | change)


# One sample of several -------------------------------------------------------------------------------------


@given(requests(), st.integers(0, 50))
def test_first_donor_shifts_the_source(request: dict[str, Any], first: int) -> None:
    """Only the donor rows in ``source`` shift."""
    alone, shifted = build_plan(**request), build_plan(**request, first_donor=first)
    for name in ("rows", "keep"):
        for a, b in zip(getattr(alone, name), getattr(shifted, name), strict=True):
            assert torch.equal(a, b)
    hits = torch.zeros(request["num_tokens"], dtype=torch.bool)
    for one in request["spans"]:
        hits[one.start : one.end] |= one.hit
    for a, b in zip(alone.source, shifted.source, strict=True):
        assert torch.equal(torch.where(hits & (a >= 0), a + first, a), b)


def test_prefix_precedes_span_donors() -> None:
    plan = build_plan(
        num_tokens=9,
        spans=[span(1, 2), span(5, 2)],
        num_layers=1,
        policy=NoRows(),
        budget=0.0,
        prefix=4,
        first_donor=10,
    )
    assert plan.source[0].tolist() == [10, 11, 12, 13, -1, 14, 15, -2, -3]


def with_padding(request: dict[str, Any], positions: set[int]) -> tuple[torch.Tensor, Plan, Plan]:
    """Return padding positions, the plan with them, and the plan without them."""
    padding = ids(*sorted(position for position in positions if position < request["num_tokens"]))
    return padding, build_plan(**request, padding=padding), build_plan(**request)


@given(requests().filter(lambda request: request["policy"].ignores_budget), st.sets(st.integers(0, 50)))
def test_padding_is_computed_without_a_budget(request: dict[str, Any], positions: set[int]) -> None:
    _, plan, usual = with_padding(request, positions)
    assert all(torch.equal(a, b) for a, b in zip(plan.rows, usual.rows, strict=True))


@given(requests().filter(lambda request: not request["policy"].ignores_budget), st.sets(st.integers(0, 50)))
def test_padding_is_not_computed(request: dict[str, Any], positions: set[int]) -> None:
    tokens = request["num_tokens"]
    padding, plan, usual = with_padding(request, positions)
    outputs = request["output_rows"]
    needed = set() if outputs is None else set(outputs.tolist())
    for s in request["spans"]:  # donors of missed spans are recorded
        needed |= set(range(s.start, s.end))
    left_out = set(padding.tolist()) - needed
    added = any("at least two" in note for note in plan.explanations)
    for rows, source, all_rows in zip(plan.rows[:-1], plan.source, usual.rows, strict=False):
        if not added:
            assert set(rows.tolist()) == set(all_rows.tolist()) - left_out
        # Padding reads the first donor row, unless it is one of the two required rows.
        assert all(source[position] == 0 for position in left_out - set(rows.tolist()))
        assert len(rows) >= min(2, tokens)


def test_padding_in_a_missed_span_is_computed() -> None:
    plan = build_plan(
        num_tokens=8,
        spans=[span(1, 2), span(4, 3, hit=False)],
        num_layers=1,
        policy=NoRows(),
        budget=0.0,
        padding=ids(0, 2, 4, 5),
    )
    assert plan.rows[0].tolist() == [3, 4, 5, 6, 7]


def test_padding_is_computed_for_outputs() -> None:
    common: dict[str, Any] = {"num_tokens": 8, "spans": [span(3, 3)], "num_layers": 2, "policy": NoRows()}
    plan = build_plan(budget=0.0, padding=ids(0, 1), **common)
    assert [rows.tolist() for rows in plan.rows] == [[2, 6, 7]] * 3
    plan = build_plan(budget=0.0, padding=ids(0, 1), output_rows=ids(1, 7), **common)
    assert [rows.tolist() for rows in plan.rows] == [[1, 2, 6, 7], [1, 2, 6, 7], [1, 7]]
    full = build_plan(budget=0.0, padding=ids(0, 1), **common | {"policy": Full()})
    assert [rows.tolist() for rows in full.rows] == [list(range(8))] * 3


# The facts that a policy gets ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noting(Given):
    """Notes what it is asked."""

    asked: list[SpanContext] = field(default_factory=list)

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        self.asked.append(span)
        return self.rows


def contexts(**request: Any) -> list[SpanContext]:
    policy = Noting([ids(0)] * 2)
    build_plan(num_layers=2, policy=policy, budget=0.5, **request)
    return policy.asked


def test_build_plan_context_of_each_hit() -> None:
    asked = contexts(num_tokens=16, spans=[span(3, 4), span(9, 4, hit=False), span(14, 2)])
    common: dict[str, Any] = {"num_layers": 2, "budget": 0.5, "num_tokens": 16}
    assert asked == [
        SpanContext(length=4, start=3, text_before=3, text_after=3, **common),
        SpanContext(length=2, start=14, text_before=6, text_after=0, **common),
    ]


def test_build_plan_context_without_padding() -> None:
    (asked,) = contexts(num_tokens=10, spans=[span(4, 3)], padding=ids(0, 1, 9))
    assert (asked.start, asked.num_tokens, asked.text_before, asked.text_after) == (4, 10, 2, 2)


def test_build_plan_context_passes_the_profile() -> None:
    profile = Profile("model", "float32", (1.0, 2.0))
    (asked,) = contexts(num_tokens=10, spans=[span(4, 3)], profile=profile)
    assert asked.profile is profile


def test_build_plan_context_passes_the_grid() -> None:
    hit = replace(span(2, 6), grid=(1, 2, 3))
    asked = contexts(num_tokens=12, spans=[hit, span(9, 2)])
    assert [one.grid for one in asked] == [(1, 2, 3), None]


def test_span_context_alone() -> None:
    alone = SpanContext(length=4, num_layers=2, budget=0.5)
    assert (alone.start, alone.num_tokens, alone.text_before, alone.text_after) == (0, 4, 0, 0)
    assert alone == SpanContext(length=4, num_layers=2, budget=0.5, num_tokens=4)


@given(requests())
def test_build_plan_context_counts(request: dict[str, Any]) -> None:
    policy = Noting(request["policy"].rows)
    build_plan(**request | {"policy": policy})
    text = request["num_tokens"] - sum(s.length for s in request["spans"])
    hits = [s for s in request["spans"] if s.hit]
    for asked, hit in zip(policy.asked, hits, strict=True):
        assert (asked.start, asked.length) == (hit.start, hit.length)
        assert asked.text_before + asked.text_after == text
        assert asked.text_before <= asked.start
        assert asked.text_after <= asked.num_tokens - hit.end

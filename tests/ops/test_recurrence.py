"""``vlcache.recur`` against its definition, and properties of its jumps and records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.recurrences import KINDS, error, errors, inputs, recur, sliced, table
from vlcache_fx.errors import PlanError
from vlcache_fx.ops import recur_reference

ROUNDING = 5e-6
"""Limit of relative errors in float32; about 3e-7 is seen."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 64, 65, 300])
def test_recur_equals_definition(rows: int, kind: str) -> None:
    tensors = inputs(rows, kind=kind, batch=2)
    assert max(errors(recur(**tensors), recur_reference(**tensors))) < ROUNDING
    del tensors["state"]
    options = {"l2norm": True, "scale": 0.3}
    assert max(errors(recur(**tensors, **options), recur_reference(**tensors, **options))) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.01, 0.2, 5.0])
def test_recur_in_float64(kind: str, strength: float) -> None:
    tensors = inputs(150, kind=kind, strength=strength, dtype=torch.float64)
    records = {"start": table([10, 0, 60]), "end": table([140, 3, 60])}
    got, want = recur(**tensors, **records), recur_reference(**tensors, **records)
    assert got[1].dtype == got[3].dtype == torch.float64
    assert max(errors(got, want)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recur_computes_in_float32(dtype: torch.dtype) -> None:
    tensors = inputs(70, dtype=dtype)
    got, want = recur(**tensors), recur_reference(**{name: x.float() for name, x in tensors.items()})
    assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
    assert error(got[1], want[1]) < ROUNDING
    assert error(got[0], want[0]) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "high"), [(-50.0, -50.0), (-50.0, 0.0), (-3.0, -2.0)])
def test_recur_with_strong_decay(kind: str, low: float, high: float) -> None:
    """No decay overflows; those between strong ones keep their digits, and maps vanish without denormals."""
    tensors = inputs(130, kind=kind)
    tensors["g"] = torch.empty_like(tensors["g"]).uniform_(
        low, high, generator=torch.Generator().manual_seed(3)
    )
    records = {"start": table([0, 3]), "end": table([130, 5])}
    got, want = recur(**tensors, **records), recur_reference(**tensors, **records)
    for pair in zip(got, want, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=2e-6)
    assert not got[3][:, 0].any()


def test_recur_with_keys_that_repeat() -> None:
    """Equal keys and beta 1 make the triangular system as bad as it can be."""
    tensors = inputs(100)
    tensors["k"] = tensors["k"][:, :1].expand_as(tensors["k"])
    tensors["beta"], tensors["g"] = torch.ones_like(tensors["beta"]), torch.zeros_like(tensors["g"])
    assert max(errors(recur(**tensors), recur_reference(**tensors))) < ROUNDING
    tensors["beta"] = tensors["beta"] * 2  # reflections, as with negative eigenvalues
    assert max(errors(recur(**tensors), recur_reference(**tensors))) < ROUNDING


# Jumps and records -----------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.integers(1, 70), min_size=3, max_size=3), kind=st.sampled_from(KINDS),
    strength=st.sampled_from([0.01, 0.2]), seed=st.integers(0, 9),
)  # fmt: skip
def test_jump_over_recorded_rows(rows: list[int], kind: str, strength: float, seed: int) -> None:
    """A jump with the map of some rows does what the rows do, also from another state."""
    low, high, total = rows[0], rows[0] + rows[1], sum(rows)
    tensors = inputs(total, kind=kind, strength=strength, seed=seed)
    recorded = recur(**tensors, start=table([low]), end=table([high]))
    state = 10 * tensors.pop("state").flip(1)
    want = recur(**tensors, state=state)
    kept = {name: torch.cat([x[:, :low], x[:, high:]], 1) for name, x in tensors.items()}
    jump: dict[str, Tensor] = {"jump_at": table([low]), "jump_map": table([0])}
    jump |= {"map_a": recorded[3][0], "map_b": recorded[4][0]}
    got = recur(**kept, state=state, **jump)
    assert error(got[0][:, :low], want[0][:, :low]) < ROUNDING
    assert error(got[0][:, low:], want[0][:, high:]) < ROUNDING
    assert error(got[1], want[1]) < ROUNDING


@given(
    total=st.integers(1, 90), kind=st.sampled_from(KINDS), seed=st.integers(0, 9), data=st.data(),
)  # fmt: skip
def test_records_equal_those_of_their_rows_alone(
    total: int, kind: str, seed: int, data: st.DataObject
) -> None:
    """Records may overlap. States are those after the prefix, and B those after the rows from no state."""
    pair = st.tuples(st.integers(0, total), st.integers(0, total)).map(sorted)
    pairs = data.draw(st.lists(pair, min_size=1, max_size=4))
    tensors = inputs(total, kind=kind, seed=seed)
    starts, ends = (table(list(points)) for points in zip(*pairs, strict=True))
    out, final, states, maps_a, maps_b = recur(**tensors, start=starts, end=ends)
    plain = recur(**tensors)
    assert max(error(out, plain[0]), error(final, plain[1])) < ROUNDING
    for j, (start, end) in enumerate(pairs):
        if end > 0:
            prefix = recur(**sliced(tensors, 0, end), state=tensors["state"])
            assert error(states[:, j], prefix[1]) < ROUNDING
        else:
            assert torch.equal(states[:, j], tensors["state"])
        if start == end:
            assert torch.equal(maps_a[0, j], torch.eye(8).expand(4, 8, 8))
            assert not maps_b[:, j].any()
        else:
            alone = recur(**sliced(tensors, start, end))
            assert error(maps_b[:, j], alone[1]) < ROUNDING
            before = (
                recur(**sliced(tensors, 0, start), state=tensors["state"])[1] if start else tensors["state"]
            )
            applied = maps_a[:, j] @ before + maps_b[:, j]
            assert error(applied, states[:, j]) < ROUNDING


@pytest.mark.parametrize("kind", ["delta", "kda"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_records_with_a_state_of_any_size(kind: str, scale: float) -> None:
    """B keeps its digits, however large the state is in which the rows were computed."""
    tensors = inputs(120, kind=kind, strength=0.002)
    tensors["state"] *= scale
    records = {"start": table([20, 20]), "end": table([24, 120])}
    got, want = recur(**tensors, **records), recur(**tensors | {"state": None}, **records)
    assert error(got[3], want[3]) == error(got[4], want[4]) == 0
    assert got[3].abs().max() > 0.5


def test_records_of_heads_that_forget() -> None:
    """Maps of heads with strong decay vanish early, others go on; results are those of each head alone."""
    tensors = inputs(700, heads=6, groups=3, strength=0.0001)
    tensors["beta"] *= 0.02
    tensors["g"][:, :, 2:4] *= 5000  # the second group
    tensors["g"][:, :, 4] *= 5000  # half of the third
    records = {"start": table([3]), "end": table([690])}
    got, want = recur(**tensors, **records), recur_reference(**tensors, **records)
    assert max(errors(got, want)) < ROUNDING
    sizes = got[3][0, 0].abs().amax((-1, -2))
    assert not sizes[2:5].any()
    assert (sizes[[0, 1, 5]] > 1e-3).all()


@given(seed=st.integers(0, 9), kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=25)
def test_jumps_and_records_of_samples(seed: int, kind: str, data: st.DataObject) -> None:
    """Samples with jumps, records and padding of their own equal the definition."""
    total, samples = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 2))
    row = st.integers(0, total)
    jumps, records = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))

    def rows_of(count: int, value: Any) -> Tensor:
        drawn = data.draw(
            st.lists(st.lists(value, min_size=count, max_size=count), min_size=samples, max_size=samples)
        )
        return torch.tensor(drawn, dtype=torch.int64).view(samples, count)

    tensors = inputs(total, batch=samples, kind=kind, seed=seed)
    at, ends = rows_of(jumps, row).sort(-1).values, rows_of(records, row)
    # A record begins where the last jump before its end was made.
    starts = torch.where(at[:, None] < ends[..., None], at[:, None], 0).amax(-1) if jumps else ends // 2
    generator = torch.Generator().manual_seed(seed)
    arguments = {
        "jump_at": at,
        "jump_map": rows_of(jumps, st.integers(-1, 1)),
        "map_a": torch.randn(2, 4, 8, 8, generator=generator) / 3,
        "map_b": torch.randn(2, 4, 8, 6, generator=generator),
        "start": starts,
        "end": ends,
        "num_rows": rows_of(1, row).flatten(),
    }
    got, want = recur(**tensors, **arguments), recur_reference(**tensors, **arguments)
    assert max(errors(got, want)) < ROUNDING


@given(total=st.integers(1, 90), rows=st.integers(0, 90), kind=st.sampled_from(KINDS))
def test_padding_leaves_the_state(total: int, rows: int, kind: str) -> None:
    tensors = inputs(total, kind=kind)
    rows = min(rows, total)
    out, final, *_ = recur(**tensors, num_rows=torch.tensor([rows]))
    assert not out[:, rows:].any()
    if rows == 0:
        assert torch.equal(final, tensors["state"])
    else:
        want = recur(**sliced(tensors, 0, rows), state=tensors["state"])
        assert max(error(out[:, :rows], want[0]), error(final, want[1])) < ROUNDING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": table([3]), "end": table([11])}, "records of rows 3 to 11, of 10 rows"),
        ({"start": table([3]), "end": table([2])}, "records of rows 3 to 2"),
        ({"start": table([3])}, "end missing: start, end are given all or none"),
        ({"num_rows": torch.tensor([11])}, "num_rows is 11; valid: 0 to 10"),
        ({"jump_at": table([5]), "jump_map": table([0])}, "map_a, map_b missing"),
        ({"jump_at": table([5, 4]), "jump_map": table([0, 0])}, "before row 4; valid: 5 to 10"),
        ({"jump_at": table([11]), "jump_map": table([0])}, "before row 11; valid: 0 to 10"),
        (
            {"jump_at": table([5]), "jump_map": table([0]), "start": table([4]), "end": table([6])},
            "before row 5, inside the recorded rows 4 to 6",
        ),
    ],
)
def test_recur_refuses_bad_rows(arguments: dict[str, Tensor], message: str) -> None:
    tensors = inputs(10)
    if "jump_at" in arguments and "missing" not in message:
        arguments = arguments | {"map_a": torch.zeros(1, 4, 8, 8), "map_b": torch.zeros(1, 4, 8, 6)}
    for function in (recur, recur_reference):
        with pytest.raises(PlanError, match=message):
            function(**tensors, **arguments)


def test_jumps_that_pad_a_batch_may_lie_anywhere() -> None:
    tensors = inputs(10)
    maps = {"map_a": torch.zeros(1, 4, 8, 8), "map_b": torch.zeros(1, 4, 8, 6)}
    got = recur(**tensors, **maps, jump_at=table([99, -1]), jump_map=table([-1, -1]))
    assert max(errors(got, recur(**tensors))) == 0

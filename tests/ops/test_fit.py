"""``fit_rows``: donor rows and the best combination of their contexts' differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.ops import fit as module
from vlcache_fx.ops import fit_rows_reference, splice_rows_reference
from vlcache_fx.spec.differences import BLOCK_ROWS, RIDGE

vlcache: Any = torch.ops.vlcache
WIDTH = (2, 3)
"""Sizes of a row."""


@dataclass(frozen=True)
class Case:
    """A prompt of text, donors without and with differences, and text; matrices of rows ``[rows, 2, 3]``."""

    lengths: tuple[int, ...]
    is_fitted: tuple[bool, ...]
    donor: Tensor
    fresh: Tensor
    source: Tensor
    rows: Tensor
    donor_row: Tensor
    left_row: Tensor
    left: Tensor
    core: Tensor
    right: Tensor
    left_donor: Tensor

    def operands(self) -> tuple[Tensor, ...]:
        return (
            self.donor, self.fresh, self.source, self.rows, self.donor_row, self.left_row,
            self.left, self.core, self.right, self.left_donor,
        )  # fmt: skip

    def starts(self) -> list[int]:
        return [2 + sum(self.lengths[:index]) for index in range(len(self.lengths))]


def make_case(
    lengths: tuple[int, ...],
    is_fitted: tuple[bool, ...],
    known: int,
    seed: int = 0,
    contexts: int = 3,
    rank: int = 2,
) -> Case:
    """The first ``known`` rows of each donor are recomputed, and two tokens of text at each end."""
    generator, contexts, rank = torch.Generator().manual_seed(seed), 3, 2

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    tokens, held = 4 + sum(lengths), sum(lengths)
    width = WIDTH[0] * WIDTH[1]
    donor_row, left_row = (torch.full((tokens,), -1) for _ in range(2))
    computed = torch.zeros(tokens, dtype=torch.bool)
    computed[:2] = computed[-2:] = True
    start, blocks, left_donor = 2, 0, []
    for length, fits in zip(lengths, is_fitted, strict=True):
        computed[start : start + min(known, length)] = True
        donor_row[start : start + length] = torch.arange(start - 2, start - 2 + length)
        if fits:
            left_row[start : start + length] = torch.arange(length) + blocks * BLOCK_ROWS
            own = -(-length // BLOCK_ROWS)
            left_donor += [len(set(left_donor))] * own
            blocks += own
        start += length
    rows = computed.nonzero().flatten()
    source = donor_row.clone()
    source[rows] = torch.arange(-1, -len(rows) - 1, -1)
    count = max(1, sum(is_fitted))
    right = torch.linalg.qr(random(count, width, rank))[0].transpose(1, 2)
    return Case(
        lengths, is_fitted, random(held, *WIDTH), random(len(rows), *WIDTH), source, rows, donor_row,
        left_row, random(max(1, blocks), BLOCK_ROWS, rank), random(count, contexts, rank, rank), right,
        torch.tensor(left_donor or [0]),
    )  # fmt: skip


def expected(case: Case) -> Tensor:
    """The definition, donor by donor."""
    found = splice_rows_reference(case.donor, case.fresh, case.source, 0)
    fitted = 0
    for start, length, fits in zip(case.starts(), case.lengths, case.is_fitted, strict=True):
        if not fits:
            continue
        at = slice(start, start + length)
        left = case.left.flatten(0, 1)[case.left_row[at]]
        differences = torch.einsum("nr,crs,sw->cnw", left, case.core[fitted], case.right[fitted])
        fitted += 1
        is_known = case.source[at] < 0
        means = case.donor[start - 2 : start - 2 + length]
        if is_known.any():
            missing = (case.fresh[-case.source[at][is_known] - 1] - means[is_known]).flatten()
            known = differences[:, is_known].flatten(1)
            gram = known @ known.t()
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
            weights = torch.linalg.solve(gram + ridge, known @ missing)
        else:
            weights = torch.zeros(len(differences), dtype=torch.float64)
        combined = means + torch.tensordot(weights, differences, 1).view(length, *WIDTH)
        found[at] = torch.where(is_known.view(-1, 1, 1), found[at], combined)
    return found


@given(
    st.lists(st.tuples(st.integers(1, 2 * BLOCK_ROWS + 3), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_equals_definition(donors: list[tuple[int, bool]], known: int, seed: int) -> None:
    lengths, is_fitted = zip(*donors, strict=True)
    case = make_case(lengths, is_fitted, known, seed)
    want = expected(case)
    torch.testing.assert_close(fit_rows_reference(*case.operands(), 0), want)
    torch.testing.assert_close(vlcache.fit_rows(*case.operands(), 0), want)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_in_any_dimension(dim: int) -> None:
    case = make_case((5, 200), (True, True), 3)
    moved = replace(case, donor=case.donor.movedim(0, dim), fresh=case.fresh.movedim(0, dim))
    torch.testing.assert_close(vlcache.fit_rows(*moved.operands(), dim), expected(case).movedim(0, dim))


@pytest.mark.parametrize(("batch_dim", "dim"), [(0, 1), (0, 2), (1, 0)])
def test_samples_are_independent(batch_dim: int, dim: int) -> None:
    """The second sample has the first one's donors, other rows, and fewer of them."""
    first = make_case((5, 200), (True, True), 3)
    second = make_case((5, 200), (True, True), 2)
    same = ("donor", "left", "core", "right", "left_donor")
    second = replace(second, **{name: getattr(first, name) for name in same})
    missing = len(first.rows) - len(second.rows)
    rows = torch.stack([first.rows, torch.cat([second.rows, second.rows[-1:].expand(missing)])])
    padded = torch.cat([second.fresh, second.fresh[-1:].expand(missing, *WIDTH)])
    fresh = torch.stack([first.fresh, padded]).movedim((0, 1), (batch_dim, dim))
    # As the runtime does: each use of a donor has rows, blocks and weights of its own.
    donor = torch.cat([first.donor, first.donor])
    blocks, held = first.left.flatten(0, 1).shape[0], len(first.donor)
    operands = (
        donor.unsqueeze(1).movedim((0, 1), (dim, batch_dim)),
        fresh,
        torch.stack([first.source, torch.where(second.source >= 0, second.source + held, second.source)]),
        rows,
        torch.stack([first.donor_row, torch.where(second.donor_row >= 0, second.donor_row + held, -1)]),
        torch.stack([first.left_row, torch.where(second.left_row >= 0, second.left_row + blocks, -1)]),
        *(torch.cat([one, one]) for one in (first.left, first.core, first.right)),
        torch.cat([first.left_donor, first.left_donor + len(first.core)]),
    )
    want = torch.stack([expected(first), expected(second)]).movedim((0, 1), (batch_dim, dim))
    torch.testing.assert_close(vlcache.fit_rows(*operands, dim, batch_dim), want)
    torch.testing.assert_close(fit_rows_reference(*operands, dim, batch_dim), want)


def test_a_context_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are a combination of the contexts are met by fitting few of them."""
    monkeypatch.setattr(module, "RIDGE", 0.01)
    case = make_case((300,), (True,), 8)
    left = case.left.flatten(0, 1)[:300]
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    effect = torch.einsum("c,crs,sw->rw", weights, case.core[0], case.right[0])
    exact = case.donor + (left @ effect).view(300, *WIDTH)
    fresh = case.fresh.clone()
    fresh[2:10] = exact[:8]
    found = vlcache.fit_rows(*replace(case, fresh=fresh).operands(), 0)[2:302]
    before = (case.donor - exact).square().mean()
    assert (found - exact).square().mean() < 0.02 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_fitted_in_float32(dtype: torch.dtype) -> None:
    case = make_case((300,), (True,), 8)
    narrow = [one.to(dtype) if one.is_floating_point() else one for one in case.operands()]
    found = vlcache.fit_rows(*narrow, 0)
    assert found.dtype is dtype
    wide = [one.double() if one.is_floating_point() else one for one in narrow]
    torch.testing.assert_close(found.double(), vlcache.fit_rows(*wide, 0), rtol=0.05, atol=0.05)


def test_opcheck() -> None:
    case = make_case((5, 200), (True, True), 3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(vlcache.fit_rows.default, (*case.operands(), 0), test_utils=checks)

"""``fit_donors``: programs fit donors of several contexts to the rows that they recompute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import PassError
from vlcache_fx.ops import fit
from vlcache_fx.passes import Pipeline, Program
from vlcache_fx.passes.rewrite import FitDonors, UnpackDonors
from vlcache_fx.passes.standard import WARM, fitted_program, warm_program
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.programs.bind import bind
from vlcache_fx.spec.differences import BLOCK_ROWS
from vlcache_fx.spec.slots import (
    Difference,
    Donor,
    DonorRow,
    InputSlot,
    Key,
    LeftDonor,
    LeftRow,
    StoredSlot,
    Value,
)

from .. import hybrids
from ..programs import (
    LENGTH,
    START,
    STARTS,
    TOKENS,
    PassCase,
    Rows,
    own_donors,
    plan_for,
    plan_for_both,
    prepared,
    small,
    two_samples,
    unchanged,
)

CASE = PassCase(FitDonors(), WARM.passes)
CONTEXTS, RANK = 3, 2


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("fit_donors", CASE.change(small(rope="none")[0]))


def test_graph_of_two_samples(golden: Callable[[str, str], None]) -> None:
    golden("fit_donors_two_samples", CASE.change(two_samples(rope="none")[0]))


def differences(program: Program, is_batched: bool, weight: float) -> dict[InputSlot, Tensor]:
    """The inputs that fit the donors of all samples; ``weight`` scales the differences."""
    starts = STARTS if is_batched else (START,)
    generator = torch.Generator().manual_seed(0)
    donor_row, left_row = (torch.full((len(starts), TOKENS), -1) for _ in range(2))
    for sample, start in enumerate(starts):
        donor_row[sample, start : start + LENGTH] = torch.arange(LENGTH) + sample * LENGTH
        left_row[sample, start : start + LENGTH] = torch.arange(LENGTH) + sample * BLOCK_ROWS
    found: dict[InputSlot, Tensor] = {
        DonorRow(): donor_row if is_batched else donor_row[0],
        LeftRow(): left_row if is_batched else left_row[0],
        LeftDonor(): torch.arange(2) % len(starts),
    }
    for slot, node in program.slots.items():
        if isinstance(slot, Difference):
            width = node.meta["val"].shape[-1]
            sizes = {
                "left": (2, BLOCK_ROWS, RANK),
                "core": (2, CONTEXTS, RANK, RANK),
                "right": (2, RANK, width),
            }
            made = torch.randn(sizes[slot.part], generator=generator)
            if slot.part == "right":
                made = torch.linalg.qr(made.transpose(1, 2))[0].transpose(1, 2)
            found[slot] = made * weight if slot.part == "core" else made
    return found


def shifted(donors: dict[StoredSlot, Tensor], inputs: Mapping[InputSlot, Tensor]) -> dict[StoredSlot, Tensor]:
    """Donors that lack the first context's difference: what a mean lacks in that context."""
    found = dict(donors)
    for slot, rows in donors.items():
        if isinstance(slot, Key | Value):
            left, core, right = (inputs[Difference(slot, part)] for part in Difference.parts)
            own = torch.cat(
                [left[one, :LENGTH] @ core[one, 0] @ right[one] for one in range(len(rows[0]) // LENGTH)]
            )
            found[slot] = rows - own.view(rows.shape)
    return found


def outcome(program: Program, is_batched: bool, donors: Any, inputs: Any, few: Rows) -> Tensor:
    """The first result of the traced graph's own call."""
    captured, graph, _ = (two_samples if is_batched else small)(num_layers=2)
    warm = warm_program(captured)
    hit = Span(0, START, LENGTH, "key", True)
    plan = plan_for_both(warm, few) if is_batched else plan_for(warm, TOKENS, [hit], few)
    positions = warm.decoder.tail_rows.positions(TOKENS)
    values = bind(tuple(program.slots), plan, positions, lambda: {**donors, **inputs})
    with torch.no_grad():
        result: Tensor = program.graph_module(*graph.calls[0], *values)[0]
    return result


@pytest.mark.parametrize("is_batched", [False, True])
def test_fits_the_context_of_the_call(is_batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows lack a difference that is stored: few recomputed rows tell which."""
    monkeypatch.setattr(fit, "RIDGE", 0.01)
    captured, graph, want = (two_samples if is_batched else small)(num_layers=2)
    warm = warm_program(captured)
    program = fitted_program(warm)
    inputs = differences(program, is_batched, 0.3)
    donors = shifted(own_donors(captured, graph.calls[0], STARTS if is_batched else (START,)), inputs)
    few = Rows(((0, 1, 2), (0, 1, 2)))
    fitted = outcome(program, is_batched, donors, inputs, few)
    means = outcome(warm, is_batched, donors, {}, few)
    assert (fitted - want).abs().max() < 0.2 * (means - want).abs().max()


@pytest.mark.parametrize("is_batched", [False, True])
def test_without_differences_rows_are_means(is_batched: bool) -> None:
    captured, graph, _ = (two_samples if is_batched else small)(num_layers=2)
    warm = warm_program(captured)
    program = fitted_program(warm)
    donors = own_donors(captured, graph.calls[0], STARTS if is_batched else (START,))
    inputs, few = differences(program, is_batched, 0.0), Rows(((1, 2), (1,)))
    fitted = outcome(program, is_batched, donors, inputs, few)
    torch.testing.assert_close(fitted, outcome(warm, is_batched, donors, {}, few))


@pytest.mark.parametrize("is_batched", [False, True])
def test_all_rows_recomputed(is_batched: bool) -> None:
    """Donors and differences do not matter then."""
    captured, graph, want = (two_samples if is_batched else small)(num_layers=2)
    program = fitted_program(warm_program(captured))
    inputs = differences(program, is_batched, 1.0)
    donors = shifted(own_donors(captured, graph.calls[0], STARTS if is_batched else (START,)), inputs)
    every = Rows((tuple(range(LENGTH)),) * 2)
    torch.testing.assert_close(
        outcome(program, is_batched, donors, inputs, every), want, atol=1e-5, rtol=1e-5
    )


def test_warm_program_stays() -> None:
    warm = warm_program(small()[0])
    before = str(warm.graph)
    program = fitted_program(warm)
    assert str(warm.graph) == before
    assert program.recorded == warm.recorded
    assert [str(slot) for slot in program.slots if isinstance(slot, Donor)] == ["donor.0.k", "donor.0.v"]
    program.check_complete()


def test_states_of_recurrent_layers_stay() -> None:
    program = fitted_program(warm_program(hybrids.small("da")[0]))
    fitted = {slot.stored for slot in program.slots if isinstance(slot, Difference)}
    assert fitted == {Key(1), Value(1)}
    targets = [str(node.target) for node in program.graph.nodes]
    assert "vlcache.fit_rows.default" in targets
    assert "vlcache.splice_rows.default" in targets  # the inputs of the convolution


def test_keeps_program_without_donors() -> None:
    assert unchanged(FitDonors(), prepared(small()[0], warm=False))


def test_not_after_unpacking() -> None:
    """A packed table has no rows to compare with."""
    program = prepared(small()[0], *WARM.passes, UnpackDonors())
    with pytest.raises(PassError, match=r"'fit_donors': must run before another pipeline \(unpacked\)"):
        Pipeline((FitDonors(),)).run(program)

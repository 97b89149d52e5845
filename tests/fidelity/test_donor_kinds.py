"""Donors of several contexts, for tensors with a known best combination."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.fidelity.donor_kinds import cut, fitted, mean, nearest, patched
from vlcache_fx.runtime.donors.refine import exact_donor
from vlcache_fx.spec.slots import Key, Term, Value
from vlcache_fx.store.entry import Entry
from vlcache_fx.testing.donors import with_differences

LENGTH = 24
KEY, VALUE, STATE = str(Key(0)), str(Value(0)), str(Term(0, 0))


def entry(key: Tensor, value: Tensor, before: str = "new") -> Entry:
    return exact_donor({KEY: key, VALUE: value}, LENGTH, before)


@pytest.fixture(params=[(1, LENGTH, 16), (1, 2, LENGTH, 8)], ids=["tokens", "heads"])
def contexts(request: pytest.FixtureRequest) -> list[Entry]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2, *request.param, generator=generator)
    parts = [shared + 0.3 * torch.randn(2, *request.param, generator=generator) for _ in range(4)]
    return [entry(key, value, f"context {index}") for index, (key, value) in enumerate(parts)]


def blend(entries: list[Entry], name: str, weights: list[float]) -> Tensor:
    return sum((w * one.tensors[name] for w, one in zip(weights, entries, strict=True)), torch.zeros(()))


def rows_of(tensor: Tensor) -> Tensor:
    """Return rows ``[length, width]``, a view if possible."""
    return tensor.movedim(tensor.shape.index(LENGTH), 0).flatten(1)


def off(donor: Entry, exact: Entry, rows: slice = slice(None)) -> float:
    parts = (rows_of(donor.tensors[name] - exact.tensors[name])[rows] for name in exact.tensors)
    return sum(float(part.square().sum()) for part in parts)


def test_fitted_weights_per_slot(contexts: list[Entry]) -> None:
    exact = entry(blend(contexts, KEY, [1.5, -0.5, 0.0, 0.0]), blend(contexts, VALUE, [0.0, 0.1, 0.2, 0.7]))
    donor = fitted(contexts, exact, rows=4, ridge=0.01)
    # Four rows determine the weights. The ridge makes the fit inexact.
    assert off(donor, exact, slice(4, None)) < 0.001 * off(mean(contexts), exact, slice(4, None))
    assert donor.info["contexts"] == [f"context {index}" for index in range(4)]
    assert donor.tensors[KEY].dtype == torch.float32


def test_fitted_uses_only_the_first_rows(contexts: list[Entry]) -> None:
    exact = contexts[1]
    noisy = entry(*(tensor.clone() for tensor in exact.tensors.values()))
    for tensor in noisy.tensors.values():
        tensor.movedim(tensor.shape.index(LENGTH), 0)[3:] = 1e6
    for name, tensor in fitted(contexts, noisy, rows=3, ridge=0.01).tensors.items():
        assert torch.equal(tensor, fitted(contexts, exact, rows=3, ridge=0.01).tensors[name])
    assert off(fitted(contexts, exact, rows=3, ridge=0.01), exact) < 0.01 * off(mean(contexts), exact)


def test_cut_keeps_the_largest_parts() -> None:
    matrix = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    sizes = torch.linalg.svdvals(matrix)
    torch.testing.assert_close((matrix - cut(matrix, 3)).square().sum((1, 2)), sizes[:, 3].square())


def test_differences_beside_the_mean(contexts: list[Entry]) -> None:
    donor, middle = with_differences(contexts, 4), mean(contexts)
    for name, tensor in middle.tensors.items():
        assert torch.equal(donor.tensors[name], tensor)
    assert {name.rpartition(".")[2] for name in donor.tensors if name not in middle.tensors} == {
        "left", "core", "right",
    }  # fmt: skip


def test_fitted_equal_contexts(contexts: list[Entry]) -> None:
    alike = [
        entry(contexts[0].tensors[KEY], contexts[0].tensors[VALUE], f"again {index}") for index in range(4)
    ]
    donor = fitted(alike, contexts[1], rows=4)
    torch.testing.assert_close(dict(donor.tensors), dict(alike[0].tensors))


def test_patched_improves_with_rank(contexts: list[Entry]) -> None:
    *kept, exact = contexts
    errors = [off(patched(kept, exact, rank), exact) for rank in (0, 1, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(off(mean(kept), exact), rel=1e-5)
    assert errors[-1] < 1e-10


def test_patched_restores_differences_of_its_rank(contexts: list[Entry]) -> None:
    middle = mean(contexts)
    shape = middle.tensors[KEY].shape
    rows = torch.linspace(-1, 1, LENGTH)[:, None]
    step = (rows * torch.arange(16.0)).view(LENGTH, *[size for size in shape if size != LENGTH])
    step = step.movedim(0, shape.index(LENGTH))
    exact = entry(middle.tensors[KEY] + step, middle.tensors[VALUE] - step)
    assert off(patched(contexts, exact, 1), exact) < 1e-6 * off(middle, exact)


def test_fitted_ambiguous_dimension() -> None:
    square = torch.zeros(LENGTH, LENGTH)
    with pytest.raises(StoreError, match="2 dimensions"):
        patched([entry(square, square)], entry(square, square), 1)


def test_nearest_by_shared_words() -> None:
    assert nearest(["", "a b c", "b c d e"], "c b e") == 2
    assert nearest(["", "a"], "") == 0


@pytest.mark.parametrize(
    "make", [lambda them, new: fitted(them, new, 8), lambda them, new: patched(them, new, 1)]
)
def test_states_become_their_mean(contexts: list[Entry], make: Callable[..., Entry]) -> None:
    """The maps of recurrent layers have no row per token."""
    states = [torch.full((1, 2, 4, 4), float(number)) for number in range(4)]
    found = [
        exact_donor({**one.tensors, STATE: state}, LENGTH, str(one.info["before"]))
        for one, state in zip(contexts, states, strict=True)
    ]
    made = make(found, found[0])
    torch.testing.assert_close(made.tensors[STATE], torch.full((1, 2, 4, 4), 1.5))
    assert set(made.tensors) == {KEY, VALUE, STATE}

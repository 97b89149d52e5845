"""Bytes of a donor per kind of layer."""

import pytest
import torch

from vlcache_fx.bench import donor_bytes
from vlcache_fx.bench.donor_bytes import StoredPart, donor_parts, main
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.spec.slots import Factor, Inputs, Key, Matrix, Term, Value


@pytest.fixture(scope="module")
def hybrid() -> list[StoredPart]:
    return donor_parts(find_preset("tiny-hybrid"), 1000, torch.bfloat16, 0.02)


def test_parts_of_a_hybrid(hybrid: list[StoredPart]) -> None:
    """One layer of attention with two heads of 64; three of delta rules with two heads of 128 x 128."""
    found = {(part.kind, part.slot): (part.unit_bytes, part.units, part.layers) for part in hybrid}
    state = 2 * 128 * 128 * 4
    assert found == {
        ("full_attention", Key): (2 * 64 * 2, 1000, 1),
        ("full_attention", Value): (2 * 64 * 2, 1000, 1),
        ("linear_attention", Inputs): ((128 + 128 + 256) * 4 * 2, 1, 3),
        ("linear_attention", Matrix): (state, 1, 3),
        ("linear_attention", Factor): (state, 2, 3),
        ("linear_attention", Term): (state, 2, 3),
    }


def test_states_are_in_float32(hybrid: list[StoredPart]) -> None:
    dtypes = {part.slot: part.dtype for part in hybrid}
    assert dtypes[Key] == dtypes[Inputs] == "bfloat16"
    assert dtypes[Matrix] == dtypes[Factor] == "float32"


@pytest.mark.thorough
def test_one_map_without_recomputed_rows() -> None:
    parts = donor_parts(find_preset("tiny-hybrid"), 1000, torch.float32, 0.0)
    assert {part.units for part in parts if part.slot in (Factor, Term)} == {1}


def test_attention_alone() -> None:
    """Keys and values, and nothing else."""
    parts = donor_parts(find_preset("tiny"), 100, torch.float32, 0.02)
    assert [(part.slot, part.total_bytes) for part in parts] == [
        (Key, 2 * 100 * 2 * 64 * 4),
        (Value, 2 * 100 * 2 * 64 * 4),
    ]


@pytest.mark.parametrize("markdown", [True, False])
def test_command(
    hybrid: list[StoredPart],
    markdown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(donor_bytes, "donor_parts", lambda *_: hybrid)
    main("tiny-hybrid", 1000, "bfloat16", 0.02, markdown)
    text = capsys.readouterr().out
    assert ("| 3 linear_attention | maps, factors A | 2 x 128 x 128 | float32 |" in text) == markdown
    assert f"{sum(part.total_bytes for part in hybrid) / 2**20:,.1f}" in text

"""Studies of schedules over layers and of fits, on a small Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from vlcache_fx.fidelity import fit_study, layer_study
from vlcache_fx.fidelity.compare import Comparison, difference
from vlcache_fx.fidelity.donor_kinds import blend
from vlcache_fx.fidelity.llama_rows import Item, LlamaRows
from vlcache_fx.fidelity.paired import Answer, paired_table
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.policies import Profile

from . import passages

SOURCE: Any = passages
LAYERS = passages.LAYERS


@pytest.fixture(scope="module")
def subject() -> Subject:
    return passages.load_subject()


def item(contexts: int, length: int = 12, seed: int = 0) -> Item:
    generator = torch.Generator().manual_seed(seed)

    def rows() -> torch.Tensor:
        return torch.randn(contexts, length, 2, 8, generator=generator)

    return Item((rows(),), (rows(),), torch.zeros(contexts, 2, length, 16))


def test_schedules_cost_the_same(subject: Subject) -> None:
    rows = LlamaRows(subject.model)
    measured = Profile("", "float32", (1.0, 1.0, 0.5, 0.0), ((0.0, 1.0), (0.1, 0.2), (1.0, 0.0)))
    found = layer_study.schedules(400, rows, 0.1, measured)
    costs = {name: schedule.cost(400, rows.key_value_share) for name, schedule in found.items()}
    assert costs.pop("none") == 0
    # Rows of the last layer compute keys and values alone: counts that end early cost more per token-layer.
    assert costs.pop("calibrated") == pytest.approx(costs["uniform"], rel=0.15)
    assert set(costs) == {
        "uniform",
        *("until 4", "until 3"),
        *("delta from 3", "delta from 2", "delta from 1", "delta in 2 to 2"),
    }
    assert list(costs.values()) == pytest.approx([costs["uniform"]] * len(costs), rel=0.02)
    assert found["calibrated"].carried[-1].tolist() == []
    for schedule in found.values():
        for before, after in zip(schedule.carried, schedule.carried[1:], strict=False):
            assert set(after.tolist()) <= set(before.tolist())


def test_layer_study(subject: Subject) -> None:
    groups, measured = layer_study.study(subject, SOURCE, 2, 0.2, calibration_items=2)
    assert set(groups) == {"one context", "8 fitted"}
    assert len(measured.sensitivities) == LAYERS
    assert sum(measured.sensitivities) == pytest.approx(1)
    for alternatives in groups.values():
        assert {len(answers) for answers in alternatives.values()} == {2 * 3}
        errors = {
            name: sum(answer.compared.kl for answer in answers) for name, answers in alternatives.items()
        }
        assert 0 < errors["uniform"] < errors["none"]


def test_fit_study(subject: Subject) -> None:
    groups = fit_study.study(subject, SOURCE, 4, 0.2)
    assert set(groups) == {"all", "short", "long", "question first"}
    counts = {group: {len(own) for own in alternatives.values()} for group, alternatives in groups.items()}
    assert counts == {"all": {12}, "short": {4}, "long": {4}, "question first": {4}}
    errors = {name: sum(answer.compared.kl for answer in own) for name, own in groups["all"].items()}
    assert len(set(errors.values())) == len(errors)  # no two alternatives are the same
    assert errors["mean"] < errors["one context"]


def test_per_head_fits_each_head() -> None:
    """A head of one context beside a head of another."""
    contexts = item(3).keys[0]
    mixed = torch.stack([contexts[0, :, 0], contexts[1, :, 1]], 1)
    rows = torch.arange(4)

    def error(fitted: torch.Tensor) -> float:
        return float((fitted - mixed).square().sum())

    by_head = fit_study.per_head(contexts, rows, mixed[rows])
    assert error(by_head) < error(blend(contexts, rows, mixed[rows]))


def test_low_rank_keeps_the_mean_and_what_the_rank_can() -> None:
    whole = item(3)
    cut = fit_study.low_rank(whole, 2)
    torch.testing.assert_close(cut.keys[0].mean(0), whole.keys[0].mean(0))
    torch.testing.assert_close(fit_study.low_rank(whole, 16).keys[0], whole.keys[0])
    differences = (cut.keys[0] - whole.keys[0].mean(0)).flatten(2)
    assert torch.linalg.matrix_rank(differences[0]) == 2


def test_rounded_to_8_bits() -> None:
    factor = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    packed = fit_study.rounded(factor)
    scale = factor.abs().amax(0) / 127
    assert 0 < (packed - factor).abs().max() <= scale.max() / 2 + 1e-6
    assert (packed / scale).unique().numel() <= 255 * 3


def test_prompt_adapter_moves_rows_that_others_have() -> None:
    own, other = item(2, 12), item(2, 8, seed=1)
    change = fit_study.change(other, other.first(1))
    moved = fit_study.with_changes(own, [change], keep=False).keys[0]
    assert moved.shape == (1, 12, 2, 8)
    difference = moved[0] - own.keys[0].mean(0)
    torch.testing.assert_close(difference[:8], (other.keys[0][0] - other.keys[0].mean(0)))
    assert not difference[8:].any()
    assert fit_study.with_changes(own, [change], keep=True).keys[0].shape[0] == 3


def test_differences_are_in_pairs() -> None:
    found = difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    assert difference([1.0], [2.0]).low == float("-inf")


def test_paired_table() -> None:
    def answers(*kls: float) -> list[Answer]:
        return [Answer(Comparison(kl, True, True), 0.02) for kl in kls]

    table = paired_table({"all": {"uniform": answers(1.0, 2.0), "other": answers(2.0, 3.0)}}, "uniform", "T")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["minus uniform"] == ["", "1 (1 to 1)"]
    assert columns["cost"] == ["2.00 %"] * 2

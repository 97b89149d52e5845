"""The study of the maps of recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity import map_study
from vlcache_fx.fidelity.models import load_cases, load_subject
from vlcache_fx.spec.slots import Factor, Term
from vlcache_fx.store.entry import Entry
from vlcache_fx.testing import reference_vlm


def donor() -> Entry:
    halves = torch.eye(4).expand(2, 3, 4, 4) * torch.tensor([0.5, 0.25]).view(2, 1, 1, 1)
    return Entry({"2.factor.0": halves, "2.term.0": torch.ones(2, 3, 4, 5), "3.k": torch.ones(1, 2)}, {})


def test_norm_of_a_whole_item() -> None:
    """Maps of records follow each other."""
    norms = map_study.map_norms(donor())
    assert norms.keys() == {2}
    assert norms[2].tolist() == pytest.approx([0.125] * 3)


@pytest.mark.parametrize(("slots", "zeros"), [((), []), ((Factor,), ["2.factor.0"]), ((Term,), ["2.term.0"])])
def test_without_slots(slots: tuple[type[Factor] | type[Term], ...], zeros: list[str]) -> None:
    entry = map_study.without(donor(), slots)
    assert [name for name, tensor in entry.tensors.items() if not tensor.any()] == zeros
    assert donor().tensors["2.factor.0"].any()


def test_state_in_front_of_an_item_matters() -> None:
    """The question is in front of the picture: without A, the answer's states know nothing of it."""
    subject = load_subject("hybrid", 1, {"lowering": "eager", "strict": True})
    cases = load_cases("hybrid", None, ("question_first",), 4, split="test", seed=0)
    found, norms = map_study.study(subject, cases, batch=4)
    divergence = {kind: sum(one.kl for one in comparisons) for kind, comparisons in found.items()}
    assert divergence["A and B"] < divergence["B alone"]
    assert {layer: len(measured) for layer, measured in norms.items()} == {
        layer: len(cases) for layer in (0, 1, 2, 4, 5, 6)
    }


def test_models_without_recurrent_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = reference_vlm.load_model()
    model.model.language_model.layers = model.model.language_model.layers[:1]
    model.config.text_config.num_hidden_layers = 1
    monkeypatch.setattr(reference_vlm, "load_model", lambda: model)
    subject = load_subject("reference", 1, {"lowering": "eager", "strict": True})
    cases = load_cases("reference", None, ("question_first",), 2, split="test", seed=0)
    with pytest.raises(OptionError, match="reference has no recurrent layers"):
        map_study.study(subject, cases)

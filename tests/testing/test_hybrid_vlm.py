"""The hybrid model: its files, its shape and its answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import torch

from vlcache_fx.fidelity.models import load_model as load_named
from vlcache_fx.testing import hybrid_vlm, reference_vlm
from vlcache_fx.testing.hybrid_vlm import (
    FAMILIES,
    accuracy,
    answer_questions,
    load_model,
    load_processor,
    make_questions,
    next_words,
    prepare,
)

ROOT = Path(__file__).resolve().parents[2]
FLOOR, COUNT_FLOOR = 0.85, 0.7
"""Of 24 questions, and of those that count digits, which it learns last; see ``evaluation.json``."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model()


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor()


def test_import_is_light() -> None:
    code = (
        "import sys, vlcache_fx.testing.hybrid_vlm\n"
        "assert not {'transformers', 'sklearn', 'PIL', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_interface_is_that_of_the_reference_model() -> None:
    assert hybrid_vlm.__all__ == reference_vlm.__all__
    assert hybrid_vlm.make_questions is reference_vlm.make_questions


def test_shape(model: Any) -> None:
    kinds = model.config.text_config.layer_types
    assert kinds == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert 1.5e6 < sum(weight.numel() for weight in model.parameters()) < 2e6


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_accuracy(model: Any, processor: Any, family: str, first: bool) -> None:
    asked = make_questions("test", family, 24, seed=11, question_first=first)
    right = accuracy(next_words(model, processor, asked, batch=24), asked)
    assert right >= (COUNT_FLOOR if family == "count" else FLOOR)


def test_generate_answers_in_one_word(model: Any, processor: Any) -> None:
    asked = [make_questions("test", family, 4, seed=12)[0] for family in FAMILIES]
    generated = answer_questions(model, processor, asked)
    assert generated == next_words(model, processor, asked)
    assert generated == [answer for one in asked for answer in answer_questions(model, processor, [one])]


def test_processor_is_that_of_the_reference_model(processor: Any) -> None:
    asked = make_questions("test", "same", 2, seed=2)
    mine, theirs = prepare(processor, asked), prepare(reference_vlm.load_processor(), asked)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_model_has_a_name() -> None:
    loaded, _ = load_named("hybrid")
    assert type(loaded).__name__ == "Qwen3_5ForConditionalGeneration"

"""Training of the reference model: packed rows, the guide, and the command with tiny settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import torch

from examples.train_reference_vlm.packing import IGNORE, encode_row, pack
from examples.train_reference_vlm.training import BatchMaker, Guide, Recipe, answer_loss
from vlcache_fx.testing.reference_vlm import FAMILIES, load_model, load_processor, make_questions, prepare
from vlcache_fx.testing.reference_vlm.data import Asked, Question
from vlcache_fx.testing.reference_vlm.vocabulary import vocabulary


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(attn_implementation="eager")


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor()


def packed_logits(model: Any, question: Question, asked: list[Asked]) -> torch.Tensor:
    """Logits ``[questions, words]`` where the answers of one packed row begin."""
    rows = [len(grid) for grid in question.digits]
    words = vocabulary()
    row = encode_row(words, question.system_prompt, rows, asked, question.question_first)
    batch = pack(words, [row], rows)
    pixels = load_processor().image_processor(question.images)
    wanted = (batch["labels"] != IGNORE)[0].nonzero()[::2, 0]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, **pixels).logits[0, wanted]
    return logits


@pytest.mark.parametrize("first", [False, True])
def test_packed_training_rows_equal_single_questions(processor: Any, first: bool) -> None:
    model = load_model()
    question = make_questions("test", "same", 1, question_first=first)[0]
    asked = [Asked(question.text, question.answer, ())]
    if not first:
        asked.insert(0, Asked("what digit is at row 1 column 1 ?", "1", ()))
    with torch.no_grad():
        single = model(**prepare(processor, [question])).logits[:, -1]
    torch.testing.assert_close(packed_logits(model, question, asked)[-1:], single, atol=1e-3, rtol=1e-3)


def test_guide_equals_model_attention(model: Any) -> None:
    guide = Guide(model)
    try:
        batch = BatchMaker(vocabulary(), 0).batch(Recipe(("cell",), False, 1, 1, rows=(2, 2), system_words=3))
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "sources")}
        mask = torch.where(inputs.pop("attention_mask"), 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad():
            weights = model(**inputs, attention_mask=mask, output_attentions=True).attentions[2][0, 0]
            answer_loss(model, {**batch, "attention_mask": mask})
            loss = guide.loss(batch)
        slot, source = (int(index) for index in batch["sources"][0].nonzero()[0])
        assert float(loss) == pytest.approx(-math.log(float(weights[slot, source])), abs=1e-3)
    finally:
        guide.remove()


def test_training_tiny_settings(tmp_path: Path) -> None:
    from examples.train_reference_vlm.__main__ import main

    report = main(["--steps", "2", "--device", "cpu", "--output", str(tmp_path)])
    assert set(report["accuracy"]) == set(FAMILIES)
    reloaded = load_model(folder=tmp_path)
    assert not reloaded.training
    assert {"evaluation.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}

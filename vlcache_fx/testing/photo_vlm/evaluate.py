"""Asks the photo VLM, and computes its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache_fx.testing import asking
from vlcache_fx.testing.asking import accuracy
from vlcache_fx.testing.photo_vlm.data import Question, build_prompt

__all__ = ["accuracy", "answer_questions", "next_words", "prepare"]


def prepare(processor: Any, questions: Sequence[Question], device: Any = None) -> Any:
    """Process questions into one left-padded batch of model inputs, on ``device`` if given.

    Their pictures must have equal sizes.
    """
    images = [image for question in questions for image in question.images]
    inputs = processor(text=[build_prompt(question) for question in questions], images=images)
    return inputs if device is None else inputs.to(device)


def answer_questions(
    model: Any, processor: Any, questions: Sequence[Question], batch: int = 4, max_new_tokens: int = 3
) -> list[str]:
    """Answer each question by greedy ``model.generate``; return the decoded answers."""
    return asking.answer_questions(model, processor, questions, prepare, batch, max_new_tokens)


def next_words(model: Any, processor: Any, questions: Sequence[Question], batch: int = 4) -> list[str]:
    """Predict the first answer word of each question with one forward pass."""
    return asking.next_words(model, processor, questions, prepare, batch)

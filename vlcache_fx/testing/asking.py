"""Asks a model questions with known answers, and computes its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

Prepare = Callable[..., Any]
"""``prepare(processor, questions, device)``: one left-padded batch of model inputs."""


class HasAnswer(Protocol):
    """A question with a known answer."""

    @property
    def answer(self) -> str:
        """The correct answer."""


def answer_questions(
    model: Any, processor: Any, questions: Sequence[Any], prepare: Prepare, batch: int, max_new_tokens: int
) -> list[str]:
    """Answer each question by greedy ``model.generate``; return the decoded answers."""
    import torch

    answers: list[str] = []
    for inputs in _batches(model, processor, questions, prepare, batch):
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers.extend(text.strip() for text in processor.batch_decode(new, skip_special_tokens=True))
    return answers


def next_words(
    model: Any, processor: Any, questions: Sequence[Any], prepare: Prepare, batch: int
) -> list[str]:
    """Predict the first answer word of each question with one forward pass."""
    import torch

    words: list[str] = []
    for inputs in _batches(model, processor, questions, prepare, batch):
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        words.extend(processor.decode([token]).strip() for token in logits.argmax(-1).tolist())
    return words


def _batches(
    model: Any, processor: Any, questions: Sequence[Any], prepare: Prepare, batch: int
) -> Iterator[Any]:
    for start in range(0, len(questions), batch):
        yield prepare(processor, questions[start : start + batch], model.device)


def accuracy(answers: Sequence[str], questions: Sequence[HasAnswer]) -> float:
    """Return the share of correct ``answers`` (0..1)."""
    if not questions:
        raise ValueError("accuracy needs at least one question")
    correct = [answer == question.answer for answer, question in zip(answers, questions, strict=True)]
    return sum(correct) / len(correct)

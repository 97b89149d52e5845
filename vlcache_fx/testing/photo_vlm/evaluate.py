"""Ask the photo VLM, and count how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache_fx.testing.photo_vlm.data import Question, build_prompt


def prepare(processor: Any, questions: Sequence[Question], device: Any = None) -> Any:
    """Process questions into one left-padded batch of model inputs, on ``device`` when one is given.

    Their pictures have one size.
    """
    images = [image for question in questions for image in question.images]
    inputs = processor(text=[build_prompt(question) for question in questions], images=images)
    return inputs if device is None else inputs.to(device)


def answer_questions(
    model: Any, processor: Any, questions: Sequence[Question], batch: int = 4, max_new_tokens: int = 3
) -> list[str]:
    """Answer each question by greedy ``model.generate``; returns the decoded answers."""
    import torch

    answers: list[str] = []
    for start in range(0, len(questions), batch):
        inputs = prepare(processor, questions[start : start + batch], model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers.extend(text.strip() for text in processor.batch_decode(new, skip_special_tokens=True))
    return answers


def next_words(model: Any, processor: Any, questions: Sequence[Question], batch: int = 4) -> list[str]:
    """The likeliest first answer word of each question, by one forward pass (no generation)."""
    import torch

    words: list[str] = []
    for start in range(0, len(questions), batch):
        inputs = prepare(processor, questions[start : start + batch], model.device)
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        words.extend(processor.decode([token]).strip() for token in logits.argmax(-1).tolist())
    return words


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """The share of ``answers`` equal to the questions' own (0..1)."""
    if not questions:
        raise ValueError("accuracy needs at least one question")
    right = [answer == question.answer for answer, question in zip(answers, questions, strict=True)]
    return sum(right) / len(right)

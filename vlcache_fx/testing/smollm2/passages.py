"""Passages of Python's help topics, and prompts that ask to go on with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlcache_fx.testing.smollm2.model import load_tokenizer

FAMILIES = ("passage", "same")
"""One passage; two passages."""

PASSAGE = "<|passage|>"
"""Placeholder in prompts."""

PASSAGE_TOKENS, LEAST_TOKENS, ANSWER_TOKENS = 600, 200, 7

SENTENCES = (
    "You are a helpful assistant.",
    "You are a technical writer who explains programming to beginners.",
    "Answer in the style of the text that you are given.",
    "The user will show you a part of a manual; read it carefully.",
    "Be brief and exact.",
    "Never invent facts that are not in the text.",
    "You work for a publisher who prints books about software.",
    "Reply with plain text, without lists or headings.",
    "Today we are editing the reference of a programming language.",
    "If a sentence is cut off, complete it before you begin a new one.",
    "Keep to the words that the author uses.",
    "The reader knows other languages, but not this one.",
)
QUESTIONS = (
    "Continue this text.",
    "Which words come next?",
    "Go on where the text ends.",
    "Write the next sentence of this manual.",
)


@dataclass(frozen=True)
class Question:
    """A prompt to go on with a passage.

    Attributes:
        system_prompt, text: what is asked.
        images: the passages; the answer continues the last one.
        answer: the next words, ``ANSWER_TOKENS`` tokens.
        question_first: whether ``text`` stands before the passages.
    """

    system_prompt: str
    text: str
    images: tuple[str, ...]
    answer: str
    question_first: bool = False


def make_questions(
    split: str = "test",
    family: str = "passage",
    count: int = 30,
    seed: int = 0,
    question_first: bool = False,
    system_words: int | None = None,
) -> list[Question]:
    """Make ``count`` questions, each to go on with another passage; equal arguments give equal questions.

    Args:
        split: ``"test"`` or ``"train"``: topics with even or odd numbers.
        family: one of ``FAMILIES``.
        count: number of questions.
        seed: seed of the choice.
        question_first: put the question before the passages.
        system_words: least number of words of the system prompts (default: of one to six sentences).

    Raises:
        ValueError: there are not so many passages, or there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is not valid: it must be one of {', '.join(FAMILIES)}")
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    known = passages(split)
    if count > len(known):
        raise ValueError(f"count={count} is not valid: {split} has {len(known)} passages")
    order = rng.permutation(len(known))
    found = []
    for first in order[:count]:
        others = [int(rng.choice(order[order != first]))] if family == "same" else []
        own = [known[index] for index in (*others, int(first))]
        text = str(rng.choice(QUESTIONS))
        images = tuple(passage for passage, _ in own)
        found.append(Question(_system_prompt(rng, system_words), text, images, own[-1][1], question_first))
    return found


def ask_again(
    question: Question,
    rng: np.random.Generator,
    question_first: bool = False,
    system_words: int | None = None,
) -> Question:
    """The same passages behind another system prompt, with another request."""
    return dataclasses.replace(
        question,
        system_prompt=_system_prompt(rng, system_words),
        text=str(rng.choice([text for text in QUESTIONS if text != question.text])),
        question_first=question_first,
    )


def build_prompt(question: Question) -> str:
    """The chat as text, up to the answer, with a placeholder for each passage."""
    shown = "\n\n".join(PASSAGE for _ in question.images)
    parts = (question.text, shown) if question.question_first else (shown, question.text)
    return (
        f"<|im_start|>system\n{question.system_prompt}<|im_end|>\n"
        f"<|im_start|>user\n{parts[0]}\n\n{parts[1]}<|im_end|>\n<|im_start|>assistant\n"
    )


def answer_text(answer: str) -> str:
    """The answer as it follows the prompt."""
    return answer


@functools.cache
def passages(split: str) -> tuple[tuple[str, str], ...]:
    """Passages of at most ``PASSAGE_TOKENS`` tokens, each with the words that follow it."""
    from pydoc_data.topics import topics

    splits = {"test": 0, "train": 1}
    if split not in splits:
        raise ValueError(f"split={split!r} is not valid: it must be one of {', '.join(splits)}")
    chosen = [topics[name] for number, name in enumerate(sorted(topics)) if number % 2 == splits[split]]
    return tuple(pair for text in chosen for pair in _cut(text))


def _cut(text: str) -> Iterator[tuple[str, str]]:
    tokenizer = load_tokenizer()
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in range(0, len(ids) - LEAST_TOKENS, PASSAGE_TOKENS):
        words = tokenizer.decode(ids[start : start + PASSAGE_TOKENS]).rsplit(" ", 12)
        passage, rest = words[0].strip(), " ".join(words[1:]).strip()
        answer_ids = tokenizer(rest, add_special_tokens=False)["input_ids"][:ANSWER_TOKENS]
        answer = tokenizer.decode(answer_ids)
        alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
        after = tokenizer(f"<|im_start|>assistant\n{answer}", add_special_tokens=False)["input_ids"]
        if list(alone) == list(answer_ids) == list(after[-ANSWER_TOKENS:]):  # other answers tell less
            yield passage, answer


def _system_prompt(rng: np.random.Generator, words: int | None) -> str:
    chosen: list[str] = []
    least = int(rng.integers(5, 60)) if words is None else words
    for index in rng.permutation(len(SENTENCES)):
        if sum(len(sentence.split()) for sentence in chosen) >= least:
            break
        chosen.append(SENTENCES[index])
    return " ".join(chosen)

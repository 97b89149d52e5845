"""Requests in which pictures return, as chats of the OpenAI API."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlcache_fx.serve.media import data_url
from vlcache_fx.testing import reference_vlm
from vlcache_fx.testing.reference_vlm import Question, ask_again

PAGES, STEPS, WINDOW = 4, 8, 3
"""Pictures that return in ``documents``; steps of a session of ``agent``; screenshots in its prompt."""

NEW = 10_000
"""Number of the first picture that no other trace has."""

SENTENCES = (
    "you are a helpful assistant .",
    "look at the picture with care , then answer .",
    "answer with one word .",
)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        session: requests of a session follow each other; sessions run side by side.
        messages: the chat.
        answer: the right answer; None where the model has random weights.
    """

    session: int
    messages: Sequence[dict[str, Any]]
    answer: str | None = None


def questions(count: int, seed: int, *, returning: bool) -> list[Ask]:
    """Questions for the reference VLM: about ``PAGES`` pictures again and again, or each about a new one.

    Each is a session of its own, behind a system prompt of its own.
    """
    rng = np.random.default_rng(seed)
    first = reference_vlm.make_questions("test", "cell", PAGES if returning else count, seed=seed)
    asked = [
        ask_again(first[int(rng.integers(PAGES))], rng, question_first=False) if returning else first[index]
        for index in range(count)
    ]
    return [Ask(index, _chat(question), question.answer) for index, question in enumerate(asked)]


def documents(count: int, seed: int, side: int, *, returning: bool = True) -> list[Ask]:
    """Few pictures, many questions: two of ``PAGES`` pages in the order of a search, then a question."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        pages = rng.permutation(PAGES)[:2] if returning else (NEW + 2 * index, NEW + 2 * index + 1)
        content = [_picture(side, int(page), seed) for page in pages] + [_text(rng)]
        found.append(Ask(index, _messages(SENTENCES[index % len(SENTENCES)], content)))
    return found


def agent(count: int, seed: int, side: int) -> list[Ask]:
    """A computer-use agent: each step adds a screenshot, and the oldest of a window leaves the prompt."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        session, step = divmod(index, STEPS)
        seen = range(max(0, step + 1 - WINDOW), step + 1)
        content: list[dict[str, Any]] = []
        for number in seen:
            content += [
                _picture(side, 100 * (session + 1) + number, seed),
                _text(np.random.default_rng(number)),
            ]
        found.append(Ask(session, _messages(SENTENCES[0], [*content, _text(rng)])))
    return found


def chat(count: int, seed: int, side: int) -> list[Ask]:
    """Conversations that send everything again in each turn; the first turn has the picture."""
    found = []
    for index in range(count):
        session, turn = divmod(index, STEPS)
        rng = np.random.default_rng([seed, session])
        messages = _messages(SENTENCES[0], [_picture(side, 5000 + session, seed), _text(rng)])
        for _ in range(turn):
            messages += [
                {"role": "assistant", "content": "none"},
                {"role": "user", "content": [_text(rng)]},
            ]
        found.append(Ask(session, messages))
    return found


TRACES: dict[str, Callable[[int, int, int], list[Ask]]] = {
    "documents": documents,
    "agent": agent,
    "chat": chat,
    "new pictures": functools.partial(documents, returning=False),
}
"""Traces for a model with random weights: ``(requests, seed, side of a picture in pixels)``."""


def _chat(question: Question) -> list[dict[str, Any]]:
    content = [_part(data_url(image)) for image in question.images]
    return _messages(question.system_prompt, [*content, {"type": "text", "text": question.text}])


def _messages(system_prompt: str, content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": list(content)}]


def _text(rng: np.random.Generator) -> dict[str, Any]:
    row, column = rng.integers(1, 11, 2)
    return {"type": "text", "text": f"which digit is in row {row} and column {column} ?"}


def _picture(side: int, number: int, seed: int) -> dict[str, Any]:
    return _part(_noise_url(side, number, seed))


def _part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@functools.lru_cache(maxsize=256)
def _noise_url(side: int, number: int, seed: int) -> str:
    pixels = np.random.default_rng([seed, number]).integers(256, size=(side, side, 3), dtype=np.uint8)
    return data_url(Image.fromarray(pixels))

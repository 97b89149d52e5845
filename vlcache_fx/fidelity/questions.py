"""Cases for models that have their own questions about pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.prompts import Case, Prompt

FAMILIES = (
    "single_hop",
    "question_first",
    "multi_hop",
    "system_prompt",
    "position_shift",
    "asked_again",
)
"""One picture; the question before it; two pictures; as many other words before it; many more words before
it; the same words before it, with exact reuse."""

SHORT, LONG = 4, 60


class Questions(Protocol):
    """Interface of a model's module, such as ``vlcache_fx.testing.reference_vlm``."""

    make_questions: Callable[..., list[Any]]
    ask_again: Callable[..., Any]
    build_prompt: Callable[[Any], str]
    answer_text: Callable[[str], str]
    FAMILIES: tuple[str, ...]


def make_cases(
    source: Questions, family: str, count: int, *, split: str = "test", seed: int = 0, contexts: int = 1
) -> list[Case]:
    """Make ``count`` cases of one family, for donors of up to ``contexts``; equal arguments give equal cases.

    Raises:
        OptionError: an unknown family.
    """
    if family not in FAMILIES:
        raise OptionError(f"family={family!r} is not valid: it must be one of {', '.join(FAMILIES)}")
    about_two = [kind for kind in source.FAMILIES if kind == "same"]
    kinds = about_two if family == "multi_hop" else [k for k in source.FAMILIES if k not in about_two]
    words = {"system_prompt": 30, "position_shift": SHORT}.get(family)
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    of_others = np.random.default_rng([seed, FAMILIES.index(family), 1])  # cases are the same without
    cases = []
    for kind, share in zip(kinds, shares(count, len(kinds)), strict=True):
        made = source.make_questions(
            split, kind, share, seed=seed + FAMILIES.index(family), system_words=words
        )
        for first in made:
            then = source.ask_again(
                first,
                rng,
                question_first=family == "question_first",
                system_words=LONG if family == "position_shift" else words,
            )
            others = tuple(
                make_prompt(
                    source,
                    source.ask_again(first, of_others, question_first=bool(of_others.random() < 0.5)),
                )
                for _ in range(contexts - 1)
            )
            if family == "asked_again":
                then = dataclasses.replace(then, system_prompt=first.system_prompt)
            cases.append(Case(family, make_prompt(source, first), make_prompt(source, then), others))
    return cases


def one_item_questions(source: Questions, split: str, count: int, seed: int, skip: int = 0) -> list[Any]:
    """Make questions about one item each, of all kinds.

    Args:
        source: the model's module.
        split: ``"test"`` or ``"train"``.
        count: number of questions.
        seed: seed of the choice.
        skip: leave out as many, those of a call with this count.
    """
    kinds = [kind for kind in source.FAMILIES if kind != "same"]
    numbers = zip(kinds, shares(skip, len(kinds)), shares(skip + count, len(kinds)), strict=True)
    return [
        question
        for kind, before, end in numbers
        for question in source.make_questions(split, kind, end, seed=seed)[before:]
    ]


def shares(count: int, parts: int) -> list[int]:
    """Divide ``count`` into parts that differ by one at most."""
    return [count // parts + (index < count % parts) for index in range(parts)]


def make_prompt(source: Questions, question: Any) -> Prompt:
    """Convert a question to a prompt, with the answer in the model's format."""
    return Prompt(source.build_prompt(question), question.images, source.answer_text(question.answer))

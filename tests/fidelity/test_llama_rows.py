"""A Llama decoder that computes chosen rows of an item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.donor_kinds import blend
from vlcache_fx.fidelity.llama_prompts import compared, embed, recorded
from vlcache_fx.fidelity.llama_rows import Item, LlamaRows, Schedule
from vlcache_fx.fidelity.prompts import Case
from vlcache_fx.fidelity.questions import make_prompt, one_item_questions
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.policies.first_k import FirstK

from . import passages

SOURCE: Any = passages
LENGTH, LAYERS = 30, passages.LAYERS


@pytest.fixture(scope="module")
def subject() -> Subject:
    return passages.load_subject()


@pytest.fixture(scope="module")
def rows(subject: Subject) -> LlamaRows:
    return LlamaRows(subject.model)


@pytest.fixture(scope="module")
def questions() -> list[Any]:
    """One passage behind four prompts."""
    rng = np.random.default_rng(0)
    (first,) = one_item_questions(SOURCE, "test", 1, 0)
    return [first, *(passages.ask_again(first, rng) for _ in range(3))]


def test_full_computation_equals_the_model(subject: Subject, rows: LlamaRows, questions: list[Any]) -> None:
    new, item, logits = recorded(subject, rows, SOURCE, questions[0])
    assert (new.start, new.length, len(new.answer)) == (6 - 1, LENGTH, 2)
    exact = subject.exact(subject.prepare([make_prompt(SOURCE, questions[0])]))[0]
    torch.testing.assert_close(logits, exact)
    assert [tuple(key.shape) for key in item.keys] == [(1, LENGTH, 2, 8)] * LAYERS
    assert tuple(item.hidden.shape) == (1, LAYERS + 1, LENGTH, 32)


@pytest.mark.parametrize("tokens", [0, 4, LENGTH])
def test_equal_rows_as_a_warm_program(
    subject: Subject, rows: LlamaRows, questions: list[Any], tokens: int
) -> None:
    _, item, _ = recorded(subject, rows, SOURCE, questions[0])
    new, _, exact = recorded(subject, rows, SOURCE, questions[1])
    logits = rows.reuse(new.embeds, new.start, item, new.last, Schedule.of_counts((tokens,) * LAYERS))
    subject.record([Case("passage", *(make_prompt(SOURCE, question) for question in questions[:2]))])
    with subject.engine.using(policy=FirstK(tokens=tokens), budget=1.0):
        reused = subject.answer(subject.prepare([make_prompt(SOURCE, questions[1])]))[0]
    assert subject.report["mode"] == "warm"
    torch.testing.assert_close(logits, reused)
    assert torch.allclose(logits, exact, atol=1e-4) is (tokens == LENGTH)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.of_counts((10, 6, 3, 0)),
        Schedule.of_counts((10,) * LAYERS, range(2, 4)),
        Schedule.of_counts((10,) * LAYERS, range(1, 3)),
    ],
    ids=["ends", "delta at the end", "delta in the middle"],
)
def test_own_context_as_donor_is_exact(
    subject: Subject, rows: LlamaRows, questions: list[Any], schedule: Schedule
) -> None:
    new, item, exact = recorded(subject, rows, SOURCE, questions[0])
    torch.testing.assert_close(rows.reuse(new.embeds, new.start, item, new.last, schedule), exact)


def test_schedules_matter_with_another_context(
    subject: Subject, rows: LlamaRows, questions: list[Any]
) -> None:
    _, item, _ = recorded(subject, rows, SOURCE, questions[0])
    new, _, _ = recorded(subject, rows, SOURCE, questions[1])
    counts = (10,) * LAYERS
    found = [
        rows.reuse(new.embeds, new.start, item, new.last, schedule)
        for schedule in (
            Schedule.of_counts(counts),
            Schedule.of_counts(counts, (2,)),
            Schedule.of_counts((10, 10, 0, 0)),
        )
    ]
    assert not torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-5)
    # In the last layer no row of an item attends: to skip it changes nothing.
    torch.testing.assert_close(
        rows.reuse(new.embeds, new.start, item, new.last, Schedule.of_counts(counts, (LAYERS - 1,))), found[0]
    )


def test_several_contexts(subject: Subject, rows: LlamaRows, questions: list[Any]) -> None:
    """Their mean serves, or a fit, which finds the context of the prompt among them."""
    made = [recorded(subject, rows, SOURCE, question) for question in questions]
    item = Item.stack([context for _, context, _ in made])
    new, _, exact = made[0]
    schedule = Schedule.of_counts((10,) * LAYERS)
    mean = compared(exact, rows.reuse(new.embeds, new.start, item, new.last, schedule), new).kl
    fitted = compared(exact, rows.reuse(new.embeds, new.start, item, new.last, schedule, blend), new).kl
    own = compared(exact, rows.reuse(new.embeds, new.start, item.first(1), new.last, schedule), new).kl
    assert own < 1e-9 < fitted < mean


def test_cost_counts_keys_and_values_apart() -> None:
    """Rows end: in their last layer, keys and values alone are computed."""
    assert Schedule.of_counts((2, 2)).cost(10, 0.25) == pytest.approx((2 * 0.25 * 2 + 2 * 0.75) / 20)
    skipped = Schedule.of_counts((2, 2, 2), (0,)).cost(10, 0.25)
    assert skipped == pytest.approx((2 * 0.25 * 3 + 2 * 0.75) / 30)
    assert Schedule.of_counts((0, 0)).cost(10, 0.25) == 0


def test_other_models() -> None:
    with pytest.raises(OptionError, match="Linear has 0 decoders of Llama layers, not one"):
        LlamaRows(nn.Linear(2, 2))


def test_prompts_with_two_items(subject: Subject, rows: LlamaRows, questions: list[Any]) -> None:
    class Two:
        """Asks about the passage twice."""

        build_prompt = staticmethod(lambda question: passages.build_prompt(question) * 2)
        answer_text = staticmethod(passages.answer_text)

    question = passages.Question(questions[0].system_prompt, questions[0].images * 2, "w1 w2")
    with pytest.raises(OptionError, match="a prompt with 2 items: it must have one"):
        embed(subject, rows, Two, question)  # type: ignore[arg-type]

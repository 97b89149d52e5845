"""Ways to generate with transformers: with reuse, each gives the answer of the unmodified model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from vlcache_fx.testing.reference_vlm import Question, load_model, load_processor, make_questions
from vlcache_fx.testing.reference_vlm.evaluate import prepare

from ..runtime.helpers import Pair, hits, own_compiler_state, with_api

MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """The reference VLM; all rows are recomputed, so that answers can be compared."""
    with own_compiler_state():
        yield with_api(load_model(), policy="full")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Two questions about one picture, with other words before it."""
    first = make_questions("test", "cell", 1, seed=3, question_first=False)[0]
    return [first, first.__class__(**{**vars(first), "system_prompt": "look at the picture with care ."})]


def answers(pair: Pair, inputs: Any, **settings: Any) -> list[torch.Tensor]:
    found = []
    for model in (pair.model, pair.reference):
        if settings.get("assistant_model"):
            settings["assistant_model"] = copy.deepcopy(pair.reference)
        torch.manual_seed(0)
        with torch.inference_mode():
            found.append(
                model.generate(
                    **inputs, max_new_tokens=4, min_new_tokens=4, **{"do_sample": False, **settings}
                )
            )
    return found


LONG = ("several answers", "penalties", "assistant", "static cache", "no cache")
"""Covered for other models: test_several_rows.py, test_caches.py, test_batches.py."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.works("Generation", name), *[pytest.mark.thorough] * (name in LONG)]
        )
        for name in MODES
    ],
)
def test_answers_equal_those_of_the_model(
    name: str, pair: Pair, processor: Any, questions: list[Question]
) -> None:
    pair.engine.clear()
    for number, question in enumerate(questions):
        ours, theirs = answers(pair, prepare(processor, [question], "cpu"), **MODES[name])
        assert torch.equal(ours, theirs)
        assert number == 0 or (pair.report["mode"], {*hits(pair.report)}) == ("warm", {True})
    assert pair.engine.refusals == []


@pytest.mark.parametrize(
    "name",
    ["prompt lookup", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("assistant", "beams"))],
)
def test_donors_of_plain_calls_serve(
    name: str, pair: Pair, processor: Any, questions: list[Question]
) -> None:
    """Recorded by a call that asks for one row of logits, used by one that asks for several, or copies."""
    pair.engine.clear()
    first, second = (prepare(processor, [question], "cpu") for question in questions)
    answers(pair, first)
    assert pair.report["mode"] == "cold"
    ours, theirs = answers(pair, second, **MODES[name])
    assert torch.equal(ours, theirs)
    assert all(hits(pair.report))
    assert pair.engine.stats()["calls"]["cold"] >= 1


@pytest.mark.works("Generation", "`TextIteratorStreamer`", "the model's answer")
def test_streamer(pair: Pair, processor: Any, questions: list[Question]) -> None:
    texts = []
    for model in (pair.model, pair.reference):
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = prepare(processor, questions[:1], "cpu")
        arguments = {**inputs, "max_new_tokens": 4, "do_sample": False, "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=arguments)
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert "".join(texts[0]).strip() == questions[0].answer


@pytest.mark.works("Generation", '`pipeline("image-text-to-text")`', "the model's answer")
def test_pipeline(pair: Pair, processor: Any, questions: list[Question]) -> None:
    """``pipeline("image-text-to-text")`` with a chat of the picture and the question."""
    question = questions[0]
    content = [{"type": "image", "image": question.images[0]}, {"type": "text", "text": question.text}]
    chat = [
        {"role": "system", "content": [{"type": "text", "text": question.system_prompt}]},
        {"role": "user", "content": content},
    ]
    texts = []
    for model in (pair.model, pair.reference):
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        (found,) = ask(
            text=chat, return_full_text=False, generate_kwargs={"max_new_tokens": 4, "do_sample": False}
        )
        texts.append(found["generated_text"])
    assert texts[0] == texts[1]
    assert texts[0].removesuffix("<|im_end|>").strip() == question.answer
    assert len(pair.report["spans"]) == 1

"""Passages for SmolLM2, and the processor that marks them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vlcache_fx
from vlcache_fx.fidelity.questions import make_prompt
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.runtime.requests.marked_spans import marked_spans
from vlcache_fx.testing import smollm2
from vlcache_fx.testing.photo_vlm import parts
from vlcache_fx.testing.smollm2.passages import ANSWER_TOKENS, PASSAGE, PASSAGE_TOKENS, passages

MISSING = parts.missing_parts(parts.OF_DECODER)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def processor() -> Any:
    return smollm2.load_processor()


def test_passages_of_the_splits_differ(processor: Any) -> None:
    test, train = (dict(passages(split)) for split in ("test", "train"))
    assert min(len(test), len(train)) >= 30
    assert not test.keys() & train.keys()
    for passage, answer in [*test.items()][:20]:
        assert len(processor.tokenizer(passage)["input_ids"]) <= PASSAGE_TOKENS
        assert len(processor.tokenizer(answer)["input_ids"]) == ANSWER_TOKENS


@pytest.mark.parametrize("family", smollm2.FAMILIES)
def test_questions_are_reproducible(family: str) -> None:
    first = smollm2.make_questions("test", family, 4, seed=1)
    assert first == smollm2.make_questions("test", family, 4, seed=1)
    assert first != smollm2.make_questions("test", family, 4, seed=2)
    again = smollm2.ask_again(first[0], np.random.default_rng(0), question_first=True, system_words=30)
    assert (again.images, again.answer) == (first[0].images, first[0].answer)
    assert again.text != first[0].text
    assert len(again.system_prompt.split()) >= 30
    prompt = smollm2.build_prompt(again)
    assert prompt.index(again.text) < prompt.index(PASSAGE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "cell"}, "family='cell' is not valid: it must be one of passage, same"),
        ({"count": 10_000}, "count=10000 is not valid: test has"),
        ({"split": "all"}, "split='all' is not valid: it must be one of test, train"),
    ],
)
def test_bad_questions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smollm2.make_questions(**arguments)


def test_processor_marks_passages(processor: Any) -> None:
    questions = smollm2.make_questions("test", "same", 2)
    prompts = [make_prompt(smollm2, question) for question in questions]
    inputs = processor(
        text=[prompt.text + prompt.answer for prompt in prompts],
        images=[passage for prompt in prompts for passage in prompt.images],
    )
    spans = marked_spans(inputs["inputs_embeds"])
    assert [sample for sample, _, _ in spans] == [0, 0, 1, 1]
    for (sample, start, size), passage in zip(
        spans, [passage for question in questions for passage in question.images], strict=True
    ):
        ids = inputs["input_ids"][sample, start : start + size]
        assert processor.tokenizer.decode(ids) == passage
    with pytest.raises(ValueError, match="the text names 1 passages but 2 were given"):
        processor(text=[PASSAGE], images=["a", "b"])


def test_passages_are_reused(processor: Any) -> None:
    """By the first two layers: each takes seconds to trace."""
    model = smollm2.load_model()
    torch.testing.assert_close(
        processor.embedding.weight, model.get_input_embeddings().weight, rtol=0, atol=0
    )
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    compiled = vlcache_fx.compile(model, lowering="eager", dynamic=True, strict=True, policy="full")
    subject = Subject("smollm2", compiled, processor, positions=ANSWER_TOKENS)
    (question,) = smollm2.make_questions("test", "passage", 1)
    again = smollm2.ask_again(question, np.random.default_rng(0))
    subject.answer(subject.prepare([make_prompt(smollm2, question)]))
    assert subject.report["mode"] == "cold"
    prepared = subject.prepare([make_prompt(smollm2, again)])
    torch.testing.assert_close(subject.answer(prepared), subject.exact(prepared), rtol=1e-4, atol=1e-4)
    assert subject.recomputed() == 1.0

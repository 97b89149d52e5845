"""Answers of the reference model: cold, warm, and unmodified."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import vlcache_fx
from vlcache_fx.testing import reference_vlm
from vlcache_fx.testing.reference_vlm import Question

RETURNS = (False, True)
"""Order of each warm question: whether it stands before the pictures."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question, its answers, and figures of the engine's report.

    ``full`` is the unmodified model's answer; ``starts`` are the positions of the pictures' first tokens.
    """

    family: str
    system_prompt: str
    text: str
    right: str
    answer: str
    full: str
    mode: str
    hit: bool
    encoder_hit: bool
    token_layer_fraction: float
    num_tokens: int
    starts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FamilyScore:
    """Counts for one family of questions.

    Attributes:
        cold: questions about new pictures; ``cold_right`` were answered correctly.
        warm: questions about recurring pictures; ``warm_right`` were answered correctly with reuse, and
            ``full_right`` by the unmodified model.
        agree: warm questions with equal answers of both.
        encoder_hits: warm questions without an encoder run.
        moved: warm questions with a picture at another position than before.
        fraction: recomputed share of the pictures' token-layers, mean over warm questions.
    """

    family: str
    cold: int
    cold_right: int
    warm: int
    warm_right: int
    full_right: int
    agree: int
    encoder_hits: int
    moved: int
    fraction: float


class AnswerBench:
    """The reference model twice: compiled for reuse, and unmodified (eager).

    Args:
        budget: share of the pictures' token-layers that may be recomputed.
        lowering: of the compiled model.
    """

    def __init__(self, budget: float = 0.02, lowering: str = "eager") -> None:
        self.processor = reference_vlm.load_processor()
        self.unmodified = reference_vlm.load_model()
        # dynamic=True: every question has another length.
        self.model: Any = vlcache_fx.compile(
            reference_vlm.load_model(), budget=budget, lowering=lowering, dynamic=True
        )

    def ask(self, question: Question) -> Asked:
        """Ask both models.

        Raises:
            RuntimeError: the compiled model did not call its engine.
        """
        inputs = reference_vlm.prepare(self.processor, [question])
        engine = self.model.vlcache
        before = sum(engine.stats()["calls"].values())
        answer = self._generate(self.model, inputs)
        if sum(engine.stats()["calls"].values()) != before + 1:
            raise RuntimeError("the compiled model did not call its engine")
        report = engine.last_report
        return Asked(
            family=question.family,
            system_prompt=question.system_prompt,
            text=question.text,
            right=question.answer,
            answer=answer,
            full=self._generate(self.unmodified, inputs),
            mode=report["mode"],
            hit=bool(report["spans"]) and all(span["hit"] for span in report["spans"]),
            encoder_hit=bool(report["encoder_hit"]),
            token_layer_fraction=report["token_layer_fraction"],
            num_tokens=report["num_tokens"],
            starts=tuple(span["start"] for span in report["spans"]),
        )

    def _generate(self, model: Any, inputs: Any) -> str:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()


def run_answers(
    bench: AnswerBench, families: Sequence[str], pictures: int, after_ask: Callable[[], None] = lambda: None
) -> list[list[Asked]]:
    """Ask about ``pictures`` sets of pictures per family; return one list per set, cold question first."""
    results = []
    for family in families:
        for first in reference_vlm.make_questions("test", family, pictures):
            asked = []
            for question in (first, *_returns(first)):
                asked.append(bench.ask(question))
                after_ask()
            results.append(asked)
    return results


def _returns(first: Question) -> Iterator[Question]:
    """Yield other questions about the pictures of ``first``, after other system prompts."""
    rng = np.random.default_rng(first.scan_ids[0].reshape(-1))
    for question_first in RETURNS:
        yield reference_vlm.ask_again(first, rng, question_first=question_first)


def score(results: Sequence[Sequence[Asked]]) -> list[FamilyScore]:
    """Count per family, in the order of ``results``."""
    scores = []
    for family in dict.fromkeys(asked[0].family for asked in results):
        sets = [asked for asked in results if asked[0].family == family]
        cold = [asked[0] for asked in sets]
        warm = [question for asked in sets for question in asked[1:]]
        scores.append(
            FamilyScore(
                family=family,
                cold=len(cold),
                cold_right=sum(question.answer == question.right for question in cold),
                warm=len(warm),
                warm_right=sum(question.answer == question.right for question in warm),
                full_right=sum(question.full == question.right for question in warm),
                agree=sum(question.answer == question.full for question in warm),
                encoder_hits=sum(question.encoder_hit for question in warm),
                moved=sum(question.starts != asked[0].starts for asked in sets for question in asked[1:]),
                fraction=sum(question.token_layer_fraction for question in warm) / len(warm),
            )
        )
    return scores

"""The model under test: asked with reuse, and as it was before it was compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.prompts import Case, Prompt


@dataclass(frozen=True, eq=False)
class Question:
    """A batch of prompts, answers included, as the model takes it.

    Attributes:
        inputs: keywords of the model; padded on the left.
        answers: per prompt, the ids of its answer's tokens, int64 [tokens].
    """

    inputs: dict[str, Any]
    answers: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that ``vlcache_fx.compile`` compiled, and its processor.

    Attributes:
        name: for reports.
        model: with ``model.vlcache``.
        processor: of the transformers library; called with ``text``, ``images``, ``padding``.
        positions: answer tokens that are compared at most, of every prompt. One number for all, so that no
            program depends on it.
    """

    name: str
    model: Any
    processor: Any
    positions: int = 4

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.model, "vlcache", None), Engine):
            raise OptionError(f"{type(self.model).__name__} was not compiled with vlcache_fx.compile")

    @property
    def engine(self) -> Engine:
        """Of the compiled model."""
        engine: Engine = self.model.vlcache
        return engine

    def prepare(self, prompts: Sequence[Prompt]) -> Question:
        """Prompts with their answers as one batch.

        Raises:
            OptionError: an answer has no token, or more of them than ``positions``.
        """
        tokenizer = self.processor.tokenizer
        answers = []
        for prompt in prompts:
            ids = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
            if not 1 <= len(ids) <= self.positions:
                raise OptionError(
                    f"the answer {prompt.answer!r} has {len(ids)} tokens: it must have 1 to {self.positions}"
                )
            answers.append(torch.tensor(ids))
        inputs = self.processor(
            text=[prompt.text + prompt.answer for prompt in prompts],
            images=[image for prompt in prompts for image in prompt.images],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device)
        ids = inputs["input_ids"].cpu()
        for row, prompt, answer in zip(ids, prompts, answers, strict=True):
            if not torch.equal(row[-len(answer) :], answer):
                raise OptionError(
                    f"after its prompt, the answer {prompt.answer!r} has other tokens than alone: "
                    "begin it, or end the prompt, with a space or a line break as the chat template does"
                )
        return Question(dict(inputs), tuple(answers))

    def record(self, cases: Sequence[Case]) -> None:
        """Forget everything, then compute the donors' prompts: their images are in the store after it.

        Raises:
            OptionError: reuse is refused for this model.
        """
        self.engine.clear()
        self.answer(self.prepare([case.donor for case in cases]))
        if self.report["mode"] != "cold":
            raise OptionError(f"{self.name} makes no donors: {self.report['reason']}")

    @property
    def report(self) -> dict[str, Any]:
        """Of the last call.

        Raises:
            OptionError: the engine was not called.
        """
        report = self.engine.last_report
        if report is None:
            raise OptionError(f"{self.name} answered without its engine")
        return report

    def recomputed(self) -> float:
        """The share of the reused spans' token-layers that the last call computed.

        Raises:
            OptionError: it did not reuse every span.
        """
        report = self.report
        if report["mode"] != "warm" or not all(span["hit"] for span in report["spans"]):
            raise OptionError(f"{self.name} did not reuse: {report['mode']}, {report['reason']}")
        share: float = report["token_layer_fraction"]
        return share

    def answer(self, question: Question) -> Tensor:
        """Scores of the next token where the answer stands, as the engine's policy has it.

        Returns:
            float32 [prompts, positions, vocabulary]: at the last ``positions`` tokens, each's next one.
        """
        return self._scores(self.model, question)

    def exact(self, question: Question) -> Tensor:
        """The same of the unmodified model."""
        assert self.engine.explained is not None  # set by vlcache_fx.compile
        return self._scores(self.engine.explained, question)

    def _scores(self, run: Any, question: Question) -> Tensor:
        with torch.no_grad():
            result = run(**question.inputs, logits_to_keep=self.positions + 1)
        scores: Tensor = result.logits[:, -self.positions - 1 : -1]
        return scores.float()

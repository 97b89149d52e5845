"""The model under test, with reuse and unmodified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.prompts import Case, Prompt


@dataclass(frozen=True, eq=False)
class Question:
    """A batch of prompts with their answers, as inputs of the model.

    Attributes:
        inputs: keyword arguments of the model; padded on the left.
        answers: token ids of each answer, int64 [tokens].
    """

    inputs: dict[str, Any]
    answers: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that ``vlcache_fx.compile`` compiled, and its processor.

    Attributes:
        name: label in messages.
        model: has an engine, ``model.vlcache``.
        processor: a processor of the transformers library; called with ``text``, ``images``, ``padding``.
        positions: maximum number of compared answer tokens; equal for all prompts, to avoid recompilation.
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
        """Engine of the compiled model."""
        engine: Engine = self.model.vlcache
        return engine

    def prepare(self, prompts: Sequence[Prompt]) -> Question:
        """Convert prompts and answers to one batch.

        Raises:
            OptionError: an answer has no tokens, or more than ``positions``.
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
        inputs = self.inputs([replace(prompt, text=prompt.text + prompt.answer) for prompt in prompts])
        ids = inputs["input_ids"].cpu()
        for row, prompt, answer in zip(ids, prompts, answers, strict=True):
            if not torch.equal(row[-len(answer) :], answer):
                raise OptionError(
                    f"the answer {prompt.answer!r} has other tokens after its prompt than alone: start it, "
                    "or end the prompt, with a space or a line break as the chat template does"
                )
        return Question(without_ids(inputs), tuple(answers))

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return what the processor makes of prompts without their answers, padded on the left."""
        made = self.processor(
            text=[prompt.text for prompt in prompts],
            images=[image for prompt in prompts for image in prompt.images],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(made.to(self.model.device))

    def ask(self, prompt: Prompt) -> dict[str, Any]:
        """Convert a prompt without its answer to inputs: the next token is the first of an answer."""
        given = dict(
            self.processor(text=[prompt.text], images=list(prompt.images), return_tensors="pt").to(
                self.model.device
            )
        )
        if "inputs_embeds" in given:  # marked passages; models take one of the two
            del given["input_ids"]
        return given

    def record(self, cases: Sequence[Case], contexts: int = 1) -> None:
        """Clear the store, then compute the donors' prompts to record their images, in ``contexts`` of them.

        Raises:
            OptionError: the model records no donors, or a case has too few prompts.
        """
        most = 1 + min(len(case.others) for case in cases)
        if contexts > most:
            raise OptionError(f"contexts={contexts}: there are prompts for {most} contexts of an image")
        self.engine.clear()
        options = self.engine.options
        learning = replace(options, donor_contexts=max(contexts, 1), exact_returns=contexts)
        try:
            self.engine.set_options(learning)
            for number in range(contexts):
                prompts = [(case.donor, *case.others)[number] for case in cases]
                self.answer(self.prepare(prompts))
                if self.report["mode"] != "cold":
                    raise OptionError(f"{self.name} records no donors: {self.report['reason']}")
        finally:
            self.engine.set_options(options)

    @property
    def report(self) -> dict[str, Any]:
        """Report of the last call.

        Raises:
            OptionError: the engine was not called.
        """
        report = self.engine.last_report
        if report is None:
            raise OptionError(f"{self.name} did not call its engine")
        return report

    def recomputed(self) -> float:
        """Return the recomputed share of the spans' token-layers in the last call.

        Raises:
            OptionError: the call did not reuse every span.
        """
        report = self.report
        if report["mode"] != "warm" or not all(span["hit"] for span in report["spans"]):
            raise OptionError(f"{self.name} did not reuse: {report['mode']}, {report['reason']}")
        share: float = report["token_layer_fraction"]
        return share

    def answer(self, question: Question) -> Tensor:
        """Compute the answer's logits with the engine's policy.

        Returns:
            float32 [prompts, positions, vocabulary]: predictions of the last ``positions`` tokens.
        """
        return self._logits(self.model, question)

    def exact(self, question: Question) -> Tensor:
        """Compute the answer's logits with the unmodified model; see ``answer``."""
        assert self.engine.explained is not None  # set by vlcache_fx.compile
        return self._logits(self.engine.explained, question)

    def _logits(self, run: Any, question: Question) -> Tensor:
        with torch.no_grad():
            result = run(**question.inputs, logits_to_keep=self.positions + 1)
        logits: Tensor = result.logits[:, -self.positions - 1 : -1]
        return logits.float()


def without_ids(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs for a model: marked passages are embeddings, and models take one of the two."""
    given = dict(inputs)
    if "inputs_embeds" in given:
        del given["input_ids"]
    return given

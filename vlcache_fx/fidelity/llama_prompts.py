"""Prompts with one item as the embeddings that a Llama decoder reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.compare import Comparison, compare
from vlcache_fx.fidelity.llama_rows import Item, LlamaRows
from vlcache_fx.fidelity.questions import Questions, make_prompt
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.runtime.requests.marked_spans import marked_spans


@dataclass(frozen=True)
class Embedded:
    """A prompt and its answer.

    Attributes:
        embeds: [tokens, hidden]; the answer is at the end.
        start, length: where the item is.
        answer: ids, int64 [tokens].
        last: number of positions to compare.
    """

    embeds: Tensor
    start: int
    length: int
    answer: Tensor
    last: int


class _ReachedError(Exception):
    """The decoder was reached."""


@torch.no_grad()
def embed(subject: Subject, rows: LlamaRows, source: Questions, question: Any) -> Embedded:
    """Compute what the decoder reads for a question, without running it.

    Raises:
        OptionError: the question is not about one item.
    """
    prepared = subject.prepare([make_prompt(source, question)])
    read: list[Tensor] = []

    def stop(_: Any, __: Any, given: dict[str, Any]) -> None:
        read.append(given["inputs_embeds"])
        raise _ReachedError

    handle = rows.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        assert subject.engine.explained is not None  # set by vlcache_fx.compile
        subject.engine.explained(**prepared.inputs)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    if "input_ids" in prepared.inputs:
        placeholder = subject.model.config.image_token_id
        at = (prepared.inputs["input_ids"][0] == placeholder).nonzero()[:, 0].tolist()
        spans = [(at[0], len(at))] if at and at[-1] - at[0] + 1 == len(at) else []
    else:
        spans = [(start, length) for _, start, length in marked_spans(prepared.inputs["inputs_embeds"])]
    if len(spans) != 1:
        raise OptionError(f"a prompt with {len(spans)} items: it must have one")
    (start, length), (answer,) = spans[0], prepared.answers
    return Embedded(read[0][0], start, length, answer, subject.positions)


def recorded(
    subject: Subject, rows: LlamaRows, source: Questions, question: Any
) -> tuple[Embedded, Item, Tensor]:
    """Compute a question in full: return the prompt, its item, and the exact logits."""
    new = embed(subject, rows, source, question)
    return (new, *rows.record(new.embeds, new.start, new.length, new.last))


def compared(exact: Tensor, reused: Tensor, new: Embedded) -> Comparison:
    """Compare logits, [last, vocabulary] each."""
    return compare(exact[None], reused[None], (new.answer,))[0]

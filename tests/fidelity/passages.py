"""A small Llama and passages of made-up words, as ``vlcache_fx.testing.smollm2`` has them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import vlcache_fx
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.testing.smollm2.passages import PASSAGE
from vlcache_fx.testing.smollm2.processor import PassageProcessor

FAMILIES = ("passage", "same")
WORDS, LAYERS = 40, 4


class WordTokenizer:
    """``w7`` -> 7; spaces are between words."""

    pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


@dataclass(frozen=True)
class Question:
    """See ``smollm2.Question``."""

    system_prompt: str
    images: tuple[str, ...]
    answer: str
    question_first: bool = False


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(1, WORDS, count))


def make_questions(split: str, family: str, count: int, seed: int = 0) -> list[Question]:
    rng = np.random.default_rng([seed, len(split), FAMILIES.index(family)])
    return [Question(words(rng, 5), (words(rng, 30),), words(rng, 2)) for _ in range(count)]


def ask_again(
    question: Question,
    rng: np.random.Generator,
    question_first: bool = False,
    system_words: int | None = None,
) -> Question:
    count = int(rng.integers(3, 12)) if system_words is None else system_words
    return dataclasses.replace(question, system_prompt=words(rng, count), question_first=question_first)


def build_prompt(question: Question) -> str:
    parts = ("w1", PASSAGE) if question.question_first else (PASSAGE, "w1")
    return f"{question.system_prompt} {parts[0]} {parts[1]} w2 "


def answer_text(answer: str) -> str:
    return answer


def load_model() -> Any:
    """Return a Llama with random weights, large enough for what stands in front to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False).train(False)


def load_subject() -> Subject:
    model = load_model()
    embedding: nn.Module = model.get_input_embeddings()
    processor = PassageProcessor(WordTokenizer(), embedding)
    compiled = vlcache_fx.compile(model, lowering="eager", dynamic=True, min_span_tokens=8)
    return Subject("passages", compiled, processor, positions=2)

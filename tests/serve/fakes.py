"""A model that answers at once, for tests of queues and threads."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GenerationConfig

from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.serve.job import Job
from vlcache_fx.serve.request import RequestSettings
from vlcache_fx.serve.row import Row
from vlcache_fx.serve.state import eos_token_ids, group_of

EOS = 99
BAD = 44
"""A prompt with this token fails."""


class CountingModel:
    """Continues a prompt by counting on from its last token.

    Attributes:
        batches: the prompts of each call, without padding.
        gate: closed, it holds every call back.
        steps: how many tokens each row got, at most.
    """

    def __init__(self) -> None:
        self.vlcache = ServingEngine(Options(lowering="eager"))
        self.batches: list[list[list[int]]] = []
        self.steps: list[int] = []
        self.settings: list[Any] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, *, generation_config: Any, stopping_criteria: Any
    ) -> Tensor:
        rows = zip(input_ids, attention_mask, strict=True)
        self.batches.append([row[mask.bool()].tolist() for row, mask in rows])
        self.settings.append(self.vlcache.settings.current)
        self.entered.set()
        assert self.gate.wait(30)
        if BAD in input_ids:
            raise RuntimeError("this prompt is bad")
        first = input_ids.shape[1]
        for _ in range(generation_config.max_new_tokens):
            follow = input_ids[:, -1:] + 1
            if generation_config.do_sample:
                follow = torch.randint(50, 90, follow.shape)
            input_ids = torch.cat([input_ids, follow], dim=1)
            if stopping_criteria(input_ids, None).all():
                break
        self.steps.append(input_ids.shape[1] - first)
        return input_ids


def make_job(
    *tokens: int,
    loop: asyncio.AbstractEventLoop,
    max_new_tokens: int = 3,
    settings: RequestSettings | None = None,
    sample: bool = False,
    seed: int | None = None,
    stops: tuple[str, ...] = (),
    queue: asyncio.Queue[Any] | None = None,
) -> Job:
    """A job with this prompt."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=sample, eos_token_id=EOS, pad_token_id=0
    )
    prompt = torch.tensor([tokens])
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    settings = settings or RequestSettings()
    row = Row(tokenizer(), max_new_tokens, eos_token_ids(config), stops=stops, queue=queue)
    group = None if seed is not None else group_of(inputs, config, settings)
    return Job(inputs, config, settings, group, row, loop, seed)


def tokenizer() -> Tokenizer:
    """One word per token: ``w5``."""
    return Tokenizer(models.WordLevel({f"w{index}": index for index in range(100)}, unk_token="w0"))

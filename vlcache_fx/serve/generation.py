"""Runs a batch of requests through a model."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vlcache_fx.errors import StoreError
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.serve.collate import collate
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.job import Job, flush

log = logging.getLogger("vlcache_fx.serve")


def generate(model: Any, jobs: Sequence[Job], sampling: threading.Lock) -> None:
    """Answer jobs of one group; each gets its tokens as they come, and its part of the engine's report.

    Args:
        model: the compiled model.
        jobs: what runs together.
        sampling: held while random numbers are drawn.
    """
    for job in jobs:
        job.start(len(jobs))
    engine = model.vlcache
    first = jobs[0]
    config = _config_of(jobs)
    inputs = collate([job.inputs for job in jobs], config.pad_token_id)
    settings = first.settings.with_own_salt() if first.settings.bypass else first.settings
    more = {"generation_mode": "text"} if hasattr(model, "has_talker") else {}
    try:
        with settings.using(engine), engine.reports() as reports, _random_numbers(first, sampling):
            criteria = StoppingCriteriaList([_Rows(jobs, reports)])
            model.generate(**inputs, **more, generation_config=config, stopping_criteria=criteria)
    finally:
        if settings.bypass:
            _forget(engine, settings.salt)
    for job in jobs:
        job.end()  # those that the model itself ended, such as at its longest length


class _Rows(StoppingCriteria):
    """Hands each row's token to its job, and ends the rows that are done."""

    def __init__(self, jobs: Sequence[Job], reports: Sequence[Any]) -> None:
        self._jobs, self._reports = jobs, reports
        self._is_first = True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        if self._is_first:
            self._is_first = False
            self._share_report()
        for job, token_id in zip(self._jobs, input_ids[:, -1].tolist(), strict=True):
            if not job.is_done:
                _take(job, token_id)
        flush(self._jobs)
        return torch.tensor([job.is_done for job in self._jobs], device=input_ids.device)

    def _share_report(self) -> None:
        """Give each job its part of the prefill's report: the only call so far."""
        if self._reports:
            report = self._reports[-1]
            for index, job in enumerate(self._jobs):
                job.report = report.of_sample(index)


def _take(job: Job, token_id: int) -> None:
    try:
        job.take(token_id)
    except Exception:
        # A token that one client's text cannot take must not end the answers of the others.
        log.exception("an answer failed")
        job.fail(RequestError(500, "the answer failed", code="model_failed"))


@contextmanager
def _random_numbers(job: Job, lock: threading.Lock) -> Iterator[None]:
    """Hold the lock where random numbers are drawn, and set the seed of a request that has one."""
    if not job.config.do_sample:
        yield
        return
    with lock:
        if job.seed is not None:
            torch.manual_seed(job.seed)
        yield


def _forget(engine: ServingEngine, salt: str | None) -> None:
    """Drop what requests with this salt have stored."""
    try:
        engine.clear(salt=salt)
    except StoreError as error:
        # Nobody can find it: the salt is gone. It costs room until it is evicted.
        log.warning("donors of a request with bypass are not dropped: %s", error)


def _config_of(jobs: Sequence[Job]) -> GenerationConfig:
    """One configuration for jobs of a group: the longest of their answers. Rows end by themselves."""
    config = copy.deepcopy(jobs[0].config)
    config.max_new_tokens = max(job.config.max_new_tokens for job in jobs)
    config.pad_token_id = _pad_token_id(config)
    return config


def _pad_token_id(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = config.eos_token_id
    return int(eos[0] if isinstance(eos, list) else eos or 0)

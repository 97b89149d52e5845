"""The batchers of a server's models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState

from vlcache_fx.serve.batching import Batcher
from vlcache_fx.serve.collate import signature
from vlcache_fx.serve.exchange import Exchange
from vlcache_fx.serve.job import Job
from vlcache_fx.serve.metrics import ServeMetrics
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.request import RequestSettings
from vlcache_fx.serve.row import Row


class ServeState(GenerationState):
    """One batcher per model, instead of transformers' managers.

    Args:
        options: sizes and times of batches and queues.
        metrics: counters.
    """

    def __init__(self, options: ServeOptions, metrics: ServeMetrics) -> None:
        super().__init__()
        self._options, self._metrics = options, metrics
        self._batchers: dict[str, Batcher] = {}
        self._sampling = threading.Lock()
        self._guard = threading.Lock()

    def batcher(self, name: str, model: Any) -> Batcher:
        """The batcher of a model; its thread starts with the first call."""
        with self._guard:
            if name not in self._batchers:
                self._batchers[name] = Batcher(
                    name,
                    model,
                    batch_size=self._options.batch_size,
                    batch_tokens=self._options.batch_tokens or default_batch_tokens(model.device.type),
                    batch_wait_ms=self._options.batch_wait_ms,
                    max_waiting=self._options.max_waiting,
                    sampling=self._sampling,
                    metrics=self._metrics,
                )
            return self._batchers[name]

    @property
    def is_alive(self) -> bool:
        """Whether the threads of all batchers run."""
        with self._guard:
            return all(batcher.is_alive for batcher in self._batchers.values())

    def shutdown(self) -> None:
        """Stop all threads; what they answer is cut off."""
        with self._guard:
            batchers = list(self._batchers.values())
        for batcher in batchers:
            batcher.stop(self._options.shutdown_timeout_s)


def default_batch_tokens(device_type: str) -> int:
    """Tokens from which more of them take as much longer: those that vLLM computes together by default."""
    return 2048 if device_type == "cpu" else 8192


class RequestManager(BaseGenerateManager):
    """Transformers' interface for generating, for one request.

    Args:
        batcher: the queue of its model.
        settings: how it reuses donors.
        exchange: its HTTP exchange: when the client goes away, so does the job.
        stops: stop strings.
        seed: seed of the random numbers.
        pictures: digests of the prompt's pictures.

    Attributes:
        job: the job, once it is submitted.
        answer: what ``generate_non_streaming`` returned; None before.
    """

    def __init__(
        self,
        batcher: Batcher,
        settings: RequestSettings,
        exchange: Exchange,
        stops: tuple[str, ...] = (),
        seed: int | None = None,
        pictures: tuple[str, ...] = (),
    ) -> None:
        self._batcher, self._settings, self._exchange = batcher, settings, exchange
        self.stops, self._seed, self._pictures = stops, seed, pictures
        self.job: Job | None = None
        self.answer: tuple[str, int, list[int]] | None = None

    def generate_streaming(
        self,
        model: Any,  # noqa: ARG002 - the batcher has it
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,  # noqa: ARG002
        response_parser: Any = None,
    ) -> Any:
        """Submit the request; return the queue of its text, and what counts and cancels."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        job = self._submit(self.job_for(processor, inputs, gen_config, queue, response_parser))
        return queue, _Streamer(self._batcher, job)

    async def generate_non_streaming(
        self,
        model: Any,  # noqa: ARG002
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,  # noqa: ARG002
    ) -> tuple[str, int, list[int]]:
        """Submit the request and wait; return text, tokens of the prompt, and tokens of the answer.

        A second call returns the same answer.
        """
        if self.answer is None:
            job = self._submit(self.job_for(processor, inputs, gen_config))
            await job.finished
            text = processor.decode(job.row.token_ids, skip_special_tokens=True)
            self.answer = text, job.prompt_tokens, job.row.token_ids
        return self.answer

    def stop(self) -> None:
        """Nothing to stop: the batcher belongs to the server."""

    def job_for(
        self,
        processor: Any,
        inputs: Mapping[str, Any],
        config: GenerationConfig,
        queue: asyncio.Queue[Any] | None = None,
        parser: Any = None,
    ) -> Job:
        """The job, not yet submitted."""
        loop = asyncio.get_running_loop()
        tokenizer = getattr(processor, "tokenizer", processor)
        row = Row(
            tokenizer._tokenizer,
            int(config.max_new_tokens or 1),
            eos_token_ids(config),
            stops=self.stops,
            queue=queue,
            parser=parser,
        )
        group = None if self._seed is not None else group_of(inputs, config, self._settings)
        job = Job(inputs, config, self._settings, group, row, loop, self._seed, self._pictures)
        job.arrived_s = self._exchange.arrived_s
        return job

    def _submit(self, job: Job) -> Job:
        self.job = job
        self._batcher.submit(job)
        self._exchange.on_gone(lambda: self._batcher.cancel(job))
        return job


class _Streamer:
    """What transformers' handlers ask of a streamer."""

    def __init__(self, batcher: Batcher, job: Job) -> None:
        self._batcher, self._job = batcher, job

    @property
    def total_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self._job.row.total_tokens

    def cancel(self) -> None:
        """End the answer."""
        self._batcher.cancel(self._job)


def group_of(
    inputs: Mapping[str, Any], config: GenerationConfig, settings: RequestSettings
) -> Hashable | None:
    """What must be equal for requests to run together; None for one that runs alone."""
    kinds = signature(inputs)
    sampling = config.to_diff_dict()
    sampling.pop("max_new_tokens", None)  # each row has its own
    return None if kinds is None else (kinds, repr(sorted(sampling.items())), settings)


def eos_token_ids(config: GenerationConfig) -> set[int]:
    """The tokens that end an answer."""
    eos = config.eos_token_id
    return set() if eos is None else set(eos) if isinstance(eos, list) else {int(eos)}

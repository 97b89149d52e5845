"""Computes prompts with reused items in full while no request runs, so that donors learn from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.keys.numerics import numerics
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.in_flight import Claim
from vlcache_fx.runtime.requests.host_inputs import on_host
from vlcache_fx.runtime.requests.request import Request
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.decoder import DecoderSpec
from vlcache_fx.spec.program import ProgramSpec
from vlcache_fx.spec.slots import StoredSlot

LARGEST_COPY_BYTES = 256 << 20
"""Most bytes of inputs that are kept of a request; larger ones are left out."""


class IdleRefiner:
    """Refines the donors of one decoder graph in idle time, see the option ``idle_refinement``.

    Args:
        spec: spec of the graph.
        engine: has the idle time.
        cold: spec of the cold program.
        device: its device.
        weights: returns the fingerprints of the weights among a graph's inputs at present.
        compute: runs the cold program for a request without donors; returns its results and plans, None if
            it fails.
        admit: stores what it recorded.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        engine: ServingState,
        cold: ProgramSpec,
        device: torch.device,
        *,
        weights: Callable[[Sequence[Any]], tuple[str, str]],
        compute: Callable[[Request], tuple[Sequence[Any], Sequence[Plan]] | None],
        admit: Callable[[Request, Sequence[StoredSlot], Sequence[Any], Sequence[Plan]], None],
    ) -> None:
        self._spec, self._engine, self._cold, self._device = spec, engine, cold, device
        self._weights, self._compute, self._admit = weights, compute, admit

    def offer(self, request: Request) -> None:
        """Compute the prompt of a warm request again when no request runs, if a donor would learn from it."""
        most = self._engine.options.donor_contexts
        learns = request.ignores_past and any(
            span.hit and span.start >= sample.prefix and span.contexts < most
            for sample in request.samples
            for span in sample.spans
        )
        if not self._engine.idle.share or not learns or self._copied_bytes(request) > LARGEST_COPY_BYTES:
            return
        own, state = self._copied(request), numerics(self._device.type)

        def is_current() -> bool:
            """Keys cover the weights and numeric modes of the request: rows of others must not get them."""
            return self._weights(own.args)[1] == own.weights and numerics(self._device.type) == state

        def compute() -> None:
            if not is_current():
                return
            # Caches to which the program writes. It reads nothing of them: the request ignores the past.
            written = {
                index: torch.zeros_like(own.args[index], device=self._device) for index in self._cold.in_place
            }
            args = [written.get(index, value) for index, value in enumerate(own.args)]
            found = self._compute(replace(own, args=args))
            if found is not None and is_current():
                self._admit(own, self._cold.recorded, *found)
                self._engine.count("idle_refinements")

        self._engine.idle.offer(" ".join(span.key for span in request.spans), compute)

    def _copied(self, request: Request) -> Request:
        """Return the request without donors, with tensors of its own: the caller may write to its tensors."""
        copied, written = self._copied_inputs(), self._cold.in_place
        args = [
            value.to("meta") if index in written else _copy(value) if index in copied else value
            for index, value in enumerate(request.args)
        ]
        samples = tuple(
            replace(sample, by_token=tuple(_copy(value) for value in sample.by_token))
            for sample in request.without_donors().samples
        )
        return replace(
            request,
            args=args,
            host_args=on_host(args, self._spec.host_inputs),
            samples=samples,
            positions=_copy(request.positions),
            clock=Clock(),
            claim=Claim(),
        )

    def _copied_inputs(self) -> set[int]:
        return {*self._spec.data} - {*self._cold.in_place}

    def _copied_bytes(self, request: Request) -> int:
        values = [request.args[index] for index in self._copied_inputs()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value

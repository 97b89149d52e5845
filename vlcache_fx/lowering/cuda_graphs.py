"""Replays a program as a CUDA graph for requests whose sizes come again.

A warm call computes few rows, so on a fast GPU launching its kernels can take longer than running them. A
CUDA graph launches them at once, but has fixed sizes and addresses. Sizes are those of the request, not
padded ones (its key-value cache is handed out), so it pays where prompts of one length ask about one image
again and again.

Small inputs are copied to fixed places before each replay. Weights and whatever is large, donors above all,
are read where they lie, and belong to the key.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlcache_fx.runtime.programs.lowered import Lowered, PendingTensor

__all__ = ["CudaGraphs", "record_cuda_graph"]

_log = logging.getLogger(__name__)

COPIED_BYTES = 1 << 20
"""Inputs up to this size are copied; larger ones are read where they lie."""

Results: TypeAlias = tuple[Any, ...]
Recorder: TypeAlias = Callable[[Lowered, Sequence[Any]], tuple[Callable[[], object], Results]]


def record_cuda_graph(run: Lowered, args: Sequence[Any]) -> tuple[Callable[[], object], Results]:
    """``run(args)`` as a graph: what replays it, and the results, which every replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(args)
    return graph.replay, results


@dataclass(frozen=True)
class _Recording:
    places: dict[int, Tensor]
    replay: Callable[[], object]
    results: Results


class CudaGraphs:
    """A lowered program that records itself where a request's sizes have come ``after`` times.

    Args:
        run: the program; safe to run twice with one set of arguments.
        after: calls of one form that run plainly; at least one, so that everything is compiled and loaded.
        limit: recordings kept, each with the memory of its results; the least recently used go first.
        record: makes a recording.
        in_place: indices of inputs that the program writes to, whatever their size: not to a copy of them.
    """

    def __init__(
        self,
        run: Lowered,
        *,
        after: int = 2,
        limit: int = 8,
        record: Recorder = record_cuda_graph,
        in_place: Collection[int] = (),
    ) -> None:
        self._in_place = frozenset(in_place)
        self._run, self._after, self._limit, self._record = run, max(after, 1), limit, record
        self._calls: OrderedDict[Any, int] = OrderedDict()
        self._recordings: OrderedDict[Any, _Recording | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, args: Sequence[Any]) -> Results:
        """See ``Lowered``."""
        if any(isinstance(value, PendingTensor) for value in args):
            return self._run(args)
        key = (_stream(), *map(self._form, range(len(args)), args))
        with self._lock:
            if key in self._recordings:
                self._recordings.move_to_end(key)
                return self._replay(self._recordings[key], args)
            self._calls[key] = self._calls.pop(key, 0) + 1
            if self._calls[key] > self._after:
                del self._calls[key]
                self._recordings[key] = recording = self._recorded(args)
                if len(self._recordings) > self._limit:
                    self._recordings.popitem(last=False)
                return self._replay(recording, args)
            if len(self._calls) > 64 * self._limit:
                self._calls.popitem(last=False)
        return self._run(args)

    def _is_copied(self, index: int, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and not isinstance(value, torch.nn.Parameter)
            and value.nbytes <= COPIED_BYTES
            and index not in self._in_place
        )

    def _form(self, index: int, value: Any) -> Any:
        if type(value) is torch.nn.Parameter:
            # Guards fix all else. A model has hundreds, and each further look takes a microsecond.
            return value.data_ptr()
        if not isinstance(value, Tensor):
            return value
        address = None if self._is_copied(index, value) else value.data_ptr()
        return (address, value.dtype, value.device, tuple(value.shape), value.stride())

    def _recorded(self, args: Sequence[Any]) -> _Recording | None:
        places = {index: value.clone() for index, value in enumerate(args) if self._is_copied(index, value)}
        fixed = [places.get(index, value) for index, value in enumerate(args)]
        try:
            replay, results = self._record(self._run, fixed)
        except RuntimeError as error:
            _log.warning("a program cannot be recorded as a CUDA graph, it runs plainly: %s", error)
            return None
        return _Recording(places, replay, results)

    def _replay(self, recording: _Recording | None, args: Sequence[Any]) -> Results:
        if recording is None:
            return self._run(args)
        _copy([(place, args[index]) for index, place in recording.places.items()])
        recording.replay()
        given = [torch.empty_like(one) if isinstance(one, Tensor) else one for one in recording.results]
        _copy([pair for pair in zip(given, recording.results, strict=True) if isinstance(pair[0], Tensor)])
        return tuple(given)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensors into the first ones, with a kernel per dtype rather than per tensor."""
    by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in pairs:
        by_type[target.dtype].append((target, source))
    for group in by_type.values():
        targets, sources = zip(*group, strict=True)
        torch._foreach_copy_(targets, sources)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream) if torch.cuda.is_available() else 0

"""Record and replay programs as CUDA graphs, for requests whose sizes repeat.

A warm call computes few rows, so on a fast GPU, launching its kernels can take longer than running them. A
CUDA graph launches all kernels at once, but has fixed sizes and addresses. Sizes are not padded, since the
caller gets the KV cache. CUDA graphs therefore help where many prompts of equal length ask about an image.

Small inputs are copied to fixed buffers before each replay. Weights and large inputs such as donors are read
from their own addresses, which are part of the key.
"""

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
"""Largest input that is copied to a fixed buffer; larger inputs are read from their own address."""

Results: TypeAlias = tuple[Any, ...]
Recorder: TypeAlias = Callable[[Lowered, Sequence[Any]], tuple[Callable[[], object], Results]]


def record_cuda_graph(run: Lowered, args: Sequence[Any]) -> tuple[Callable[[], object], Results]:
    """Record ``run(args)``; return the function that replays it, and the results, which replays overwrite."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(args)
    return graph.replay, results


@dataclass(frozen=True)
class _Recording:
    buffers: dict[int, Tensor]
    replay: Callable[[], object]
    results: Results


class CudaGraphs:
    """A lowered program that is recorded once arguments of the same layout have come ``after`` times.

    Args:
        run: the program; two runs with the same arguments must be safe.
        after: number of calls per layout before recording; at least one, so that all code is compiled.
        limit: number of recordings kept, each with memory for its results; the least recently used are
            dropped.
        record: function that records.
        in_place: indices of inputs that the program writes to; they are never copied.
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
        key = (_stream(), *map(self._layout, range(len(args)), args))
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

    def _layout(self, index: int, value: Any) -> Any:
        if type(value) is torch.nn.Parameter:
            # Guards fix the rest. A model has hundreds of parameters, and each attribute takes a microsecond.
            return value.data_ptr()
        if not isinstance(value, Tensor):
            return value
        address = None if self._is_copied(index, value) else value.data_ptr()
        return (address, value.dtype, value.device, tuple(value.shape), value.stride())

    def _recorded(self, args: Sequence[Any]) -> _Recording | None:
        buffers = {index: value.clone() for index, value in enumerate(args) if self._is_copied(index, value)}
        fixed = [buffers.get(index, value) for index, value in enumerate(args)]
        try:
            replay, results = self._record(self._run, fixed)
        except RuntimeError as error:
            _log.warning("vlcache: running a program without a CUDA graph, recording failed: %s", error)
            return None
        return _Recording(buffers, replay, results)

    def _replay(self, recording: _Recording | None, args: Sequence[Any]) -> Results:
        if recording is None:
            return self._run(args)
        _copy([(buffer, args[index]) for index, buffer in recording.buffers.items()])
        recording.replay()
        results = [
            torch.empty_like(value) if isinstance(value, Tensor) else value for value in recording.results
        ]
        _copy([pair for pair in zip(results, recording.results, strict=True) if isinstance(pair[0], Tensor)])
        return tuple(results)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first, with one kernel per dtype."""
    by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in pairs:
        by_type[target.dtype].append((target, source))
    for group in by_type.values():
        targets, sources = zip(*group, strict=True)
        torch._foreach_copy_(targets, sources)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream) if torch.cuda.is_available() else 0

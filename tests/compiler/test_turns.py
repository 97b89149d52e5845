"""Threads that call one model at once: each graph is compiled once, and nothing runs twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import Pair, distance, own_compiler_state, with_api

THREADS = 4


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def at_once(call: Callable[[int], Any]) -> list[Any]:
    """Return the results of a call in threads that start at the same time."""
    together = threading.Barrier(THREADS)

    def begin(index: int) -> Any:
        together.wait()
        return call(index)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def check(pair: Pair, prompts: list[Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        expected = [pair.reference(**prompt) for prompt in prompts]

    def call(index: int) -> float:
        with torch.no_grad():
            return distance(pair.model(**prompts[index]), expected[index])

    assert max(at_once(call)) <= 1e-5
    assert pair.engine.refusals == []


def test_each_graph_is_compiled_once() -> None:
    pair = with_api(tiny_vlm(num_layers=1, last_only=False), policy="full")
    with_images = [tiny_vlm_inputs(3 + index, 5, [(20, 0)]) for index in range(THREADS)]
    text = [tiny_vlm_inputs(20 + index, 5, []) for index in range(THREADS)]
    for number, prompts in enumerate((with_images, text, with_images), start=1):
        check(pair, prompts)
        # Two graphs, with and without images, in any order of threads.
        assert len(_debug_get_cache_entry_list(TinyVlm.forward.__code__)) == min(number, 2)


class Noting(TinyVlm):
    """Runs Python that Dynamo cannot trace before its first graph."""

    noted: list[int]

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:  # type: ignore[override]
        self.note(input_ids.shape[1])
        return super().forward(input_ids, pixel_values)

    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def note(self, length: int) -> None:
        self.noted.append(length)


def test_python_side_effects_happen_once() -> None:
    model: Any = tiny_vlm(num_layers=1, last_only=False)
    model.__class__, model.noted = Noting, []
    pair = with_api(model, policy="full")
    check(pair, [tiny_vlm_inputs(3 + index, 5, [(20, 0)]) for index in range(THREADS)])
    check(pair, [tiny_vlm_inputs(20 + index, 5, []) for index in range(THREADS)])
    assert len(model.noted) == 2 * THREADS


def test_error_in_first_call_releases_others() -> None:
    pair = with_api(tiny_vlm(num_layers=1, last_only=False))
    with pytest.raises((RuntimeError, TypeError)), torch.no_grad():
        pair.model(input_ids=None)
    check(pair, [tiny_vlm_inputs(3, 5, [(20, 0)])] * THREADS)

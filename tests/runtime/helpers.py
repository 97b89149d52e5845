"""Compiled models with their unmodified copies, and helpers to compare them."""

from __future__ import annotations

import contextvars
import copy
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import vlcache_fx
from vlcache_fx.backend import engine_for
from vlcache_fx.compiler.engine import Engine

_serial = itertools.count()


@dataclass
class Pair:
    """A compiled model, an unmodified copy of it (the oracle), and the engine."""

    model: Any
    reference: Any
    engine: Engine

    @property
    def report(self) -> dict[str, Any]:
        """The last report."""
        report = self.engine.last_report
        assert report is not None
        return report

    def both(self, **inputs: Any) -> tuple[Any, Any]:
        """Return the outputs of the compiled and of the unmodified model."""
        with torch.no_grad():
            return self.model(**inputs), self.reference(**inputs)

    def run(self, **inputs: Any) -> tuple[float, dict[str, Any]]:
        """Return the largest error of the logits (0.0: bitwise equal), and the report."""
        got, expected = self.both(**inputs)
        return distance(got, expected), self.report


def with_api(model: nn.Module, **options: Any) -> Pair:
    """Through ``vlcache_fx.compile``; eager and dynamic by default."""
    reference = copy.deepcopy(model)
    options = {"lowering": "eager", "dynamic": True} | options
    compiled = vlcache_fx.compile(model, **options)
    return Pair(compiled, reference, compiled.vlcache)


def with_backend(model: nn.Module, dynamic: bool | None = True, **options: Any) -> Pair:
    """Through ``torch.compile(backend="vlcache")``; eager and dynamic by default."""
    reference = copy.deepcopy(model)
    # A store of its own: equal options share an engine.
    options = {"lowering": "eager", "store": vlcache_store()} | options
    model.forward = torch.compile(model.forward, backend="vlcache", options=options, dynamic=dynamic)
    return Pair(model, reference, engine_for(options))


def vlcache_store(capacity_bytes: int = 1 << 30) -> Any:
    """A new store in memory."""
    from vlcache_fx.store import MemoryStore

    return MemoryStore(capacity_bytes)


def logits(output: Any) -> Tensor:
    """Return the logits of a model's output."""
    return output if isinstance(output, Tensor) else output.logits


def distance(got: Any, expected: Any) -> float:
    """Return the largest difference of two outputs' logits."""
    a, b = logits(got), logits(expected)
    assert a.shape == b.shape
    assert a.isfinite().all()
    return float((a - b).abs().max())


def cache_distance(got: Any, expected: Any) -> float:
    """Return the largest difference of two KV caches, which must have the same layers and shapes."""
    assert len(got.layers) == len(expected.layers) > 0
    worst = 0.0
    for a, b in zip(got.layers, expected.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert a.values.shape == b.values.shape
        worst = max(worst, float((a.keys - b.keys).abs().max()), float((a.values - b.values).abs().max()))
    return worst


@contextmanager
def settings_of(engine: Engine, **changes: Any) -> Iterator[None]:
    """Use other options in the body, without a new compilation."""
    options = engine.options
    engine.set_options(replace(options, **changes))
    try:
        yield
    finally:
        engine.set_options(options)


@contextmanager
def own_compiler_state() -> Iterator[None]:
    """Reset Dynamo before and after, with a limit for many models of one class."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
    torch._dynamo.reset()


def unique_salt() -> str:
    """Return a salt that no other test uses."""
    return f"test-{next(_serial)}"


def hits(report: dict[str, Any]) -> list[bool]:
    """Return per span whether its donor was found."""
    return [span["hit"] for span in report["spans"]]


def keys(report: dict[str, Any]) -> list[str]:
    """Return the key of each span."""
    return [span["key"] for span in report["spans"]]


def ask_at_once(pair: Pair, prompts: Sequence[Mapping[str, Tensor]], tolerance: float = 1e-5) -> None:
    """Call the model from a thread per prompt, and check every result."""
    begin = threading.Barrier(len(prompts))

    def ask(inputs: Mapping[str, Tensor]) -> float:
        begin.wait(60)
        with torch.no_grad():
            return distance(pair.model(**inputs), pair.reference(**inputs))

    contexts = [contextvars.copy_context() for _ in prompts]  # with settings of Dynamo
    with ThreadPoolExecutor(len(prompts)) as pool:
        work = [pool.submit(one.run, ask, inputs) for one, inputs in zip(contexts, prompts, strict=True)]
        assert max(one.result() for one in work) <= tolerance

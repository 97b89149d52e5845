"""The models of a worker, their unmodified copies, and the store that they share."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.bench.stress.audit import AuditedStore, Ledger
from vlcache_fx.bench.stress.opening import open_disturbed
from vlcache_fx.bench.stress.requests import Call, Prompt, build_model, make_pool
from vlcache_fx.bench.stress.settings import StressSettings
from vlcache_fx.errors import StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store import MemoryStore


@dataclass(frozen=True)
class Answer:
    """The outcome of a call.

    Attributes:
        mode: as in the report.
        seconds: duration of the call.
        difference: largest difference of the logits from the unmodified model's; None if not compared.
        wrong: what is wrong; empty if nothing is.
    """

    mode: str
    seconds: float
    difference: float | None
    wrong: str = ""


class Fleet:
    """Models that share a store, with an oracle for each. Safe in threads.

    ``warm_up`` compiles everything with a store of its own; ``open`` then begins to use the disturbed store,
    in this process or in one that was forked from it.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: StressSettings) -> None:
        self._settings, self._lock, self._label, self._openings = settings, threading.Lock(), "", 0
        self._on_fault: Callable[[str], None] = _ignore
        self._ledger = Ledger(Path(settings.ledger))
        self._store = AuditedStore(MemoryStore(settings.capacity_bytes), self._ledger)
        self._oracle: dict[Prompt, Tensor] = {}
        self._compiled: dict[str, Any] = {}
        for name in settings.models:
            model = build_model(name)
            reference = copy.deepcopy(model)
            with torch.no_grad():
                for prompt in make_pool(settings.seed, (name,)):
                    self._oracle[prompt] = _logits(reference(**prompt.inputs()))
            self._compiled[name] = vlcache_fx.compile(
                model, lowering="eager", dynamic=True, store=self._store
            )

    def warm_up(self) -> None:
        """Compile the programs of all prompts: with and without a probe, and where one image is known."""
        for prompt, policy in itertools.product(self._oracle, ("full", "cacheblend")):
            model = self._compiled[prompt.model]
            model.vlcache.clear()
            with torch.no_grad():
                model(**replace(prompt, images=prompt.images[:1]).inputs())
            for _ in range(2):
                self.answer(Call(prompt, policy, 0.1, ""))

    def use(self, settings: StressSettings) -> None:
        """Use other settings when the store is opened next; models and ledger stay."""
        self._settings = settings

    def open(self, label: str, on_fault: Callable[[str], None]) -> None:
        """Use the disturbed store from now on.

        Args:
            label: names the worker, for the seed of its faults.
            on_fault: called with the name of each fault inside the store.
        """
        self._label, self._on_fault = label, on_fault
        self._reopen()

    def answer(self, call: Call) -> Answer:
        """Make a call, and check its answer."""
        model, store = self._compiled[call.prompt.model], self._store
        if call.reopens:
            self._reopen()
        with torch.no_grad(), model.vlcache.using(policy=call.policy, budget=call.budget, salt=call.salt):
            if call.clears:
                with contextlib.suppress(StoreError):  # a tier that fails while it clears
                    model.vlcache.store.clear(
                        Selection(salt=model.vlcache.key_salt) if call.clears == "salt" else None
                    )
            start = time.perf_counter()
            logits = _logits(model(**call.prompt.inputs()))
            seconds = time.perf_counter() - start
        report = model.vlcache.last_report
        wrong = [f"bytes of {key} that nobody stored" for key in store.wrong_keys()]
        wrong += _incoherent(report, call.prompt)
        difference = None
        if logits.shape != self._oracle[call.prompt].shape or not logits.isfinite().all():
            wrong.append(f"logits of shape {tuple(logits.shape)}, or not finite")
        elif _is_exact(call, report):
            difference = float((logits - self._oracle[call.prompt]).abs().max())
            if difference > self._settings.tolerance:
                wrong.append(f"logits differ by {difference:.3g}")
        return Answer(report["mode"], seconds, difference, "; ".join(wrong))

    def bounds(self) -> list[tuple[str, int, int]]:
        """Return name, used bytes and bound of the store and of each tier."""
        stats = self._store.stats()
        return [(tier.tier, tier.used_bytes, tier.capacity_bytes) for tier in (stats, *stats.tiers)]

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _reopen(self) -> None:
        with self._lock:
            old, self._store = self._store, self._open_store()
            for model in self._compiled.values():
                model.vlcache.store = self._store
        old.close()

    def _open_store(self) -> AuditedStore:
        self._openings += 1
        label = f"{self._settings.seed}-{self._label}-{self._openings}"
        return AuditedStore(open_disturbed(self._settings, label, self._on_fault), self._ledger)


def _ignore(fault: str) -> None:
    """Take no notice."""


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _is_exact(call: Call, report: Any) -> bool:
    """Return whether the answer must be the unmodified model's."""
    if call.policy == "full" or report["mode"] != "warm":
        return True
    ends = [span["start"] + span["length"] for span in report["spans"]]
    return bool(report["prefix_tokens"] >= max(ends))


def _incoherent(report: Any, prompt: Prompt) -> list[str]:
    """Return what in a report contradicts itself or the prompt."""
    found = []
    if report["mode"] == "warm" and not any(span["hit"] for span in report["spans"]):
        found.append("a warm report without a hit")
    if report["mode"] != "bypass" and len(report["spans"]) != len(prompt.images):
        found.append(f"a report with {len(report['spans'])} spans")
    if report["mode"] == "bypass":
        found.append(f"bypassed: {report['reason']}")
    if report["mode"] == "cold" and any(span["miss_reason"] is None for span in report["spans"]):
        found.append("a cold report without a reason for a miss")
    return found

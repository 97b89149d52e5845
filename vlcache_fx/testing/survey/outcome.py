"""Tries out a family with ``vlcache_fx.compile`` and with the backend."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import vlcache_fx
from vlcache_fx.backend import engine_for
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.survey.families import FamilyModel, build_family, known_families
from vlcache_fx.testing.survey.prompts import NoImagesError, image_prompt

ENTRIES = ("vlcache_fx.compile", "torch.compile")
NEW_TOKENS = 3
TOLERANCE = 1e-4
"""Maximum difference of logits relative to the largest logit: rounding depends on shapes."""

OPTIONS: dict[str, Any] = {"lowering": "eager", "min_span_tokens": 2, "budget": 0.1, "policy": "uniform"}
STATIC_FIRST = frozenset({"gemma4"})
"""Families that are traced with static lengths first: with symbolic lengths, their check of the number of
features contradicts torch's constraints."""
FORWARD_ALONE = frozenset({"blip", "blip-2", "diffusion_gemma", "instructblip", "instructblipvideo", "pi0"})
"""Families whose ``generate()`` never calls ``forward``, but parts of the model: calls of ``forward`` are
compared."""

COMPILED_PARTS = {"diffusion_gemma": "model.encoder", "kosmos-2": "text_model"}
"""Part that computes the prompt, and is compiled instead of the whole model: the rest computes no prompt."""


SKIPPED = re.compile(r"frame skipped: (\w+) \(\S*?([^/\s]+\.py) line")
"""What Dynamo counts where a loop breaks the graph."""


class SurveyError(Exception):
    """A compiled model returned another answer than the unmodified model, or a wrong report."""


@dataclass(frozen=True)
class Outcome:
    """Results of a family.

    Attributes:
        model_type: the family's model type.
        model_class: its class in transformers.
        results: per entry ``reuse``, ``exact reuse`` (cross-attention), or ``refused: <reason>``, and how far
            the reuse goes if it is less than elsewhere; empty if the small model cannot be built or run.
        detail: reason of a refusal or failure.
    """

    model_type: str
    model_class: str
    results: dict[str, str]
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)


def try_family(model_type: str, entries: tuple[str, ...] = ENTRIES) -> Outcome:
    """Build the family's small model and generate: with a new image, a moved image, and a smaller budget.

    If all rows are recomputed, answers are compared with the unmodified model: token ids and logits of
    prefill and decoding steps.

    Raises:
        SurveyError: an answer differs.
    """
    name = known_families()[model_type]
    try:
        family = build_family(model_type)
        _answer(family, image_prompt(family, 5, 7, image=1))
    except NoImagesError as error:
        return Outcome(model_type, name, {}, str(error))
    except Exception as error:  # noqa: BLE001 - any error of the family's code
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(model_type, name, {}, detail[:200])
    results, details = {}, []
    for entry in entries:
        results[entry], detail = _try_entry(family, entry)
        details += [detail] if detail and detail not in details else []
    return Outcome(model_type, name, results, "; ".join(details))


def _try_entry(family: FamilyModel, entry: str) -> tuple[str, str]:
    with _quiet_compiler():
        compiled = FamilyModel(family.model_type, copy.deepcopy(family.model), family.special)
        dynamic = None if family.model_type in STATIC_FIRST else True
        part = compiled.model.get_submodule(COMPILED_PARTS.get(family.model_type, ""))
        engine = _compile(part, entry, dynamic)
        # Said of how far the reuse goes, where that is less than elsewhere.
        scope = " of `forward` alone" if family.model_type in FORWARD_ALONE else ""
        # No length equals a width of the small models: such an input would be part of keys as a whole, and
        # its item could not move.
        first = image_prompt(family, 5, 9, image=1)
        moved = image_prompt(family, 9, 6, image=1, text=1)
        with engine.using(policy="full"):
            mode = _mode(engine, lambda: _compare(family, compiled, first))
            if mode == "bypass":
                _compare(family, compiled, moved)
                return _refused(engine)
            _expect(engine, mode, "cold")
            mode = _mode(engine, lambda: _compare(family, compiled, moved))
            if mode == "cold" and _report(engine)["reason_code"] == "other_positions":
                scope += " at equal offsets"
                equal = image_prompt(family, 5, 6, image=1, text=1)
                mode = _mode(engine, lambda: _compare(family, compiled, equal))
            elif mode == "cold" and _report(engine)["reason_code"] == "other_text":  # images see the question
                with engine.using(policy="none"):
                    mode = _mode(engine, lambda: _compare(family, compiled, moved))
                _expect(engine, mode, "warm")
                return f"exact reuse{scope} of equal prompts", ""
            elif mode == "cold" and not _report(engine)["spans"]:  # the encoder sees the text as well
                scope += " of equal prompts"
                mode = _mode(engine, lambda: _compare(family, compiled, moved))
            _expect(engine, mode, "warm")
        if not _report(engine)["spans"]:
            return f"exact reuse{scope}", ""
        again = image_prompt(family, 5 if scope.endswith("offsets") else 7, 8, image=1, text=2)
        mode = _mode(engine, lambda: _answer(compiled, again))
        _expect(engine, mode, "warm")
        if not 0 < _report(engine)["token_layer_fraction"] < 1:
            raise SurveyError(f"{family.model_type}: {_report(engine)['token_layer_fraction']} recomputed")
        return f"reuse{scope}", ""


def _compile(model: Any, entry: str, dynamic: bool | None) -> Engine:
    if entry == "vlcache_fx.compile":
        engine: Engine = vlcache_fx.compile(model, dynamic=dynamic, **OPTIONS).vlcache
        return engine
    options = OPTIONS | {"store": MemoryStore(1 << 28)}  # equal options share an engine
    model.forward = torch.compile(model.forward, backend="vlcache", options=options, dynamic=dynamic)
    return engine_for(options)


def _answer(family: FamilyModel, prompt: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return logits of the prefill, and of the decoding steps where the family decodes, and tokens."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        if family.model_type in FORWARD_ALONE:
            logits = family.model(**prompt).logits
            return (logits,), logits.argmax(-1)
        found = family.model.generate(**prompt, **settings, return_dict_in_generate=True, output_logits=True)
        return found.logits, found.sequences


def _compare(family: FamilyModel, compiled: FamilyModel, prompt: dict[str, Any]) -> None:
    want, want_tokens = _answer(family, dict(prompt))
    got, tokens = _answer(compiled, dict(prompt))
    for ours, theirs in zip(got, want, strict=True):
        off, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if not off <= TOLERANCE * max(scale, 1.0):
            raise SurveyError(f"{family.model_type}: logits are off by {off:.2g}, the largest is {scale:.2g}")
    if not torch.equal(tokens, want_tokens):
        raise SurveyError(f"{family.model_type}: tokens differ")


def _report(engine: Engine) -> dict[str, Any]:
    report = engine.last_report
    if report is None:
        raise SurveyError("no prefill was reported")
    return report


def _mode(engine: Engine, call: Callable[[], object]) -> str:
    """Return how the graphs of ``call`` ran; one that was cold decides, since decoding steps may be warm."""
    before = engine.stats()["calls"]
    call()
    after = engine.stats()["calls"]
    return next((mode for mode in ("cold", "warm") if after[mode] > before[mode]), "bypass")


def _expect(engine: Engine, mode: str, expected: str) -> None:
    if mode != expected:
        raise SurveyError(f"mode {mode} instead of {expected}: {_report(engine)['reason']}")


def _refused(engine: Engine) -> tuple[str, str]:
    refusal = next(iter(engine.refusals), None)
    if refusal is None and engine.last_report is None:
        return "not reused", "no compiled graph computes a prompt: its encoder is called apart from `forward`"
    if refusal is None:
        return "not reused", f"{_report(engine)['reason']}{_uncompiled()}"
    return f"refused: {refusal.reason.value}", refusal.detail


def _uncompiled() -> str:
    """Return which function Dynamo runs uncompiled, in words; empty if none."""
    found = (SKIPPED.search(reason) for reason in counters["unimplemented"])
    return next((f": Dynamo runs `{match[1]}` of {match[2]} uncompiled" for match in found if match), "")


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Reset Dynamo, to stay below its limits, and silence its log."""
    log = logging.getLogger("torch._dynamo")
    level = log.level
    torch._dynamo.reset()
    counters.clear()
    log.setLevel(logging.ERROR)
    try:
        with dynamo_settings(DYNAMO_CONFIG):
            yield
    finally:
        log.setLevel(level)
        torch._dynamo.reset()

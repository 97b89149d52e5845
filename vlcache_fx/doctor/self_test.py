"""A small model that reuses an image: cold, warm after another text, and equal to the unmodified model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vlcache_fx
from vlcache_fx.doctor.check import Check, Status
from vlcache_fx.errors import VlcacheError

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "self-test"
ADVICE = "report it, with the output of vlcache doctor --json"
TOLERANCE = 1e-3
"""Largest difference of logits: kernels of other shapes round otherwise."""

Inputs = Mapping[str, Any]


def check_reuse() -> Check:
    """Compile a small model with eager kernels; ask about one image twice, and compare."""
    import torch

    title, model, first, second = _subject()
    with torch.no_grad():
        unmodified = logits_of(model(**second))
        model = vlcache_fx.compile(model, lowering="eager", strict=True)
        engine: Any = model.vlcache
        modes = []
        for inputs in (first, second):
            model(**inputs)
            modes.append(engine.last_report.mode if engine.last_report is not None else "no call")
        report = engine.last_report
        with engine.using(policy="full"):
            difference = largest_difference(logits_of(model(**second)), unmodified)
        engine.close()
    if modes != ["cold", "warm"]:
        reason = report.reason if report is not None else "the engine was not called"
        return Check(NAME, Status.FAILED, f"{title}: calls were {', '.join(modes)}: {reason}", ADVICE)
    share = 100 * report.token_layer_fraction
    text = (
        f"{title}: the image was reused after another text, {share:.1f} % of its rows recomputed; with "
        f'policy="full" the largest difference from the unmodified model is {difference:.1e}'
    )
    if not difference <= TOLERANCE:  # NaN is no small difference
        return Check(NAME, Status.FAILED, f"{text}, more than {TOLERANCE:g}", ADVICE)
    return Check(NAME, Status.OK, text)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return float((found.float() - expected.float()).abs().max())


def _subject() -> tuple[str, nn.Module, Inputs, Inputs]:
    """Return a title, a model, and two prompts with one image after other texts."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        title, model, first, second = _reference()
    except (ImportError, VlcacheError) as error:
        logging.getLogger("vlcache_fx").debug("vlcache: no reference model: %s", error)
        title, model, first, second = _tiny()
    moved = [{name: value.to(device) for name, value in inputs.items()} for inputs in (first, second)]
    return f"{title} on {device}", model.to(device), moved[0], moved[1]


def _reference() -> tuple[str, nn.Module, Inputs, Inputs]:
    import numpy as np

    from vlcache_fx.testing import reference_vlm

    question = reference_vlm.make_questions(count=1)[0]
    again = reference_vlm.ask_again(question, np.random.default_rng(0), question_first=False, system_words=30)
    processor = reference_vlm.load_processor()
    first, second = (dict(reference_vlm.prepare(processor, [each])) for each in (question, again))
    return "reference VLM", reference_vlm.load_model(), first, second


def _tiny() -> tuple[str, nn.Module, Inputs, Inputs]:
    from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

    first, second = (
        tiny_vlm_inputs(before=before, after=6, images=[(24, 0)], text_seed=before) for before in (3, 9)
    )
    return "tiny VLM (packages of the reference VLM are missing)", tiny_vlm(), first, second

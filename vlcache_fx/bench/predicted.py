"""Lower bounds of the time of an explained call, from operations, bytes and measured rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vlcache_fx.bench.model import DecoderSize, decoder_size
from vlcache_fx.bench.rates import Rates, measure_rates
from vlcache_fx.bench.roofline import Bound, bound
from vlcache_fx.errors import OptionError
from vlcache_fx.explaining import Explanation, Prediction, Predictions
from vlcache_fx.explaining.tokens import MEDIA

WIDTH, SIZE_BYTES = 1024, 2**26
"""Sizes for rates on a CPU that are measured in seconds, and are larger than most caches."""

LIMIT_S = 2.0
"""Time for each of these rates: on a machine that is busy with other work, all runs would take minutes."""


def with_predictions(explanation: Explanation, model: Any, rates: Rates | None = None) -> Explanation:
    """Return the explanation with the bounds of full computation and of its call.

    Args:
        explanation: of a call of ``model``.
        model: a model of the transformers library; of others, sizes are unknown.
        rates: rates of this machine; measured by default, which takes seconds.
    """
    size = _size(model)
    if isinstance(size, str):
        return replace(explanation, predictions=Predictions(note=f"not predicted: {size}"))
    sample = next((sample for sample in explanation.samples if sample.rows), None)
    report = explanation.report
    if sample is None or report is None or len(report.rows_per_layer) != size.layers + 1:
        note = "not predicted: the rows of each layer are unknown for this call"
        return replace(explanation, predictions=Predictions(note=note))
    found = rates or _measured(model)
    text = [token for run in sample.ranges if run.kind not in MEDIA for token in range(run.start, run.end)]
    rows = tuple(report.rows_per_layer)
    prompt = sample.num_tokens, text, len(explanation.samples)
    predictions = Predictions(
        _predicted(bound(size, found, (sample.num_tokens,) * size.layers + rows[-1:], *prompt)),
        _predicted(bound(size, found, rows, *prompt)),
        f"Lower bounds of the decoder alone, at {found.matmul_flops / 1e9:,.0f} GFLOP/s and "
        f"{found.copy_bytes / 2**30:,.1f} GiB/s, measured on this machine.",
    )
    return replace(explanation, predictions=predictions)


def _size(model: Any) -> DecoderSize | str:
    """Return the sizes of a model's decoder, or why they are unknown."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return f"the sizes of {type(model).__name__} are unknown, as it has no configuration of transformers"
    try:
        size = decoder_size(model)
    except (OptionError, AttributeError) as error:
        return f"the sizes of {type(model).__name__} are unknown: {error}"
    if size.experts:
        return "of a mixture of experts, which weights a call reads is unknown"
    if size.has_attention and not size.state_values:
        return f"the sizes of the states of {type(model).__name__} are unknown"
    return size


def _measured(model: Any) -> Rates:
    device: torch.device = model.device
    if device.type == "cpu":
        return measure_rates(model.dtype, device, WIDTH, SIZE_BYTES, LIMIT_S)
    return measure_rates(model.dtype, device)


def _predicted(found: Bound | None) -> Prediction | None:
    if found is None:
        return None
    return Prediction(found.flops, found.nbytes, found.seconds * 1e3, found.limited_by)

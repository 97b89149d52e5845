"""Explains a call of a compiled model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explain import Arguments, explain
from vlcache_fx.compiler.observer import observer_of
from vlcache_fx.errors import StoreError
from vlcache_fx.explaining.explained_call import SampleExplanation
from vlcache_fx.explaining.explanation import Explanation
from vlcache_fx.explaining.stages import stages_of
from vlcache_fx.explaining.tokens import classify, unmodified
from vlcache_fx.passes.configured import Pipelines
from vlcache_fx.runtime.donors.explain_miss import MissExplanation
from vlcache_fx.runtime.observation import Observation
from vlcache_fx.runtime.report import ReportView


def explain_call(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    prepared: Callable[[tuple[Any, ...], dict[str, Any]], Arguments],
    engine: Engine,
    pipelines: Pipelines,
) -> Explanation:
    """Trace ``function(**inputs)``, compute it as the next call of ``engine`` would, and explain it.

    No donor is stored, and ``engine`` counts and reports nothing. The outputs of encoders outside of graphs
    are cached as in a call.

    Args:
        function: the plain forward.
        inputs: its keyword arguments.
        prepared: prepares arguments for tracing, as a compiled model does.
        engine: the model's engine.
        pipelines: the passes for its graphs.
    """
    observer = observer_of(engine)
    with engine.observing() as observations, observer.reports() as reports:
        graphs = explain(function, inputs, prepared, engine.options.dynamic, pipelines, observer)
    call = next(iter(observations.calls), None)
    report = reports[0] if reports else None
    if call is not None:
        report = call.report.as_view()
    settings = engine.settings.current
    return Explanation(
        graphs=graphs,
        report=report,
        samples=_samples(call, report, inputs),
        donors=() if call is None else call.donors,
        misses=_misses(observer, report),
        stages=stages_of(
            {} if report is None else report.timings_ms, observations.clock.elapsed_ms.get("encoder")
        ),
        lowering=observer.lowering.name,
        settings={"policy": settings.policy.name, "budget": f"{settings.budget:g}"},
    )


def _samples(
    call: Observation | None, report: ReportView | None, inputs: Mapping[str, Any]
) -> tuple[SampleExplanation, ...]:
    """Return the prompts; of a call without a plan, those of its token ids."""
    ids = _token_ids(inputs)
    if call is None:
        length = 0 if report is None else report.num_tokens
        lengths = [len(own) for own in ids] or [length] * (0 if report is None else report.num_samples)
        return tuple(
            SampleExplanation(number, ranges=unmodified(number), token_ids=own)
            for number, own in zip(lengths, ids or [()] * len(lengths), strict=True)
        )
    fits = len(ids) == len(call.samples) and len(ids[0]) == call.samples[0].num_tokens
    return tuple(
        SampleExplanation(
            sample.num_tokens,
            sample.prefix,
            classify(sample),
            sample.rows[:-1],
            ids[index] if fits else (),
        )
        for index, sample in enumerate(call.samples)
    )


def _token_ids(inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return []
    return [tuple(row) for row in ids.tolist()]


def _misses(observer: Engine, report: ReportView | None) -> tuple[MissExplanation, ...]:
    if report is None:
        return ()
    try:
        return observer.explain_miss(report)
    except StoreError:  # closed or unreadable: the report has the reason
        return ()

"""The gate: finds the smallest budget, and the fewest contexts, that are accurate enough on traffic."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import OptionError
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.guards.shadow import kl_per_row

BUDGETS = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Trial:
    """Results of one budget and number of exact returns.

    Attributes:
        budget: share of the spans' token-layers that may be recomputed.
        exact_returns: value of the option: how often a reused item was computed in full when it returned.
        donor_contexts: number of contexts in the donors of the warm prompts, mean.
        num_warm: number of prompts with approximate reuse; only these are compared.
        agreement: share of next tokens that equal those of the full recompute.
        mean_kl, max_kl: KL divergence of the next token's distribution from the full recompute, in nats.
        token_layer_fraction: recomputed share of the spans' token-layers, mean over the warm prompts.
        passed: whether agreement and mean KL are within the bounds.
    """

    budget: float
    exact_returns: int
    donor_contexts: float
    num_warm: int
    agreement: float
    mean_kl: float
    max_kl: float
    token_layer_fraction: float
    passed: bool


@dataclass(frozen=True)
class GateReport:
    """Decision of the gate and its measurements: plain data.

    Attributes:
        passed: whether a trial passed; its budget and exact returns are set now.
        budget: the budget that passed; None if none did.
        exact_returns: the number that passed; None if none did.
        trials: results, in the order of the trials.
        min_agreement, max_kl: the bounds.
    """

    passed: bool
    budget: float | None
    exact_returns: int | None
    trials: tuple[Trial, ...]
    min_agreement: float
    max_kl: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)


def check(
    model: Callable[..., Any],
    prompts: Iterable[Mapping[str, Any]],
    *,
    min_agreement: float = 0.99,
    max_kl: float | None = None,
    budgets: Sequence[float] = BUDGETS,
    exact_returns: Sequence[int] | None = None,
    engine: ServingEngine | None = None,
    after_prompt: Callable[[], None] = lambda: None,
) -> GateReport:
    """Find the smallest budget that is accurate enough for ``model`` and set it; otherwise turn reuse off.

    For each budget, lowest first, all prompts are replayed with an empty store: the first call with an image
    is cold and records its donor, later calls are warm, and their next tokens are compared with those of a
    full recompute. The first budget within the bounds is set on the engine, for all its models
    (``Engine.set_budget``), and an earlier bypass of this model is lifted. If no budget passes, the model is
    bypassed until ``Engine.resume()``.

    Donors of several contexts err less (option ``donor_contexts``), and with them a smaller budget may do.
    Pass ``exact_returns`` to try, for each budget, donors that learn from so many returns of an item, fewest
    first; the number that passes is set as well, with ``donor_contexts`` large enough for it.

    Run it before deployment: it clears the store, and calls of other threads would interfere. If a budget
    passes, the donors of its replay remain, as this traffic would record them anyway; otherwise they are
    removed.

    Args:
        model: compiled for reuse; ``model(**prompt)`` returns logits [batch, tokens, vocabulary], alone, as
            ``.logits``, or first in a tuple.
        prompts: arguments, in the order of traffic. Each is used several times: none may contain a cache that
            the model mutates. Batches are padded on the left: the last token predicts the next.
        min_agreement: share in [0, 1] of next tokens that must agree.
        max_kl: bound of the mean KL divergence, in nats; None for no bound.
        budgets: shares in [0, 1].
        exact_returns: values of the option of this name, each at least 0; None for the engine's. Items must
            recur more often in ``prompts`` than the largest.
        engine: the model's engine; by default ``model.vlcache``. For models compiled with ``torch.compile``
            pass ``vlcache_fx.engine_for(options)``.
        after_prompt: called after each replayed prompt; a bar needs it.

    Raises:
        OptionError: an argument is not valid, the model has no engine, or no prompt reuses an image.
    """
    engine = getattr(model, "vlcache", None) if engine is None else engine
    if not isinstance(engine, ServingEngine):
        raise OptionError(f"this {type(model).__name__} has no engine: compile it with vlcache_fx.compile")
    calls = [dict(prompt) for prompt in prompts]
    check_bounds(min_agreement, max_kl, budgets)
    before = engine.options
    counts = (before.exact_returns,) if exact_returns is None else sorted(set(exact_returns))
    learning = [_learning(before, count) for count in counts]
    if not learning:
        raise OptionError(f"exact_returns={exact_returns!r} is not valid: it must be numbers, at least one")
    trials: list[Trial] = []
    models: dict[str, None] = {}
    passed = False
    try:
        with engine.guards.off(), torch.no_grad():
            for budget, options in product(sorted(budgets), learning):
                if options is not engine.options:
                    engine.set_options(options)
                found = _replay(model, calls, engine, budget, after_prompt)
                models.update(found.models)
                trials.append(found.trial(budget, options.exact_returns, min_agreement, max_kl))
                passed = trials[-1].passed
                if passed:
                    break
    finally:
        if not passed and engine.options is not before:
            engine.set_options(before)
    if passed:
        engine.set_budget(trials[-1].budget)
        engine.guards.resume(models)
    else:
        engine.clear()
        tried = ", ".join(dict.fromkeys(f"{trial.budget:g}" for trial in trials))
        for name in models:
            engine.guards.bypass(
                name, f"no budget of {tried} passed the gate; engine.resume() lifts this bypass"
            )
    best = trials[-1] if passed else None
    return GateReport(
        passed,
        None if best is None else best.budget,
        None if best is None else best.exact_returns,
        tuple(trials),
        min_agreement,
        max_kl,
    )


def _learning(options: Options, exact_returns: int) -> Options:
    """Return options with so many exact returns, and room for their contexts in a donor."""
    if exact_returns == options.exact_returns:
        return options
    changed = replace(options, exact_returns=exact_returns)  # checks the number
    return replace(changed, donor_contexts=max(options.donor_contexts, exact_returns + 1))


@dataclass(frozen=True)
class _Replayed:
    """Per warm prompt: share of agreeing samples, mean KL, recomputed share, contexts; and the models."""

    agree: list[float]
    kl: list[float]
    fractions: list[float]
    contexts: list[float]
    models: dict[str, None]

    def trial(self, budget: float, exact_returns: int, min_agreement: float, max_kl: float | None) -> Trial:
        num_warm = len(self.kl)
        agreement, mean_kl = sum(self.agree) / num_warm, sum(self.kl) / num_warm
        passed = agreement >= min_agreement and (max_kl is None or mean_kl <= max_kl)
        fraction, contexts = (sum(values) / num_warm for values in (self.fractions, self.contexts))
        return Trial(
            budget, exact_returns, contexts, num_warm, agreement, mean_kl, max(self.kl), fraction, passed
        )


def _replay(
    model: Callable[..., Any],
    calls: Sequence[Mapping[str, Any]],
    engine: ServingEngine,
    budget: float,
    after_prompt: Callable[[], None],
) -> _Replayed:
    engine.clear()
    found, seen = _Replayed([], [], [], [], {}), Counter[str]()
    for call in _counted(calls, after_prompt):
        with engine.using(budget=budget):
            reused = _next_logits(model(**call))
        no_call = {"mode": "no", "reason": "the engine was not called", "spans": ()}
        report: Mapping[str, Any] = engine.last_report or no_call
        seen[f"{report['mode']} ({report['reason']})" if report["reason"] else report["mode"]] += 1
        reused_spans = [
            span for span in report["spans"] if span["hit"] and span["start"] >= report["prefix_tokens"]
        ]
        if report["mode"] != "warm" or not reused_spans:
            continue  # cold, unmodified, or an exact prefix
        with engine.using(policy="full"):  # recomputes everything, stores nothing
            exact = _next_logits(model(**call))
        found.agree.append(float((exact.argmax(-1) == reused.argmax(-1)).double().mean()))
        found.kl.append(float(kl_per_row(exact, reused).mean()))
        found.fractions.append(report["token_layer_fraction"])
        found.contexts.append(fmean(span["donor_contexts"] for span in reused_spans))
        found.models[report["model_fingerprint"]] = None
    if not found.kl:
        modes = ", ".join(f"{count} {mode}" for mode, count in seen.items()) or "there were none"
        raise OptionError(
            f"none of the {len(calls)} prompts reuses an image after another beginning ({modes}): "
            "pass at least one image twice, after different texts, and more often than its exact returns"
        )
    return found


def _counted(calls: Sequence[Mapping[str, Any]], after: Callable[[], None]) -> Iterator[Mapping[str, Any]]:
    for call in calls:
        yield call
        after()


def _next_logits(output: Any) -> Tensor:
    """Return the logits of the next token of each sample, at least float32 [samples, vocabulary]."""
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        actual = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise OptionError(f"the model must return logits [batch, tokens, vocabulary], not {actual}")
    last = logits[:, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))


def check_bounds(min_agreement: float, max_kl: float | None, budgets: Sequence[float]) -> None:
    """Raise OptionError if a bound or a budget of ``check`` is not valid."""
    if not 0 <= min_agreement <= 1:
        raise OptionError(f"min_agreement={min_agreement!r} is not valid: it must be a share in [0, 1]")
    if max_kl is not None and not max_kl >= 0:
        raise OptionError(f"max_kl={max_kl!r} is not valid: it must be None, or at least 0 (nats)")
    if not budgets or not all(0 <= budget <= 1 for budget in budgets):
        raise OptionError(f"budgets={budgets!r} is not valid: it must be shares in [0, 1], at least one")

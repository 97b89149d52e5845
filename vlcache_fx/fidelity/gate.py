"""The gate: before a model serves, the smallest budget that is faithful enough on sample traffic."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import OptionError
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.guards.shadow import kl_per_row

BUDGETS = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Trial:
    """One budget.

    Attributes:
        budget: share of the spans' token-layers that might be recomputed.
        num_warm: prompts that reused an image approximately, which alone are compared.
        agreement: share of next tokens that are those of the full recompute.
        mean_kl, max_kl: KL divergence of the next token's distribution from that of the full recompute, in
            nats.
        token_layer_fraction: what was recomputed of the spans' token-layers, mean over the warm prompts.
        passed: agreement and mean KL are within the bounds.
    """

    budget: float
    num_warm: int
    agreement: float
    mean_kl: float
    max_kl: float
    token_layer_fraction: float
    passed: bool


@dataclass(frozen=True)
class GateReport:
    """What the gate decided, and on what grounds: plain data.

    Attributes:
        passed: a budget is good enough, and in force now.
        budget: which; None where none is.
        trials: the budgets that were tried, lowest first.
        min_agreement, max_kl: the bounds.
    """

    passed: bool
    budget: float | None
    trials: tuple[Trial, ...]
    min_agreement: float
    max_kl: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)


def check(
    model: Callable[..., Any],
    prompts: Iterable[Mapping[str, Any]],
    *,
    min_agreement: float = 0.99,
    max_kl: float | None = None,
    budgets: Sequence[float] = BUDGETS,
    engine: ServingEngine | None = None,
) -> GateReport:
    """Find the smallest budget that is good enough for ``model``, and set it; else, turn reuse off.

    For each budget, lowest first, all prompts are replayed from an empty store: the first call with an image
    is cold and makes its donor, later ones are warm, and their next tokens are compared with those of a full
    recompute. The first budget within the bounds is set on the engine, for all its models
    (``Engine.set_budget``), and what bypassed this model before is lifted. Where none is, the model goes
    without reuse until ``Engine.resume()``.

    Run it before the model serves: the store is cleared, and calls of other threads meanwhile would mix with
    it. The donors of the replay that passed are kept: this traffic would leave the same donors anyway. Of a
    model that did not pass, they are dropped.

    Args:
        model: compiled for reuse; called as ``model(**prompt)``, it returns logits [batch, tokens,
            vocabulary], alone, as ``.logits``, or first in a tuple.
        prompts: arguments, in the order of traffic. Each is used several times, so none may hold a cache that
            the model writes to. Batches are padded on the left: the last token predicts the next.
        min_agreement: share in [0, 1] of next tokens that must agree.
        max_kl: bound of the mean KL divergence, in nats; None for no bound.
        budgets: shares in [0, 1].
        engine: of the model; by default ``model.vlcache``. Models compiled with ``torch.compile`` have
            ``vlcache_fx.backend.engine_for(options)``.

    Raises:
        OptionError: an argument is not valid, the engine is not known, or no prompt reuses an image, so that
            nothing can be said.
    """
    engine = getattr(model, "vlcache", None) if engine is None else engine
    if not isinstance(engine, ServingEngine):
        raise OptionError(f"this {type(model).__name__} has no engine: compile it with vlcache_fx.compile")
    calls = [dict(prompt) for prompt in prompts]
    _check_bounds(min_agreement, max_kl, budgets)
    trials: list[Trial] = []
    models: dict[str, None] = {}
    with engine.guards.off(), torch.no_grad():
        for budget in sorted(budgets):
            found = _replay(model, calls, engine, budget)
            models.update(found.models)
            trials.append(found.trial(budget, min_agreement, max_kl))
            if trials[-1].passed:
                break
    passed = trials[-1].passed
    if passed:
        engine.set_budget(trials[-1].budget)
        engine.guards.resume(models)
    else:
        engine.clear()
        tried = ", ".join(f"{trial.budget:g}" for trial in trials)
        for name in models:
            engine.guards.bypass(
                name, f"the gate passed none of the budgets {tried}; engine.resume() lifts this"
            )
    return GateReport(passed, trials[-1].budget if passed else None, tuple(trials), min_agreement, max_kl)


@dataclass(frozen=True)
class _Replayed:
    """Per warm prompt: which share of its samples agree, mean KL over them, recomputed share; the models."""

    agree: list[float]
    kl: list[float]
    fractions: list[float]
    models: dict[str, None]

    def trial(self, budget: float, min_agreement: float, max_kl: float | None) -> Trial:
        num_warm = len(self.kl)
        agreement, mean_kl = sum(self.agree) / num_warm, sum(self.kl) / num_warm
        passed = agreement >= min_agreement and (max_kl is None or mean_kl <= max_kl)
        fraction = sum(self.fractions) / num_warm
        return Trial(budget, num_warm, agreement, mean_kl, max(self.kl), fraction, passed)


def _replay(
    model: Callable[..., Any], calls: Sequence[Mapping[str, Any]], engine: ServingEngine, budget: float
) -> _Replayed:
    engine.clear()
    found, seen = _Replayed([], [], [], {}), Counter[str]()
    for call in calls:
        with engine.using(budget=budget):
            reused = _next_logits(model(**call))
        never = {"mode": "no", "reason": "the engine was never called", "spans": ()}
        report: Mapping[str, Any] = engine.last_report or never
        seen[f"{report['mode']} ({report['reason']})" if report["reason"] else report["mode"]] += 1
        if not any(span["hit"] and span["start"] >= report["prefix_tokens"] for span in report["spans"]):
            continue  # cold, unmodified, or a known prefix, which is exact
        with engine.using(policy="full"):  # recomputes all, and stores nothing
            exact = _next_logits(model(**call))
        found.agree.append(float((exact.argmax(-1) == reused.argmax(-1)).double().mean()))
        found.kl.append(float(kl_per_row(exact, reused).mean()))
        found.fractions.append(report["token_layer_fraction"])
        found.models[report["model_fingerprint"]] = None
    if not found.kl:
        was = ", ".join(f"{count} {what}" for what, count in seen.items()) or "there were none"
        raise OptionError(
            f"none of the {len(calls)} prompts reuses an image after another beginning ({was}): "
            "give some image at least twice, after different text"
        )
    return found


def _next_logits(output: Any) -> Tensor:
    """Logits of the next token of each sample, at least float32 [samples, vocabulary]."""
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise OptionError(f"the model must return logits [batch, tokens, vocabulary], not {form}")
    last = logits[:, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))


def _check_bounds(min_agreement: float, max_kl: float | None, budgets: Sequence[float]) -> None:
    if not 0 <= min_agreement <= 1:
        raise OptionError(f"min_agreement={min_agreement!r} is not valid: it must be a share in [0, 1]")
    if max_kl is not None and not max_kl >= 0:
        raise OptionError(f"max_kl={max_kl!r} is not valid: it must be a number of nats, 0 or more, or None")
    if not budgets or not all(0 <= budget <= 1 for budget in budgets):
        raise OptionError(f"budgets={budgets!r} is not valid: it must be shares in [0, 1], at least one")

"""A test of the interface for policies, also of other packages: ``check_policy(MyPolicy())``.

Calls a policy for many spans, depths, budgets and profiles, and checks every answer against the interface
(``vlcache_fx.policies.base``): a request would repair or reject bad answers. Needs no test library.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan.budget import token_layer_allowance
from vlcache_fx.policies.base import Deviation, Policy, ProbedSpan, ProbingPolicy, SpanContext
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import interface_error
from vlcache_fx.testing.prompts import seeded

CURVE = ((0.0, 0.1), (0.05, 0.02), (0.3, 0.01), (1.0, 0.0))


@dataclass(frozen=True)
class _Question:
    """A call of a policy: ``select`` for a span, or ``choose`` for a span after the probe."""

    policy: Policy
    span: SpanContext

    @property
    def method(self) -> str:
        name = "choose" if isinstance(self.span, ProbedSpan) else "select"
        return f"{type(self.policy).__name__}.{name}"

    def __str__(self) -> str:
        span, profile = self.span, self.span.profile
        facts = [
            f"{name}={value}" for name, value in vars(span).items() if name not in ("deviation", "profile")
        ]
        if profile is not None:  # all that is needed to ask again
            fields = ", ".join(f"{name}={value!r}" for name, value in vars(profile).items())
            facts.append(f"profile=Profile({fields})")
        return f"{self.method}({', '.join(facts)})"

    def ask(self, seed: int = 0) -> Sequence[Tensor]:
        """Call the policy with torch's global seed set; answers must not depend on it."""
        with seeded(seed):
            if not isinstance(self.span, ProbedSpan):
                return self.policy.select(self.span)
            assert isinstance(self.policy, ProbingPolicy)
            return self.policy.choose(self.span)

    def with_profile(self, profile: Profile | None) -> _Question:
        return replace(self, span=replace(self.span, profile=profile))

    def is_refused(self) -> bool:
        try:
            self.ask()
        except PolicyError:
            return True
        return False


def check_policy(
    policy: Policy, *, profiles: Sequence[Profile] = (), cases: int = 100, seed: int = 0
) -> list[str]:
    """Check a policy against the interface.

    A policy may raise ``PolicyError`` for a profile: without a profile, or with a measured one, it must
    answer the same question.

    Args:
        policy: the object to check; check one object per relevant set of parameters.
        profiles: additional profiles, of any number of layers.
        cases: number of random questions.
        seed: seed of the questions.

    Returns:
        Recommendations about speed, and about lookup by name.

    Raises:
        AssertionError: the policy violates the interface; the message states the violation and the question.
    """
    advice = _check_object(policy)
    draw = random.Random(seed)  # noqa: S311  # no secret
    for question in _questions(policy, draw, profiles, cases):
        rows = _answer(question)
        if rows is None:
            continue
        if not isinstance(policy, ProbingPolicy):
            advice += _check_choice(rows, question)
            continue
        _check_probe(rows, policy, question)
        for deviation in _deviations(draw, policy.probe_layer, question.span.length):
            before = deviation.key.clone(), deviation.value.clone()
            shown = replace(question, span=ProbedSpan(**vars(question.span), deviation=deviation))
            rows = _answer(shown)
            kept = torch.equal(before[0], deviation.key) and torch.equal(before[1], deviation.value)
            _require(kept, f"{shown}: the policy changed the deviation's tensors in place")
            advice += [] if rows is None else _check_choice(rows, shown)
    return list(dict.fromkeys(advice))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _check_object(policy: Policy) -> list[str]:
    """Check the policy as a value: frozen, comparable, named."""
    name, kind = type(policy).__name__, type(policy)
    _require(isinstance(policy, Policy), f"{name} is not a subclass of vlcache_fx.policies.Policy")
    frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen
    _require(frozen, f"{name} is not a frozen dataclass; options and caches compare policies by value")
    registered = getattr(kind, "name", None)
    _require(
        isinstance(registered, str) and bool(registered), f"{name}.name must be a string, not {registered!r}"
    )
    for flag in ("ignores_budget", "keeps_prefix"):
        value = getattr(policy, flag)
        _require(isinstance(value, bool), f"{name}.{flag} must be True or False, not {value!r}")
    outdated = interface_error(policy)
    _require(outdated is None, str(outdated))
    like: Policy = replace(policy)  # type: ignore[type-var]
    _require(like == policy, f"{name}: a copy with equal fields is not equal to it")
    try:
        same_hash = hash(like) == hash(policy)
    except TypeError as error:
        raise AssertionError(f"{name} is not hashable ({error}): its fields must be hashable") from error
    _require(same_hash, f"{name}: equal policies have different hashes")
    if isinstance(policy, ProbingPolicy):
        layer = policy.probe_layer
        usable = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
        _require(usable, f"{name}.probe_layer must be an index of a layer, not {layer!r}")

    advice = []
    if (kind.__doc__ or "").startswith(f"{name}("):  # the default docstring of dataclasses
        advice.append(f"{name} has no docstring; `vlcache policies` shows its first paragraph")
    try:
        kind()
    except TypeError:
        advice.append(f"{name} has fields without defaults: it cannot be looked up by name")
    return advice


def _questions(
    policy: Policy, draw: random.Random, profiles: Sequence[Profile], count: int
) -> Iterator[_Question]:
    least_layers = policy.probe_layer + 1 if isinstance(policy, ProbingPolicy) else 1
    lengths = [1, 2, 3, 16, 100]
    budgets = [0.0, 1e-6, 0.02, 0.1, 0.5, 1.0]
    for index in range(count):
        num_layers = least_layers + draw.choice([0, 1, 2, 7, 27, draw.randint(0, 40)])
        length = lengths[index] if index < len(lengths) else draw.randint(1, 500)
        budget = draw.choice([*budgets, draw.random()])
        yield _Question(policy, _span(draw, length, num_layers, budget, _profile(draw, num_layers)))
    for given in profiles:
        for budget in budgets:
            num_layers = len(given.sensitivities)
            if num_layers >= least_layers:
                yield _Question(policy, _span(draw, draw.randint(1, 500), num_layers, budget, given))


def _span(
    draw: random.Random, length: int, num_layers: int, budget: float, profile: Profile | None
) -> SpanContext:
    """Draw a span in a prompt, with or without text, padding and other spans around it."""
    before, after = draw.choice([0, draw.randint(0, 300)]), draw.choice([0, draw.randint(0, 300)])
    return SpanContext(
        length=length,
        num_layers=num_layers,
        budget=budget,
        profile=profile,
        start=before,
        num_tokens=before + length + after,
        text_before=draw.choice([before, draw.randint(0, before)]),
        text_after=draw.choice([after, draw.randint(0, after)]),
        grid=_grid(draw, length),
    )


def _grid(draw: random.Random, length: int) -> tuple[int, int, int] | None:
    """Draw None, or tokens in time, height and width."""
    widths = [width for width in range(1, length + 1) if length % width == 0]
    width = draw.choice([0, *widths])
    return (1, length // width, width) if width else None


def _profile(draw: random.Random, num_layers: int) -> Profile | None:
    """Draw None, or flat, zero, rising, falling, random, or very uneven sensitivities."""
    shapes: list[Callable[[int], float]] = [
        lambda _: 1.0,
        lambda _: 0.0,
        float,
        lambda layer: float(num_layers - layer),
        lambda _: draw.random(),
        lambda _: 10.0 ** draw.randint(-12, 12) * draw.randint(0, 1),
    ]
    shape = draw.choice([None, *shapes])
    return None if shape is None else _with_shape(shape, num_layers, draw.choice([(), CURVE]))


def _with_shape(
    shape: Callable[[int], float], num_layers: int, curve: tuple[tuple[float, float], ...] = CURVE
) -> Profile:
    return Profile("contract", "float32", tuple(map(shape, range(num_layers))), curve)


def _deviations(draw: random.Random, layer: int, span_length: int) -> Iterator[Deviation]:
    """Yield random deviations, and zeros."""
    generator = torch.Generator().manual_seed(draw.randint(0, 2**32))
    yield Deviation(layer, *torch.rand(2, span_length, generator=generator).pow(4))
    yield Deviation(layer, *torch.zeros(2, span_length))


def _answer(question: _Question) -> Sequence[Tensor] | None:
    """Return checked rows; None if the policy rejects the profile."""
    try:
        rows = question.ask(seed=1)
    except PolicyError as error:
        others = (None, _with_shape(lambda _: 1.0, question.span.num_layers))
        answered = any(not question.with_profile(other).is_refused() for other in others)
        _require(answered, f"{question}: rejected for every profile: {error}")
        return None
    _require(
        isinstance(rows, Sequence), f"{question}: expected a sequence of tensors, got {type(rows).__name__}"
    )
    _require(len(rows) == question.span.num_layers, f"{question}: {len(rows)} tensors for these layers")
    checked: set[int] = set()
    for layer, tensor in enumerate(rows):
        if id(tensor) not in checked:
            _check_rows(tensor, f"{question}, layer {layer}", question.span.length)
            checked.add(id(tensor))
    for layer, (before, after) in enumerate(pairwise(rows), 1):
        new = [] if after is before else after[~torch.isin(after, before)].tolist()
        _require(
            not new,
            f"{question}, layer {layer}: rows {new[:5]} were not computed in the layer before; "
            "row sets must shrink with depth",
        )
    again = question.ask(seed=2)
    _require(
        len(again) == len(rows) and all(map(torch.equal, rows, again)),
        f"{question}: two calls gave different answers; random choices need a separate generator",
    )
    return rows


def _check_rows(tensor: Any, where: str, span_length: int) -> None:
    _require(isinstance(tensor, Tensor), f"{where}: expected a tensor, got {type(tensor).__name__}")
    _require(
        tensor.dim() == 1 and tensor.dtype == torch.int64,
        f"{where}: expected int64 offsets [rows], got {tensor.dtype} of shape {tuple(tensor.shape)}",
    )
    outside = tensor[(tensor < 0) | (tensor >= span_length)].tolist()
    _require(not outside, f"{where}: rows {outside[:5]} are outside the span")
    _require(
        bool((tensor.diff() > 0).all()),
        f"{where}: rows are not sorted and unique: {tensor.tolist()}",
    )


def _check_choice(rows: Sequence[Tensor], question: _Question) -> list[str]:
    """Check the budget; return a recommendation if planning could be faster."""
    if not question.policy.ignores_budget:
        span = question.span
        allowed = token_layer_allowance(span.budget, span.length, span.num_layers)
        asked = sum(len(tensor) for tensor in rows)
        _require(asked <= allowed, f"{question}: {asked} token-layers, the budget allows {allowed}")
    if all(after is before or not torch.equal(after, before) for before, after in pairwise(rows)):
        return []
    return [
        f"{question.method} returns different tensors for equal layers; planning is faster if they share one"
    ]


def _check_probe(rows: Sequence[Tensor], policy: ProbingPolicy, question: _Question) -> None:
    for layer in range(policy.probe_layer + 1):
        _require(
            len(rows[layer]) == question.span.length,
            f"{question}, layer {layer}: the probe needs all rows up to layer {policy.probe_layer}",
        )

"""A test for policies, those of other packages above all: ``check_policy(MyPolicy())``.

It asks a policy for many spans, depths, budgets and profiles and checks every answer against the interface
(``vlcache_fx.policies.base``): what fails here would be repaired or refused in a request. It needs torch
alone, no test library.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.plan.budget import token_layer_allowance
from vlcache_fx.policies.base import Deviation, Policy, ProbingPolicy, Profile
from vlcache_fx.testing.prompts import seeded

Answer = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class _Case:
    span_length: int
    num_layers: int
    profile: Profile | None
    budget: float

    def __str__(self) -> str:
        return (
            f"(span_length={self.span_length}, num_layers={self.num_layers}, profile={self.profile}, "
            f"budget={self.budget})"
        )


def check_policy(
    policy: Policy, *, profiles: Sequence[Profile] = (), cases: int = 100, seed: int = 0
) -> list[str]:
    """Check a policy against the interface.

    Args:
        policy: the object to check; check one per set of parameters that matters.
        profiles: to ask with, beside those that are drawn; of any number of layers.
        cases: how many questions are drawn.
        seed: of the draw.

    Returns:
        Recommendations: what is no error but costs time, or keeps the policy from being found by name.

    Raises:
        AssertionError: the policy breaks the interface; the message says how, and for which question.
    """
    advice = _check_object(policy)
    draw = random.Random(seed)  # noqa: S311  # no secret
    least_layers = policy.probe_layer + 1 if isinstance(policy, ProbingPolicy) else 1
    for case in _cases(draw, profiles, cases, least_layers):
        context = (case.num_layers, case.profile, case.budget)
        question = f"{_name(policy)}.select{case}"
        rows = _answer(partial(policy.select, case.span_length, *context), question, case)
        if not isinstance(policy, ProbingPolicy):
            advice += _check_choice(rows, policy, question, case)
            continue
        _check_probe(rows, policy, question, case)
        question = f"{_name(policy)}.choose{case}"
        for deviation in _deviations(draw, policy.probe_layer, case.span_length):
            before = deviation.key.clone(), deviation.value.clone()
            rows = _answer(partial(policy.choose, deviation, *context), question, case)
            kept = torch.equal(before[0], deviation.key) and torch.equal(before[1], deviation.value)
            _require(kept, f"{question}: it changed the deviation's tensors in place")
            advice += _check_choice(rows, policy, question, case)
    return list(dict.fromkeys(advice))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _name(policy: Policy) -> str:
    return type(policy).__name__


def _check_object(policy: Policy) -> list[str]:
    """The policy as a value: frozen, equal to its like, named."""
    name, kind = _name(policy), type(policy)
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
    like: Policy = replace(policy)  # type: ignore[type-var]
    _require(like == policy, f"{name}: a copy with equal fields is not equal to it")
    try:
        same_hash = hash(like) == hash(policy)
    except TypeError as error:
        raise AssertionError(f"{name} is not hashable ({error}); give it fields that are") from error
    _require(same_hash, f"{name}: equal policies have different hashes")
    if isinstance(policy, ProbingPolicy):
        layer = policy.probe_layer
        usable = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
        _require(usable, f"{name}.probe_layer must be an index of a layer, not {layer!r}")

    advice = []
    if (kind.__doc__ or "").startswith(f"{name}("):  # what dataclasses write where there is none
        advice.append(f"{name} has no docstring; `vlcache policies` shows its first paragraph")
    try:
        kind()
    except TypeError:
        advice.append(f"{name} has fields without defaults, so it cannot be asked for by name")
    return advice


def _cases(
    draw: random.Random, profiles: Sequence[Profile], count: int, least_layers: int
) -> Iterator[_Case]:
    lengths = [1, 2, 3, 16, 100]
    budgets = [0.0, 1e-6, 0.02, 0.1, 0.5, 1.0]
    for index in range(count):
        num_layers = least_layers + draw.choice([0, 1, 2, 7, 27, draw.randint(0, 40)])
        yield _Case(
            lengths[index] if index < len(lengths) else draw.randint(1, 500),
            num_layers,
            _profile(draw, num_layers),
            draw.choice([*budgets, draw.random()]),
        )
    for given in profiles:
        for budget in budgets:
            if len(given.sensitivities) >= least_layers:
                yield _Case(draw.randint(1, 500), len(given.sensitivities), given, budget)


def _profile(draw: random.Random, num_layers: int) -> Profile | None:
    """None, or sensitivities that are flat, zero, rising, falling, random, or of very different sizes."""
    shapes: list[Callable[[int], float]] = [
        lambda _: 1.0,
        lambda _: 0.0,
        float,
        lambda layer: float(num_layers - layer),
        lambda _: draw.random(),
        lambda _: 10.0 ** draw.randint(-12, 12) * draw.randint(0, 1),
    ]
    shape = draw.choice([None, *shapes])
    return None if shape is None else Profile("contract", "float32", tuple(map(shape, range(num_layers))))


def _deviations(draw: random.Random, layer: int, span_length: int) -> Iterator[Deviation]:
    """Random ones, and none at all."""
    generator = torch.Generator().manual_seed(draw.randint(0, 2**32))
    yield Deviation(layer, *torch.rand(2, span_length, generator=generator).pow(4))
    yield Deviation(layer, *torch.zeros(2, span_length))


def _answer(ask: Answer, question: str, case: _Case) -> Sequence[Tensor]:
    """The rows, checked for what every answer must be."""
    with seeded(1):
        rows = ask()
    _require(isinstance(rows, Sequence), f"{question}: want a sequence of tensors, got {type(rows).__name__}")
    _require(len(rows) == case.num_layers, f"{question}: {len(rows)} tensors for {case.num_layers} layers")
    checked: set[int] = set()
    for layer, tensor in enumerate(rows):
        if id(tensor) not in checked:
            _check_rows(tensor, f"{question}, layer {layer}", case.span_length)
            checked.add(id(tensor))
    for layer, (before, after) in enumerate(pairwise(rows), 1):
        if after is not before:
            new = after[~torch.isin(after, before)].tolist()
            _require(
                not new,
                f"{question}, layer {layer}: rows {new[:5]} were not computed in the layer before; "
                "row sets must shrink with depth",
            )
    with seeded(2):
        again = ask()
    _require(
        len(again) == len(rows) and all(map(torch.equal, rows, again)),
        f"{question}: asked twice, it gave two answers; random choices need a generator of their own",
    )
    return rows


def _check_rows(tensor: Any, where: str, span_length: int) -> None:
    _require(isinstance(tensor, Tensor), f"{where}: want a tensor, got {type(tensor).__name__}")
    _require(
        tensor.dim() == 1 and tensor.dtype == torch.int64,
        f"{where}: want int64 offsets of one dimension, got {tensor.dtype} of shape {tuple(tensor.shape)}",
    )
    outside = tensor[(tensor < 0) | (tensor >= span_length)].tolist()
    _require(not outside, f"{where}: rows {outside[:5]} are outside of the span")
    _require(
        bool((tensor.diff() > 0).all()),
        f"{where}: rows are not sorted, or some come twice: {tensor.tolist()}",
    )


def _check_choice(rows: Sequence[Tensor], policy: Policy, question: str, case: _Case) -> list[str]:
    """The budget is kept; and a recommendation where planning could be faster."""
    if not policy.ignores_budget:
        allowed = token_layer_allowance(case.budget, case.span_length, case.num_layers)
        asked = sum(len(tensor) for tensor in rows)
        _require(asked <= allowed, f"{question}: {asked} token-layers, the budget allows {allowed}")
    if all(after is before or not torch.equal(after, before) for before, after in pairwise(rows)):
        return []
    method = question.partition("(")[0]
    return [f"{method} gives equal layers different tensors; planning is faster where they share one object"]


def _check_probe(rows: Sequence[Tensor], policy: ProbingPolicy, question: str, case: _Case) -> None:
    for layer in range(policy.probe_layer + 1):
        _require(
            len(rows[layer]) == case.span_length,
            f"{question}, layer {layer}: the probe needs all rows up to layer {policy.probe_layer}",
        )

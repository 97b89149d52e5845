"""The contract test reports every violation of the interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import Policy, ProbedSpan, ProbingPolicy, Profile, SpanContext
from vlcache_fx.policies.layer_aware import LayerAware
from vlcache_fx.testing.policy_contract import check_policy


def first(length: int, layers: int) -> list[Tensor]:
    return [torch.arange(1)] * layers


@dataclass(frozen=True)
class Asked(Policy):
    """Returns the test's answer."""

    name: ClassVar[str] = "asked"
    ignores_budget: ClassVar[bool] = True

    answer: Callable[[int, int], Any] = first

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return self.answer(span.length, span.num_layers)


def test_check_policy_valid() -> None:
    assert check_policy(Asked()) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, layers: None, "expected a sequence of tensors, got NoneType"),
        (lambda n, layers: [torch.arange(1)] * (layers + 1), "tensors for these layers"),
        (lambda n, layers: [[0]] * layers, "layer 0: expected a tensor, got list"),
        (
            lambda n, layers: [torch.zeros(1)] * layers,
            r"expected int64 offsets \[rows\], got torch.float32",
        ),
        (lambda n, layers: [torch.zeros(1, 1, dtype=torch.int64)] * layers, r"of shape \(1, 1\)"),
        (lambda n, layers: [torch.tensor([n])] * layers, r"rows \[\d+\] are outside the span"),
        (lambda n, layers: [torch.tensor([-1])] * layers, r"rows \[-1\] are outside the span"),
        (lambda n, layers: [torch.tensor([0, 0])] * layers, "not sorted and unique"),
        (lambda n, layers: [torch.arange(n).flip(0)] * layers, "not sorted"),
        (lambda n, layers: [torch.arange(min(n, 1 + i)) for i in range(layers)], "shrink with depth"),
        (lambda n, layers: [torch.randperm(n)[:1]] * layers, "two calls gave different answers"),
    ],
)
def test_check_policy_bad_answers(answer: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"Asked\.select\(length=\d+, num_layers=.*{message}"):
        check_policy(Asked(answer))


def test_check_policy_exceeded_budget() -> None:
    @dataclass(frozen=True)
    class Dear(Asked):
        """Recompute the first row despite the budget."""

        ignores_budget: ClassVar[bool] = False

    with pytest.raises(AssertionError, match=r"budget=0\.0.*token-layers, the budget allows 0"):
        check_policy(Dear())


def refuse(*_: int) -> Any:
    raise PolicyError("not today")


def test_check_policy_rejected_profiles() -> None:
    with pytest.raises(AssertionError, match="rejected for every profile: not today"):
        check_policy(Asked(refuse))

    @dataclass(frozen=True)
    class Measured(Asked):
        """Needs a profile."""

        def select(self, span: SpanContext) -> Sequence[Tensor]:
            return refuse() if span.profile is None else super().select(span)

    assert check_policy(Measured()) == []


def test_check_policy_recommendations() -> None:
    @dataclass(frozen=True)
    class Plain(Asked):
        more: int = field(kw_only=True)

        def select(self, span: SpanContext) -> Sequence[Tensor]:
            return [torch.arange(1) for _ in range(span.num_layers)]

    assert [text.partition(" ")[2] for text in check_policy(Plain(more=1))] == [
        "has no docstring; `vlcache policies` shows its first paragraph",
        "has fields without defaults: it cannot be looked up by name",
        "returns different tensors for equal layers; planning is faster if they share one",
    ]


def made(**changes: Any) -> Any:
    """Create an invalid policy with changed ``dataclass`` arguments or attributes."""
    arguments = {"frozen": True} | changes.pop("arguments", {})
    bases = changes.pop("bases", (Policy,))
    own = {"__doc__": "Odd.", "name": "odd", "select": lambda self, span: first(span.length, span.num_layers)}
    return dataclass(**arguments)(type("Odd", bases, own | changes))()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bases": ()}, "not a subclass"),
        ({"arguments": {"frozen": False}}, "not a frozen dataclass"),
        ({"arguments": {"eq": False}}, "a copy with equal fields is not equal"),
        ({"name": ""}, "name must be a string, not ''"),
        ({"ignores_budget": None}, "ignores_budget must be True or False, not None"),
        ({"__annotations__": {"rows": list}, "rows": field(default_factory=list)}, "not hashable"),
        ({"bases": (ProbingPolicy,), "choose": None, "probe_layer": -1}, "probe_layer must be an index"),
    ],
)
def test_check_policy_bad_objects(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(made(**changes))


@dataclass(frozen=True)
class Probing(ProbingPolicy):
    """Returns the test's choice."""

    name: ClassVar[str] = "probing"

    answer: Callable[[Any, int], Any] = lambda deviation, layers: [torch.empty(0, dtype=torch.int64)] * layers
    probe_layer: int = 2
    probed: int = 3

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        no_rows = torch.empty(0, dtype=torch.int64)
        return (*super().select(span)[: self.probed], *(no_rows,) * (span.num_layers - self.probed))

    def choose(self, span: ProbedSpan) -> Sequence[Tensor]:
        return self.answer(span.deviation, span.num_layers)


def all_rows(deviation: Any, layers: int) -> list[Tensor]:
    return [torch.arange(len(deviation.key))] * layers


def test_check_policy_probing() -> None:
    with pytest.raises(AssertionError, match=r"Probing\.choose.*the budget allows"):
        check_policy(Probing(all_rows))
    with pytest.raises(AssertionError, match="the policy changed the deviation's tensors in place"):
        check_policy(Probing(lambda found, layers: [found.key.sub_(1).long()[:0]] * layers))
    with pytest.raises(AssertionError, match="layer 2: the probe needs all rows up to layer 2"):
        check_policy(Probing(probed=2))


def test_check_policy_additional_profiles() -> None:
    with pytest.raises(AssertionError, match=r"sensitivities=\(7\.0, 7\.5\)"):
        check_policy(Picky(), profiles=[Profile("mine", "float32", (7, 7.5))])
    assert check_policy(Picky()) == []


@dataclass(frozen=True)
class Picky(LayerAware):
    """Fails for one profile."""

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        found = span.profile is not None and span.profile.sensitivities == (7.0, 7.5)
        return [] if found else super().select(span)

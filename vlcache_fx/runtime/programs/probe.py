"""Runs the warm program for a look at the first layers, for policies that choose by what they see there."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

from vlcache_fx.errors import PlanError, PolicyError
from vlcache_fx.lowering import Arriving
from vlcache_fx.plan.build import RowChooser
from vlcache_fx.plan.cut import cut_after
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.policies.base import Deviation, Policy, ProbingPolicy
from vlcache_fx.policies.profile import Profile
from vlcache_fx.runtime.donors.tables import RowForm, length_of
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.runtime.requests.request import Request, Sample, together


@dataclass(frozen=True)
class ProbeRows:
    """The rows of the probe run, which no budget limits."""

    policy: ProbingPolicy
    forms: Mapping[str, RowForm]
    ignores_budget: ClassVar[bool] = True

    def select(
        self, span_length: int, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """See ``RowChooser``.

        Raises:
            PolicyError: the model has fewer layers, or rows are left out.
            PlanError: no layer up to the policy's stores keys and values.
        """
        if not 0 <= self.policy.probe_layer < num_layers:
            raise PolicyError(
                f"policy {self.policy.name!r} probes layer {self.policy.probe_layer}; "
                f"the model has layers 0 to {num_layers - 1}"
            )
        rows = self.policy.select(span_length, num_layers, profile, budget)
        layer = stored_layer(self.policy, self.forms)
        if layer < len(rows) and len(rows[layer]) != span_length:
            raise PolicyError(
                f"policy {self.policy.name!r}: select must ask for all {span_length} rows of a span up to "
                f"layer {self.policy.probe_layer}, not for {len(rows[layer])}"
            )
        return rows


class ChosenRows:
    """The rows that a policy chooses of what the probe found.

    Args:
        policy: chooses.
        deviations: of the spans, in the order in which plans ask: samples in order, and spans in order.
    """

    def __init__(self, policy: ProbingPolicy, deviations: Iterable[Deviation]) -> None:
        self.ignores_budget = policy.ignores_budget
        self._policy, self._left = policy, iter(deviations)

    def select(
        self, span_length: int, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """See ``RowChooser``."""
        deviation = next(self._left)
        assert len(deviation.key) == span_length
        return self._policy.choose(deviation, num_layers, profile, budget)


def first_chooser(policy: Policy, forms: Mapping[str, RowForm]) -> RowChooser:
    """What the first plans of a call ask: the policy, or for the rows of its probe."""
    return ProbeRows(policy, forms) if isinstance(policy, ProbingPolicy) else policy


def stored_layer(policy: ProbingPolicy, forms: Mapping[str, RowForm]) -> int:
    """The last layer up to the policy's that has keys and values of its own, which donors hold."""
    for layer in range(policy.probe_layer, -1, -1):
        if f"{layer}.k" in forms and f"{layer}.v" in forms:
            return layer
    raise PlanError(f"no layer up to {policy.probe_layer} has keys and values of its own to compare")


def needs_probe(policy: Policy, request: Request) -> TypeGuard[ProbingPolicy]:
    """True where the policy wants to see something, and a reused span is not exact as it is stored."""
    return isinstance(policy, ProbingPolicy) and any(_approximate(sample) for sample in request.samples)


def measure(
    policy: ProbingPolicy,
    program: ProgramRunner,
    request: Request,
    plans: Sequence[Plan],
    tables: Callable[[], Mapping[str, Tensor | Arriving]],
    forms: Mapping[str, RowForm],
    output_rows: Tensor | None,
) -> list[Deviation] | None:
    """The deviations of all reused spans behind known prefixes, sample by sample.

    The run leaves nothing behind but rows in caches of fixed size, which the run that follows writes again.

    Args:
        policy: says which layer is looked at.
        program: the warm program; ``ready`` was called.
        request: has donors.
        plans: a plan per sample, made with ``first_chooser``.
        tables: gives the donor tables that the program reads, the same in every call.
        forms: of rows, per slot.
        output_rows: as the plans were built with.

    Returns:
        None where the program failed.
    """
    layer = stored_layer(policy, forms)
    plans = [cut_after(plan, layer, output_rows) for plan in plans]
    results = program.run(request.args, program.bind(together(plans), output_rows, tables))
    if results is None:
        return None
    recorded = dict(zip(program.recorded, results[len(results) - len(program.recorded) :], strict=True))

    def distances(sample: Sample, place: int, donor: int, length: int) -> Iterator[Tensor]:
        for slot in (f"{layer}.k", f"{layer}.v"):
            form, table = forms[slot], tables()[slot]
            stored = table.get() if isinstance(table, Arriving) else table
            fresh = form.of_sample(recorded[slot], sample.index).narrow(form.dim, place, length)
            yield _squared_distance(fresh, stored.narrow(form.dim, donor, length), form.dim)

    found: list[Deviation] = []
    first_donor = 0
    for sample, plan in zip(request.samples, plans, strict=True):
        donor = first_donor + sample.prefix
        for span in _approximate(sample):
            place = int(torch.searchsorted(plan.rows[layer], span.start))  # all rows of a span are there
            key, value = torch.stack([*distances(sample, place, donor, span.length)]).cpu()
            found.append(Deviation(layer, key, value))
            donor += span.length
        first_donor += sum(length_of(entry) for entry in sample.donors)
    return found


def _approximate(sample: Sample) -> list[Span]:
    """The reused spans for which plans ask, in order."""
    return [span for span in sample.spans if span.hit and span.start >= sample.prefix]


@torch.no_grad()
def _squared_distance(fresh: Tensor, stored: Tensor, dim: int) -> Tensor:
    difference = fresh.to(torch.float32) - stored.to(torch.float32)
    return difference.square().movedim(dim, 0).flatten(1).sum(1)

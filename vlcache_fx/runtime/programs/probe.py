"""Runs the warm program for a look at the first layers, for policies that choose by what they see there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

from vlcache_fx.errors import PlanError, PolicyError
from vlcache_fx.plan.build import RowChooser
from vlcache_fx.plan.cut import cut_after
from vlcache_fx.plan.types import Plan, Span, SpanContext
from vlcache_fx.policies.base import Deviation, Policy, ProbedSpan, ProbingPolicy
from vlcache_fx.runtime.donors.tables import length_of, rows_of_sample
from vlcache_fx.runtime.programs.bind import Tables
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.runtime.requests.request import Request, Sample, together
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, StoredSlot, Value


@dataclass(frozen=True)
class ProbeRows:
    """The rows of the probe run, which no budget limits."""

    policy: ProbingPolicy
    specs: Mapping[StoredSlot, RowSpec]
    ignores_budget: ClassVar[bool] = True

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``RowChooser``.

        Raises:
            PolicyError: the model has fewer layers, or rows are left out.
            PlanError: no layer up to the policy's stores keys and values.
        """
        if not 0 <= self.policy.probe_layer < span.num_layers:
            raise PolicyError(
                f"policy {self.policy.name!r} probes layer {self.policy.probe_layer}; "
                f"the model has layers 0 to {span.num_layers - 1}"
            )
        rows = self.policy.select(span)
        layer = stored_layer(self.policy, self.specs)
        if layer < len(rows) and len(rows[layer]) != span.length:
            raise PolicyError(
                f"policy {self.policy.name!r}: select must ask for all {span.length} rows of a span up to "
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

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``RowChooser``."""
        deviation = next(self._left)
        assert len(deviation.key) == span.length
        return self._policy.choose(ProbedSpan(**vars(span), deviation=deviation))


def first_chooser(policy: Policy, specs: Mapping[StoredSlot, RowSpec]) -> RowChooser:
    """What the first plans of a call ask: the policy, or for the rows of its probe."""
    return ProbeRows(policy, specs) if isinstance(policy, ProbingPolicy) else policy


def stored_layer(policy: ProbingPolicy, specs: Mapping[StoredSlot, RowSpec]) -> int:
    """The last layer up to the policy's that has keys and values of its own, which donors hold."""
    for layer in range(policy.probe_layer, -1, -1):
        if Key(layer) in specs and Value(layer) in specs:
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
    tables: Tables,
    specs: Mapping[StoredSlot, RowSpec],
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
        specs: of rows, per slot.
        output_rows: as the plans were built with.

    Returns:
        None where the program failed.
    """
    layer = stored_layer(policy, specs)
    plans = [cut_after(plan, layer, output_rows) for plan in plans]
    results = program.run(request.args, program.bind(together(plans), output_rows, tables))
    if results is None:
        return None
    recorded = dict(
        zip(program.spec.recorded, results[len(results) - len(program.spec.recorded) :], strict=True)
    )

    def distances(sample: Sample, place: int, donor: int, length: int) -> Iterator[Tensor]:
        for slot in (Key(layer), Value(layer)):
            spec, table = specs[slot], tables()[slot]
            stored = table.get() if isinstance(table, PendingTensor) else table
            fresh = rows_of_sample(spec, recorded[slot], sample.index).narrow(spec.dim, place, length)
            yield _squared_distance(fresh, stored.narrow(spec.dim, donor, length), spec.dim)

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

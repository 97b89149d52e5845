"""Probes: runs of the warm program up to a layer, for policies that choose rows by its keys and values."""

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
from vlcache_fx.runtime.donors.donor_dtype import length_of
from vlcache_fx.runtime.donors.tables import rows_of_sample
from vlcache_fx.runtime.programs.bind import Tables
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.runtime.requests.request import Request, Sample, stack_if_batched
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, StoredSlot, Value


@dataclass(frozen=True)
class ProbeRows:
    """Chooses the rows of the probe run, without a budget."""

    policy: ProbingPolicy
    specs: Mapping[StoredSlot, RowSpec]
    ignores_budget: ClassVar[bool] = True

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``RowChooser``.

        Raises:
            PolicyError: the model has fewer layers, or the policy leaves rows out.
            PlanError: no layer up to the probed one stores keys and values.
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
                f"policy {self.policy.name!r}: select must return all {span.length} rows of a span up to "
                f"layer {self.policy.probe_layer}, not {len(rows[layer])}"
            )
        return rows


class ChosenRows:
    """Chooses rows with a policy, given the deviations that the probe measured.

    Args:
        policy: the policy.
        deviations: one per span, in the order of samples, then of spans.
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
    """Return the chooser of a call's first plans: the policy, or the rows of its probe."""
    return ProbeRows(policy, specs) if isinstance(policy, ProbingPolicy) else policy


def stored_layer(policy: ProbingPolicy, specs: Mapping[StoredSlot, RowSpec]) -> int:
    """Return the last layer, up to the policy's, with stored keys and values."""
    for layer in range(policy.probe_layer, -1, -1):
        if Key(layer) in specs and Value(layer) in specs:
            return layer
    raise PlanError(f"no layer up to {policy.probe_layer} has keys and values of its own to compare")


def needs_probe(policy: Policy, request: Request) -> TypeGuard[ProbingPolicy]:
    """Return True if the policy probes and some reused span is not exact."""
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
    """Return the deviations of all reused spans after exact prefixes, sample by sample.

    The run stores nothing. Rows that it writes to static caches are overwritten by the next run.

    Args:
        policy: its ``probe_layer`` is compared.
        program: the warm program; ``ready`` was called.
        request: a request with donors.
        plans: a plan per sample, made with ``first_chooser``.
        tables: returns the program's donor tables, the same in every call.
        specs: row specs by slot.
        output_rows: as in the plans.

    Returns:
        None if the program failed.
    """
    layer = stored_layer(policy, specs)
    plans = [cut_after(plan, layer, output_rows) for plan in plans]
    results = program.run(request.args, program.bind(stack_if_batched(plans), output_rows, tables))
    if results is None:
        return None
    recorded = dict(
        zip(program.spec.recorded, results[len(results) - len(program.spec.recorded) :], strict=True)
    )

    def distances(sample: Sample, start: int, donor: int, length: int) -> Iterator[Tensor]:
        for slot in (Key(layer), Value(layer)):
            spec, table = specs[slot], tables()[slot]
            stored = table.get() if isinstance(table, PendingTensor) else table
            fresh = rows_of_sample(spec, recorded[slot], sample.index).narrow(spec.dim, start, length)
            yield _squared_distance(fresh, stored.narrow(spec.dim, donor, length), spec.dim)

    found: list[Deviation] = []
    first_donor = 0
    for sample, plan in zip(request.samples, plans, strict=True):
        donor = first_donor + sample.prefix
        for span in _approximate(sample):
            start = int(torch.searchsorted(plan.rows[layer], span.start))  # the plan has all its rows
            key, value = torch.stack([*distances(sample, start, donor, span.length)]).cpu()
            found.append(Deviation(layer, key, value))
            donor += span.length
        first_donor += sum(length_of(entry) for entry in sample.donors)
    return found


def _approximate(sample: Sample) -> list[Span]:
    """Return the reused spans after the exact prefix, in order."""
    return [span for span in sample.spans if span.hit and span.start >= sample.prefix]


@torch.no_grad()
def _squared_distance(fresh: Tensor, stored: Tensor, dim: int) -> Tensor:
    difference = fresh.to(torch.float32) - stored.to(torch.float32)
    return difference.square().movedim(dim, 0).flatten(1).sum(1)

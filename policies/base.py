"""The interface of policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.plan.types import SpanContext

__all__ = ["Deviation", "Policy", "ProbedSpan", "ProbingPolicy", "SpanContext"]


class Policy(ABC):
    """Rule that chooses the rows of a reused span that are recomputed. Subclasses are frozen dataclasses.

    This interface is stable: its names and their meaning change only with a new major version.
    ``vlcache_fx.testing.policy_contract.check_policy`` tests an implementation.

    A choice that violates the rules below is repaired, and the report lists the repairs; with the option
    ``strict`` it is an error. See ``vlcache_fx.plan.repair``.

    Attributes:
        name: the registered name.
        ignores_budget: True if the plan must not cut the choice to the budget.
        keeps_prefix: True if the policy chooses no rows of an identical prefix, whose stored rows are exact.
    """

    name: ClassVar[str]
    ignores_budget: ClassVar[bool] = False
    keeps_prefix: ClassVar[bool] = True

    @abstractmethod
    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """Return the rows of a span to recompute, per layer.

        Args:
            span: the span's length, the model's layers, the budget, and the text around the span.

        Returns:
            ``span.num_layers`` sorted int64 tensors of offsets from the start of the span, each a subset of
            the tensor before (a skipped row has no hidden state in the next layer). Planning is faster if
            neighbouring layers with equal rows get the same object.

        Raises:
            PolicyError: the profile does not fit.
        """


@dataclass(frozen=True, eq=False)
class Deviation:
    """Distance between a span's rows computed in this prompt and the donor's rows, at one layer.

    Both tensors are float32 of shape [span_length], on the CPU: per row, the squared L2 distance summed over
    heads and width. Keys are compared before positions enter, as they are stored. Rotary embeddings do not
    change the distance.

    Attributes:
        layer: index of the layer.
        key: distance of the keys.
        value: distance of the values.
    """

    layer: int
    key: Tensor
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class ProbedSpan(SpanContext):
    """A reused span after the probe.

    Attributes:
        deviation: the probe's measurement; its tensors have the span's length.
    """

    deviation: Deviation


class ProbingPolicy(Policy):
    """A policy that first compares computed rows with the donor's. Subclasses are frozen dataclasses.

    The runtime runs the warm program once with all rows of the reused spans in layers 0 to ``probe_layer``,
    compares their keys and values with the donors', calls ``choose``, and runs the same program again for the
    answer. Nothing else is compiled, and every lowering supports it. The first ``probe_layer`` layers run
    twice, the first time over all tokens. The report has the time as ``timings_ms["probe"]``; its rows and
    shares are those of the second run.

    There is no probe where all reused rows belong to an identical prefix.
    """

    @property
    @abstractmethod
    def probe_layer(self) -> int:
        """Index of the layer whose keys and values are compared: a property, or a field with a default.

        If the layer reads keys or values of an earlier layer, these are compared. Layer 0 is useless: its
        keys and values depend on the token alone. A model without this layer raises ``PolicyError`` when it
        runs.
        """

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """Return the rows of the probe: all up to ``probe_layer``, none after it, whatever the budget."""
        all_rows, no_rows = torch.arange(span.length), torch.empty(0, dtype=torch.int64)
        return tuple(all_rows if layer <= self.probe_layer else no_rows for layer in range(span.num_layers))

    @abstractmethod
    def choose(self, span: ProbedSpan) -> Sequence[Tensor]:
        """Return the rows of a span to recompute for the answer, per layer.

        Args:
            span: as for ``select``, with the deviation from the probe. The budget limits this choice, not
                the probe.

        Returns:
            See ``select``.

        Raises:
            PolicyError: the profile does not fit.
        """

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
    """Chooses the rows of a reused span that are recomputed. Subclasses are frozen dataclasses.

    This interface is stable, so that other packages can build on it: names and meaning of what is here change
    only with a new major version. ``vlcache_fx.testing.policy_contract.check_policy`` tests an implementation
    against it.

    A choice that breaks the rules below is repaired and the report explains how (or refused, with the option
    ``strict``); see ``vlcache_fx.plan.repair``.

    Attributes:
        name: the registered name.
        ignores_budget: True when the choice must not be cut to the budget.
        keeps_prefix: True when the policy is not asked for the rows of an identical prefix, which are exact
            as they are stored.
    """

    name: ClassVar[str]
    ignores_budget: ClassVar[bool] = False
    keeps_prefix: ClassVar[bool] = True

    @abstractmethod
    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """The rows to recompute, for one span.

        Args:
            span: its length, the model's layers, the budget, and the text around it.

        Returns:
            ``span.num_layers`` sorted int64 tensors of offsets relative to the start of the span, each a
            subset of the tensor before (a row that was skipped in a layer has no hidden state in the next).
            Return the same object for neighbouring layers with equal rows: planning is then faster.

        Raises:
            PolicyError: when the profile does not fit.
        """


@dataclass(frozen=True, eq=False)
class Deviation:
    """Distance of a reused span's rows, computed in this prompt, from the donor's at one layer.

    Both tensors are float32 of shape [span_length], on the CPU: per row, the squared L2 distance summed over
    heads and width. Keys are compared where they are stored, before positions enter. Under rotary embeddings
    the distance is the same after the rotation, which keeps lengths.

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
        deviation: what the probe measured; its tensors have the span's length.
    """

    deviation: Deviation


class ProbingPolicy(Policy):
    """A policy that first compares rows with the donor's. Subclasses are frozen dataclasses.

    The runtime runs the warm program once with all rows of the reused spans in layers 0 to ``probe_layer``,
    compares their keys and values with the donors', calls ``choose``, and runs the warm program again for the
    answer. It is the same program, so nothing is compiled for it, and every lowering supports it. The price:
    the first ``probe_layer`` layers run twice, over all tokens the first time. The report has the time as
    ``timings_ms["probe"]``; its rows and shares are those of the answer.

    Where all reused rows belong to an identical prefix there is nothing to choose, and no probe.
    """

    @property
    @abstractmethod
    def probe_layer(self) -> int:
        """Index of the layer whose keys and values are compared: a property, or a field with a default.

        Where a layer reads keys or values of an earlier layer, those are compared. Layer 0 shows nothing:
        its keys and values depend on the token alone. A model that has no such layer is a ``PolicyError``
        when it runs.
        """

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """The rows of the probe: all of them up to ``probe_layer``, none after it. No budget limits them."""
        all_rows, no_rows = torch.arange(span.length), torch.empty(0, dtype=torch.int64)
        return tuple(all_rows if layer <= self.probe_layer else no_rows for layer in range(span.num_layers))

    @abstractmethod
    def choose(self, span: ProbedSpan) -> Sequence[Tensor]:
        """The rows to recompute for the answer, for one span.

        Args:
            span: as for ``select``, with the deviation that the probe measured. Its budget limits this
                choice, not the probe.

        Returns:
            See ``select``.

        Raises:
            PolicyError: when the profile does not fit.
        """

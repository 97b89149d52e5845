"""What a policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.policies.profile import Profile


class Policy(ABC):
    """Chooses the rows of a reused span that are recomputed. Subclasses are frozen dataclasses.

    This interface is stable, so that other packages can build on it: names, arguments and meaning of what is
    here change only with a new major version. ``vlcache_fx.testing.policy_contract.check_policy`` tests an
    implementation against it.

    A choice that breaks the rules below is repaired and the report explains how (or refused, with the option
    ``strict``); see ``vlcache_fx.plan.repair``.

    Attributes:
        name: the registered name.
        ignores_budget: True when the choice must not be cut to the budget.
        keeps_prefix: True where rows behind an identical prefix, which are exact as they are stored, need not
            be asked for.
    """

    name: ClassVar[str]
    ignores_budget: ClassVar[bool] = False
    keeps_prefix: ClassVar[bool] = True

    @abstractmethod
    def select(
        self, span_length: int, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """The rows to recompute, for one span.

        Args:
            span_length: tokens in the span.
            num_layers: layers of the model, L.
            profile: the model's sensitivities, if there are any.
            budget: share in [0, 1] of the span's token-layers that may be recomputed.

        Returns:
            L sorted int64 tensors of offsets relative to the start of the span, each a subset of the one
            before (a row that was skipped in a layer has no hidden state in the next). Return the same object
            for neighbouring layers with equal rows: planning is then faster.

        Raises:
            PolicyError: when the profile does not fit.
        """


@dataclass(frozen=True, eq=False)
class Deviation:
    """How far the rows of one reused span, computed behind this prompt, are from the donor's at one layer.

    Both tensors are float32 of shape [span_length], on the CPU: per row, the squared L2 distance summed over
    heads and width. Keys are compared where they are stored, before positions enter. Under rotary embeddings
    the distance is the same behind the rotation, which keeps lengths.

    Attributes:
        layer: index of the layer.
        key: distance of the keys.
        value: distance of the values.
    """

    layer: int
    key: Tensor
    value: Tensor


class ProbingPolicy(Policy):
    """A policy that first looks how far rows are from the donor's. Subclasses are frozen dataclasses.

    The runtime runs the warm program once with all rows of the reused spans in layers 0 to ``probe_layer``,
    compares their keys and values with the donors', asks ``choose``, and runs the warm program again for the
    answer. It is the same program, so nothing is compiled for it and every lowering serves. The price is that
    the first ``probe_layer`` layers run twice, over all tokens the first time. The report has the time as
    ``timings_ms["probe"]``; its rows and shares are those of the answer.

    Where all that is reused lies behind an identical prefix there is nothing to choose, and no probe.
    """

    @property
    @abstractmethod
    def probe_layer(self) -> int:
        """Index of the layer whose keys and values are compared: a property, or a field with a default.

        Where a layer reads keys or values of an earlier one, that one is looked at. Layer 0 shows nothing:
        its keys and values depend on the token alone. A model that has no such layer is a ``PolicyError``
        when it runs.
        """

    def select(
        self, span_length: int, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """The rows of the probe: all of them up to ``probe_layer``, none behind it. No budget limits them."""
        all_rows, no_rows = torch.arange(span_length), torch.empty(0, dtype=torch.int64)
        return tuple(all_rows if layer <= self.probe_layer else no_rows for layer in range(num_layers))

    @abstractmethod
    def choose(
        self, deviation: Deviation, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """The rows to recompute for the answer, for one span.

        Args:
            deviation: what the probe found; its tensors have the span's length.
            num_layers: see ``select``.
            profile: see ``select``.
            budget: see ``select``. It limits this choice, not the probe.

        Returns:
            See ``select``.

        Raises:
            PolicyError: when the profile does not fit.
        """

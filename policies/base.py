"""What a policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vlcache_fx.policies.profile import Profile


class Policy(ABC):
    """Chooses the rows of a reused span that are recomputed. Subclasses are frozen dataclasses.

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

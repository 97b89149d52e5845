"""What a policy is, and the profile it may use."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vlcache_fx.errors import PolicyError


@dataclass(frozen=True)
class Profile:
    """How much reuse error matters in each layer of one model, as measured by a calibrator.

    Attributes:
        model_fingerprint: fingerprint of the weights it was measured on.
        dtype: their dtype, such as ``"bfloat16"``.
        sensitivities: one finite number >= 0 per layer; only their ratios matter.
    """

    model_fingerprint: str
    dtype: str
    sensitivities: tuple[float, ...]

    def __post_init__(self) -> None:
        values = self.sensitivities
        if not isinstance(self.model_fingerprint, str) or not isinstance(self.dtype, str):
            raise PolicyError("a profile's model_fingerprint and dtype must be strings")
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise PolicyError("a profile's sensitivities must be a list with one number per layer")
        for layer, value in enumerate(values):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise PolicyError(
                    f"a profile's sensitivity of layer {layer} must be a number >= 0, not {value!r}"
                )
        object.__setattr__(self, "sensitivities", tuple(float(value) for value in values))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a profile from JSON.

        Raises:
            PolicyError: when the file cannot be read or is not a profile.
        """
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PolicyError(f"cannot read the profile {os.fspath(path)!r}: {error}") from error
        names = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) != names:
            raise PolicyError(
                f"the profile {os.fspath(path)!r} must be a JSON object with exactly these names: "
                f"{', '.join(sorted(names))}"
            )
        return cls(**data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON that ``load`` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


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

"""The profile: the measured worth of recomputing in each layer of a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlcache_fx.errors import PolicyError
from vlcache_fx.version import VERSION


@dataclass(frozen=True)
class Profile:
    """The worth of recomputing in each layer of a model; ``vlcache calibrate`` measures it.

    Attributes:
        model_fingerprint: fingerprint of the measured weights (``Engine.last_report["model_fingerprint"]``).
        dtype: dtype of the keys and values, such as ``"bfloat16"``.
        sensitivities: a finite number >= 0 per layer: the share of recomputing's gain that is lost when rows
            stop before this layer instead of after it. Only the ratios matter.
        error_curve: ``(share, error)`` pairs: the error against full recompute (mean KL divergence of the
            next token, in nats) when this share of a span's earliest rows is recomputed in all layers. The
            shares rise from 0 to 1. Empty if not measured.
        curves_by_contexts: ``(contexts, error curve)`` pairs for donors of several contexts, rising.
        donor_rank: the option with which they were measured.
        library_version: version of vlcache_fx at the measurement. Other versions may compute other values.
    """

    model_fingerprint: str
    dtype: str
    sensitivities: tuple[float, ...]
    error_curve: tuple[tuple[float, float], ...] = ()
    curves_by_contexts: tuple[tuple[int, tuple[tuple[float, float], ...]], ...] = ()
    donor_rank: int = 0
    library_version: str = VERSION

    def __post_init__(self) -> None:
        for name in ("model_fingerprint", "dtype", "library_version"):
            if not isinstance(getattr(self, name), str):
                raise PolicyError(f"a profile's {name} must be a string, not {getattr(self, name)!r}")
        if not _is_list(self.sensitivities) or not self.sensitivities:
            raise PolicyError("a profile's sensitivities must be a list with one number per layer")
        for layer, value in enumerate(self.sensitivities):
            if not _is_amount(value):
                raise PolicyError(
                    f"a profile's sensitivity of layer {layer} must be a number >= 0, not {value!r}"
                )
        object.__setattr__(self, "sensitivities", tuple(float(value) for value in self.sensitivities))
        object.__setattr__(self, "error_curve", _checked_curve(self.error_curve))
        object.__setattr__(self, "curves_by_contexts", _checked_curves(self.curves_by_contexts))
        if not _is_count(self.donor_rank):
            raise PolicyError(f"a profile's donor_rank must be an integer >= 0, not {self.donor_rank!r}")

    def __repr__(self) -> str:
        values = f"sensitivities {min(self.sensitivities):.2g} to {max(self.sensitivities):.2g}"
        flat = len(set(self.sensitivities)) == 1
        shares = ", ".join(f"{error:.2g} at {100 * share:g} %" for share, error in self.error_curve[:-1])
        contexts = ", ".join(str(count) for count, _ in self.curves_by_contexts)
        parts = [
            f"{len(self.sensitivities)} layers of {self.model_fingerprint[:8]} in {self.dtype}",
            "flat" if flat else values,
            *([f"error {shares}"] if shares else []),
            *([f"also for {contexts} contexts"] if contexts else []),
        ]
        return f"<Profile {', '.join(parts)}>"

    def for_contexts(self, contexts: int) -> Profile:
        """Return the profile for donors of so many contexts: with the curve of the next smaller number."""
        curve = self.error_curve
        for count, measured in self.curves_by_contexts:
            curve = measured if count <= contexts else curve
        return replace(self, error_curve=curve, curves_by_contexts=(), donor_rank=0)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile from a JSON file.

        Raises:
            PolicyError: the file cannot be read or is not a profile.
        """
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PolicyError(f"cannot read the profile {os.fspath(path)!r}: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise PolicyError(
                f"the profile {os.fspath(path)!r} must be a JSON object with exactly these names: "
                f"{', '.join(sorted(names))}"
            )
        return cls(**data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a JSON file for ``load``."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def misfits(self, model_fingerprint: str, dtype: str) -> str | None:
        """Return the reason why the profile is not valid for a model, in words, or None."""
        wanted = {
            "model_fingerprint": model_fingerprint,
            "dtype": dtype,
            "library_version": VERSION,
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                return (
                    f"the profile is for {name} {getattr(self, name)!r}, this is {value!r}; calibrate this "
                    "model (vlcache calibrate)"
                )
        return None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_amount(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0


def _checked_curve(curve: Any) -> tuple[tuple[float, float], ...]:
    pairs = [tuple(pair) if _is_list(pair) else () for pair in curve] if _is_list(curve) else [()]
    if not all(len(pair) == 2 and all(_is_amount(value) for value in pair) for pair in pairs):
        raise PolicyError("a profile's error_curve must be a list of pairs (share, error), numbers >= 0")
    checked = tuple((float(share), float(error)) for share, error in pairs)
    if checked and not (checked[0][0] == 0 and checked[-1][0] == 1 and _rises(x for x, _ in checked)):
        raise PolicyError("the shares of a profile's error_curve must rise from 0 to 1")
    return checked


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_curves(curves: Any) -> tuple[tuple[int, tuple[tuple[float, float], ...]], ...]:
    pairs = [tuple(pair) if _is_list(pair) else () for pair in curves] if _is_list(curves) else [()]
    if not all(len(pair) == 2 and _is_count(pair[0]) and pair[0] > 1 for pair in pairs):
        raise PolicyError(
            "a profile's curves_by_contexts must be a list of pairs (contexts, error curve), contexts > 1"
        )
    if not _rises(float(count) for count, _ in pairs):
        raise PolicyError("the contexts of a profile's curves_by_contexts must rise")
    return tuple((count, _checked_curve(curve)) for count, curve in pairs)


def _rises(values: Iterable[float]) -> bool:
    return all(a < b for a, b in pairwise(values))

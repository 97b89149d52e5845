"""Predicted times: what operations and bytes alone would take on this machine. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """A lower bound of the decoder's time.

    Attributes:
        flops: floating-point operations.
        nbytes: bytes read once.
        ms: the longer time of both at the measured rates, in milliseconds.
        limited_by: ``compute`` or ``memory``.
    """

    flops: float
    nbytes: float
    ms: float
    limited_by: str


@dataclass(frozen=True)
class Predictions:
    """Lower bounds of a call.

    Attributes:
        full: of computing all rows; None where unknown.
        request: of the rows of this call; None where unknown.
        note: why something is unknown, or which rates were measured.
    """

    full: Prediction | None = None
    request: Prediction | None = None
    note: str = "not predicted: the rates of this machine were not measured (vlcache explain measures them)"

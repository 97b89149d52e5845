"""The stages of a call, with their times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STAGES: Mapping[str, str] = {
    "encoder": "encoders, or the lookup of their outputs",
    "identify": "spans and keys",
    "wait": "for a request that computes the same",
    "lookup": "donors in the store",
    "plan": "policy and plan",
    "probe": "first run of a probing policy",
    "bind": "plan and donors as inputs",
    "run": "the decoder's program",
    "admit": "storing new donors",
}
"""What happens in each stage, in order."""


@dataclass(frozen=True)
class Stage:
    """A stage of a call.

    Attributes:
        name: as in ``timings_ms`` of reports, or ``encoder``.
        ms: its time in milliseconds.
        text: what happens in it.
    """

    name: str
    ms: float
    text: str


def stages_of(timings_ms: Mapping[str, float], encoder_ms: float | None) -> tuple[Stage, ...]:
    """Return the stages of a call in order; those that did not happen are left out.

    Args:
        timings_ms: of its report.
        encoder_ms: time of its encoders; None without any.
    """
    found = dict(timings_ms) if encoder_ms is None else {"encoder": encoder_ms, **timings_ms}
    names = [*(name for name in STAGES if name in found), *(name for name in found if name not in STAGES)]
    return tuple(Stage(name, found[name], STAGES.get(name, "")) for name in names)

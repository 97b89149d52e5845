"""What one call did, as plain data."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vlcache_fx.errors import Reason

Mode = Literal["cold", "warm", "bypass"]


@dataclass(frozen=True)
class SpanReport:
    """One span: token positions in its sample, the key of its item, and whether its rows were reused.

    ``donor_tier`` and ``donor_contexts`` are of the donor that was found: where it lies, and the number of
    contexts that it is the mean of, 1 for one that is exact somewhere; None and 0 where there is none.
    ``miss_reason`` says why its rows were not reused, None for a hit. A donor that is there is not reused
    in a call that is computed in full so as to record another one (``recomputed_to_record``).
    """

    start: int
    length: int
    key: str
    hit: bool
    donor_tier: str | None = None
    sample: int = 0
    donor_contexts: int = 0
    miss_reason: Reason | None = None


@dataclass(frozen=True)
class Report:
    """What one call did.

    Attributes:
        mode: ``cold`` (everything computed, donors recorded), ``warm`` (donors reused) or ``bypass`` (run
            without reuse, for ``reason``).
        reason: why, in words, on one line; None for a warm call.
        reason_code: the same, typed; None for a warm call.
        num_tokens: sequence length, 0 where it is not known.
        spans: the media spans found.
        rows_per_layer: rows computed at each layer, and after the last one, of every sample.
        prefix_tokens: leading tokens that were reused exactly: everything before them is identical too.
        token_layer_fraction: recomputed share of the reused spans' token-layers; 1.0 in a cold call.
        encoder_hit: True where the encoder was skipped, False where it ran, None where this call has none.
        timings_ms: milliseconds per step of the call.
        explanations: repairs that the plan made.
        model_fingerprint: of the decoder's weights, by which an engine tells models apart and to which a
            profile is bound; empty where no span was found.
        shadow_kl: of a warm call that was computed in full as well: mean KL divergence, in nats, of the
            logits with reuse from the exact ones, which were returned. None for every other call.
    """

    mode: Mode
    reason: str | None
    num_tokens: int = 0
    spans: tuple[SpanReport, ...] = ()
    rows_per_layer: tuple[int, ...] = ()
    prefix_tokens: int = 0
    token_layer_fraction: float = 1.0
    encoder_hit: bool | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    explanations: tuple[str, ...] = ()
    model_fingerprint: str = ""
    shadow_kl: float | None = None
    reason_code: Reason | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)

    def as_view(self) -> "ReportView":
        """The same as a mapping whose entries are attributes, too."""
        return ReportView(asdict(self, dict_factory=ReportView))


class ReportView(dict[str, Any]):
    """A report, or a span of one, as plain data: ``report["mode"]`` and ``report.mode`` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"a report has no {name!r}; it has {', '.join(self)}") from None

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {name: _plain(value) for name, value in self.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, ReportView):
        return value.as_dict()
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return dict(value) if isinstance(value, dict) else value


def why_cold(misses: list[Reason]) -> tuple[str, Reason]:
    """``(reason, reason_code)`` of a call that was computed in full, by those of its spans.

    The code is that of the first span without a donor.
    """
    code = next((one for one in misses if one is not Reason.RECOMPUTED_TO_RECORD), misses[0])
    if len(set(misses)) == 1:
        return f"no donor for its spans: {code.text}", code
    counts = [f"{misses.count(one)} x {one.text}" for one in dict.fromkeys(misses)]
    return f"no donor for its spans: {'; '.join(counts)}", code


def one_line(text: str) -> str:
    """A reason as reports carry it: errors of others have many lines."""
    return " ".join(text.split())

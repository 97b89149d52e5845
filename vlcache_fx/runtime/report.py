"""What one call did, as plain data."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Mode = Literal["cold", "warm", "bypass"]


@dataclass(frozen=True)
class SpanReport:
    """One span: token positions in its sample, the key of its item, whether a donor was found, and where.

    ``donor_contexts`` is the number of contexts that the donor is the mean of: 1 for one that is exact
    somewhere, 0 for a miss.
    """

    start: int
    length: int
    key: str
    hit: bool
    donor_tier: str | None = None
    sample: int = 0
    donor_contexts: int = 0


@dataclass(frozen=True)
class Report:
    """What one call did.

    Attributes:
        mode: ``cold`` (everything computed, donors recorded), ``warm`` (donors reused) or ``bypass`` (run
            without reuse, for ``reason``).
        reason: why, in words; None for a warm call.
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)

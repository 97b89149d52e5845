"""Reports of calls, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vlcache_fx.errors import Reason
from vlcache_fx.runtime.report_text import as_html, summary

Mode = Literal["cold", "warm", "bypass"]


@dataclass(frozen=True)
class SpanReport:
    """One span of a call.

    Attributes:
        start, length: its tokens, counted from the first of the sample.
        key: key of its donor.
        hit: True if its rows were reused.
        donor_tier: tier of the donor; None without one.
        donor_contexts: number of contexts in the donor's mean, 1 for an exact donor; 0 without one.
        sample: index of the sample.
        miss_reason: why its rows were not reused; None for a hit. ``recomputed_to_record`` means that a donor
            exists, but the call computed all rows to record another donor.
        miss_detail: details of the reason, such as the slot that does not fit; may be empty. It never tells
            of entries of other salts.
    """

    start: int
    length: int
    key: str
    hit: bool
    donor_tier: str | None = None
    sample: int = 0
    donor_contexts: int = 0
    miss_reason: Reason | None = None
    miss_detail: str = ""


@dataclass(frozen=True)
class SampleReport:
    """What differs between the prompts of a batch, besides their spans.

    Attributes:
        num_tokens: its tokens, without padding where that is known.
        prefix_tokens, token_layer_fraction: as in ``Report``, of this prompt.
    """

    num_tokens: int
    prefix_tokens: int = 0
    token_layer_fraction: float = 1.0


@dataclass(frozen=True)
class Report:
    """Report of one call.

    Attributes:
        mode: ``cold`` (all rows computed, donors recorded), ``warm`` (donors reused) or ``bypass`` (run
            without reuse, for ``reason``).
        reason: reason of a cold or bypassed call, one line of text; None for a warm call.
        reason_code: the typed reason; None for a warm call.
        num_tokens: sequence length; 0 where unknown.
        spans: the spans found.
        rows_per_layer: computed rows at each layer and after the last, per sample.
        prefix_tokens: leading tokens whose rows were reused exactly.
        token_layer_fraction: recomputed share of the reused spans' token-layers; 1.0 in a cold call.
        encoder_hit: True if the encoder was skipped, False if it ran, None without an encoder.
        timings_ms: milliseconds per step of the call.
        explanations: repairs of the policy's choice.
        model_fingerprint: fingerprint of the decoder's weights, which identifies the model in guards and
            profiles; empty without spans.
        shadow_kl: in a shadow run, the mean KL divergence in nats of the logits with reuse from the exact
            logits, which were returned; else None.
        num_samples: number of prompts; 0 where unknown.
        samples: a report per prompt of a batch; empty for one prompt and for a bypass.
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
    num_samples: int = 0
    samples: tuple[SampleReport, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serializable data."""
        return asdict(self)

    def as_view(self) -> "ReportView":
        """Return the report as a mapping whose entries are also attributes."""
        return ReportView(asdict(self, dict_factory=ReportView))


class ReportView(dict[str, Any]):
    """A report or span report as plain data: ``report["mode"]`` equals ``report.mode``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"a report has no {name!r}; it has {', '.join(self)}") from None

    def __repr__(self) -> str:
        if "mode" not in self:  # of a span
            return dict.__repr__(self)
        return f"<Report {summary(self)}>"

    def _repr_html_(self) -> str | None:
        """Return tables for notebooks."""
        return as_html(self) if "mode" in self else None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serializable data."""
        return {name: _plain(value) for name, value in self.items()}

    def of_sample(self, index: int) -> "ReportView":
        """Return the part of one prompt of a batch, as a report of this prompt.

        Times, ``encoder_hit``, ``rows_per_layer`` (equal for all prompts), ``shadow_kl`` and ``explanations``
        stay those of the call. A prompt without spans in a call with spans is a ``bypass``, as it would be
        alone.

        Args:
            index: index of the prompt, from 0.

        Raises:
            IndexError: the batch has no such prompt.
        """
        count = self["num_samples"]
        if index < 0 or (count and index >= count):
            raise IndexError(f"a batch of {count} prompts has no prompt {index}")
        own = ReportView(self)
        own["spans"] = tuple(span for span in self["spans"] if span["sample"] == index)
        own["samples"] = ()
        own["num_samples"] = min(count, 1)
        if self["samples"]:
            own.update(self["samples"][index])
            own.update(zip(("mode", "reason", "reason_code"), _outcome(own["spans"]), strict=True))
        return own


def _outcome(spans: Sequence[Mapping[str, Any]]) -> tuple[Mode, str | None, Reason | None]:
    """Return mode, reason and typed reason of a prompt, given its spans."""
    if not spans:
        return "bypass", Reason.NO_SPAN.text, Reason.NO_SPAN
    misses = [span["miss_reason"] for span in spans if span["miss_reason"] is not None]
    if len(misses) < len(spans):
        return "warm", None, None
    return "cold", *why_cold(misses)


def _plain(value: Any) -> Any:
    if isinstance(value, ReportView):
        return value.as_dict()
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return dict(value) if isinstance(value, dict) else value


def why_cold(misses: Sequence[Reason], details: Sequence[str] = ()) -> tuple[str, Reason]:
    """Return ``(reason, reason_code)`` of a cold call, given the miss reasons of its spans.

    The code is that of the first span without a donor.

    Args:
        misses: the reason of each span.
        details: their details, in the same order; may be empty.
    """
    recomputed = (Reason.RECOMPUTED_TO_RECORD, Reason.RECOMPUTED_TO_REFINE)
    code = next((miss for miss in misses if miss not in recomputed), misses[0])
    pairs = zip(misses, [*details, *("" for _ in misses)], strict=False)
    texts = [f"{miss.text} ({detail})" if detail else miss.text for miss, detail in pairs]
    if len(set(texts)) == 1:
        return f"no donor for its spans: {texts[0]}", code
    counts = [f"{texts.count(text)} x {text}" for text in dict.fromkeys(texts)]
    return f"no donor for its spans: {'; '.join(counts)}", code


def one_line(text: str) -> str:
    """Return text as one line, for ``reason``: error messages may have many lines."""
    return " ".join(text.split())

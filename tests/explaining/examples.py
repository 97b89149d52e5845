"""Hand-made explanations."""

from __future__ import annotations

from vlcache_fx.errors import Reason
from vlcache_fx.explaining.explained_call import SampleExplanation
from vlcache_fx.explaining.explanation import Explanation
from vlcache_fx.explaining.stages import stages_of
from vlcache_fx.explaining.tokens import classify
from vlcache_fx.runtime.observation import DonorFacts, SampleObservation
from vlcache_fx.runtime.report import Report, SpanReport

SAMPLE = SampleObservation(
    num_tokens=20,
    prefix=2,
    media=((4, 10), (12, 16)),
    reused=((4, 10),),
    rows=(((2, 6), (10, 18)), ((2, 5), (10, 18)), ((17, 18),)),
)
"""Two tokens of prefix, two of text, six of a reused image (the first is
recomputed, the second in one of two layers), two of text, four of
another image without a donor, two of text, and two of padding."""

COUNTS = {"text": 6, "prefix": 2, "reused": 4, "partly": 1, "recomputed": 1, "computed": 4, "padding": 2}


def hand_made(texts: tuple[str, ...] = ()) -> Explanation:
    """An explanation of ``SAMPLE``."""
    report = Report(
        "warm",
        None,
        20,
        spans=(
            SpanReport(4, 6, "donor-aa-bb-cc", True, "memory", donor_contexts=2),
            SpanReport(12, 4, "donor-aa-bb-dd", False, miss_reason=Reason.EVICTED, miss_detail="memory tier"),
        ),
        rows_per_layer=(12, 11, 1),
        timings_ms={"run": 8.0, "plan": 2.0},
    )
    donor = DonorFacts("donor-aa-bb-cc", 0, 4, 6, "memory", 2, ("int8",), 4, 3 * 1024, unused_s=600.0)
    sample = SampleExplanation(
        20, 2, classify(SAMPLE), SAMPLE.rows[:-1], tuple(range(20)) if texts else (), texts
    )
    return Explanation(
        (), report.as_view(), (sample,), (donor,), stages=stages_of(report.timings_ms, 1.5), lowering="eager"
    )

"""The explanation of one call, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, overload

from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.errors import Reason
from vlcache_fx.explaining.prediction import Predictions
from vlcache_fx.explaining.stages import Stage
from vlcache_fx.explaining.tokens import TokenClass, TokenRange, count
from vlcache_fx.runtime.donors.explain_miss import MissExplanation
from vlcache_fx.runtime.observation import DonorFacts, Ranges
from vlcache_fx.runtime.report import ReportView


@dataclass(frozen=True)
class Refusal:
    """Something that was not reused.

    Attributes:
        subject: ``graph``, ``call`` or ``image at token 3 of prompt 0``.
        reason: why.
        text: why, in words.
        advice: what to do about it.
    """

    subject: str
    reason: Reason
    text: str
    advice: str


@dataclass(frozen=True)
class SampleExplanation:
    """One prompt.

    Attributes:
        num_tokens: its tokens, padding included; 0 where unknown.
        prefix: leading tokens that were reused exactly.
        ranges: what became of its tokens.
        rows: tokens that each layer computes; empty for a call that ran unmodified.
        token_ids: ids of its tokens; empty where unknown.
        texts: texts of its tokens; empty without a tokenizer.
    """

    num_tokens: int
    prefix: int = 0
    ranges: tuple[TokenRange, ...] = ()
    rows: tuple[Ranges, ...] = ()
    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ExplainedCall(Sequence[GraphExplanation]):
    """What becomes of one call, and why. A sequence of its graphs' explanations.

    Attributes:
        graphs: explanations of the traced graphs.
        report: report of the call; None if no graph reported one.
        samples: its prompts.
        donors: donors of its reused spans.
        misses: why other spans were not reused: the nearest entry and what differs.
        stages: measured times of the call, in order.
        predictions: what operations and bytes alone would take.
        lowering: the lowering with which the times were measured.
        settings: policy and budget in force.
    """

    graphs: tuple[GraphExplanation, ...]
    report: ReportView | None = None
    samples: tuple[SampleExplanation, ...] = ()
    donors: tuple[DonorFacts, ...] = ()
    misses: tuple[MissExplanation, ...] = ()
    stages: tuple[Stage, ...] = ()
    predictions: Predictions = field(default_factory=Predictions)
    lowering: str = "eager"
    settings: Mapping[str, str] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> GraphExplanation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[GraphExplanation, ...]: ...
    def __getitem__(self, index: int | slice) -> GraphExplanation | tuple[GraphExplanation, ...]:
        return self.graphs[index]

    def __len__(self) -> int:
        return len(self.graphs)

    @property
    def counts(self) -> dict[TokenClass, int]:
        """Number of tokens of each class that occurs, in all prompts."""
        return count(run for sample in self.samples for run in sample.ranges)

    @property
    def mode(self) -> str:
        """``cold``, ``warm`` or ``bypass``; ``unknown`` without a report."""
        return "unknown" if self.report is None else str(self.report.mode)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What was not reused: graphs, the call, and spans."""
        found = [
            Refusal(f"graph: {graph.kind}", graph.reason_code, graph.reason or "", graph.reason_code.advice)
            for graph in self.graphs
            if graph.reason_code is not None
        ]
        codes = {refusal.reason for refusal in found}
        code = None if self.report is None else self.report.reason_code
        spans = () if self.report is None else self.report.spans
        missed = [span for span in spans if span.miss_reason is not None]
        if self.report is not None and code is not None and code not in codes and not missed:
            found.append(Refusal("call", code, self.report.reason or code.text, code.advice))
        for span in missed:
            reason = Reason(span.miss_reason)
            detail = f" ({span.miss_detail})" if span.miss_detail else ""
            subject = f"image at token {span.start}" + (f" of prompt {span.sample}" if span.sample else "")
            found.append(Refusal(subject, reason, f"{reason.text}{detail}", reason.advice))
        return tuple(found)

    def with_texts(
        self, decode: Callable[[list[int]], str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Self:
        """Return the explanation with the texts of tokens.

        Args:
            decode: text of token ids, such as ``tokenizer.decode``.
            token_ids: ids of each prompt's tokens, where the call had embeddings instead. Prompts of other
                lengths keep theirs.
        """
        given = list(map(tuple, token_ids or ()))
        samples = [
            replace(sample, token_ids=given[index])
            if index < len(given) and len(given[index]) == sample.num_tokens
            else sample
            for index, sample in enumerate(self.samples)
        ]
        texts = {token: "" for sample in samples for token in sample.token_ids}
        texts |= {token: str(decode([token])) for token in texts}
        return replace(
            self,
            samples=tuple(
                replace(sample, texts=tuple(texts[token] for token in sample.token_ids)) for sample in samples
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON-serializable data."""
        return {
            "mode": self.mode,
            "counts": {kind.value: number for kind, number in self.counts.items()},
            "report": None if self.report is None else self.report.as_dict(),
            "settings": dict(self.settings),
            "samples": [asdict(sample) for sample in self.samples],
            "stages": [asdict(stage) for stage in self.stages],
            "lowering": self.lowering,
            "predictions": asdict(self.predictions),
            "donors": [asdict(donor) for donor in self.donors],
            "misses": [miss.as_dict() for miss in self.misses],
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "graphs": [graph.as_dict() for graph in self.graphs],
        }

"""The outcome of a stress run, as plain data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

MOST_EXAMPLES = 20
"""Number of problems that are kept in words."""


@dataclass
class StressResult:
    """What happened; events are added while the run goes on.

    Attributes:
        seconds: duration.
        processes, threads: worker processes at a time, and threads of each.
        requests: answered requests.
        modes: answered requests by mode.
        compared: answers that were compared with the unmodified model's; the others had only to be finite.
        largest_difference: of the compared logits.
        slowest_s: seconds of the slowest request, compilation included.
        faults: injected faults by kind.
        killed: worker processes that were killed, and replaced.
        bound_samples: how often the size of a folder was measured.
        largest_folder_bytes: largest sum of the sizes of its files.
        wrong_answers, failed_requests, bound_exceeded: must be 0.
        problems: the first of them in words.
    """

    seconds: float = 0.0
    processes: int = 0
    threads: int = 0
    requests: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    largest_difference: float = 0.0
    slowest_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    killed: int = 0
    bound_samples: int = 0
    largest_folder_bytes: int = 0
    wrong_answers: int = 0
    failed_requests: int = 0
    bound_exceeded: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def reuse_share(self) -> float:
        """Share of the requests that reused rows."""
        return self.modes["warm"] / max(1, self.requests)

    @property
    def is_clean(self) -> bool:
        """True if nothing was wrong, failed, or exceeded its bound."""
        return not (self.wrong_answers or self.failed_requests or self.bound_exceeded)

    def add(self, event: Mapping[str, Any]) -> None:
        """Add an event of a worker. Not safe in threads."""
        match event["event"]:
            case "answer":
                self.requests += 1
                self.modes[event["mode"]] += 1
                self.compared += event["compared"]
                self.largest_difference = max(self.largest_difference, event["difference"])
                self.slowest_s = max(self.slowest_s, event["seconds"])
                if "wrong" in event:
                    self.wrong_answers += 1
                    self.note(f"wrong: {event['wrong']}")
            case "fault":
                self.faults[event["fault"]] += 1
            case "failure":
                self.failed_requests += 1
                self.note(f"failed: {event['error']}")
            case "folder":
                self.bound_samples += 1
                self.largest_folder_bytes = max(self.largest_folder_bytes, event["used"])
            case "bound":
                self.bound_exceeded += 1
                self.note(f"bound: {event['tier']}: {event['used']:,} of {event['capacity']:,} bytes")

    def note(self, problem: str) -> None:
        """Keep a problem in words, if there are not too many."""
        if len(self.problems) < MOST_EXAMPLES:
            self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON-serialisable data."""
        return vars(self) | {"reuse_share": self.reuse_share, "problems": list(self.problems)}


def rows(result: StressResult) -> Iterator[tuple[str, str]]:
    """Yield the lines of the table: name and value."""
    yield "requests", f"{result.requests:,}"
    yield "seconds", f"{result.seconds:.0f}"
    yield "processes x threads", f"{result.processes} x {result.threads}"
    yield "with reuse", f"{100 * result.reuse_share:.0f} %"
    yield "compared with the unmodified model", f"{result.compared:,}"
    yield "largest difference of logits", f"{result.largest_difference:.2g}"
    yield "slowest request", f"{result.slowest_s:.2f} s"
    for fault, count in sorted(result.faults.items()):
        yield f"fault: {fault}", f"{count:,}"
    yield "processes killed", f"{result.killed:,}"
    yield "wrong answers", f"{result.wrong_answers:,}"
    yield "failed requests", f"{result.failed_requests:,}"
    yield "bound exceeded", f"{result.bound_exceeded:,}"


def table(result: StressResult) -> Table:
    """Create a table of the result."""
    made = Table(title="Stress", title_style="bold")
    made.add_column("")
    made.add_column("", justify="right")
    for name, value in rows(result):
        made.add_row(name, value)
    return made


def markdown(result: StressResult) -> str:
    """Return the table in Markdown."""
    lines = ["| stress | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows(result))]
    return "\n".join(lines)

"""The reports of a context: the last one, and those that the caller collects."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import overload

from vlcache_fx.runtime.context_value import ContextValue
from vlcache_fx.runtime.report import Report, ReportView


class CollectedReports(Sequence[ReportView]):
    """Reports of the calls in a ``with engine.reports()``, in the order in which the calls ended.

    Safe to share between threads. Unchanged after the body.
    """

    def __init__(self) -> None:
        self._views: list[ReportView] = []
        self._is_open = True
        self._lock = threading.Lock()

    @overload
    def __getitem__(self, index: int) -> ReportView: ...
    @overload
    def __getitem__(self, index: slice) -> list[ReportView]: ...
    def __getitem__(self, index: int | slice) -> ReportView | list[ReportView]:
        return self._views[index]

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._views!r})"

    def as_list(self) -> list[dict[str, object]]:
        """Return the reports as JSON-serializable data."""
        return [view.as_dict() for view in self._views]

    def add(self, report: Report, *, continues: bool) -> None:
        """Add a report; see ``ContextReports.add``."""
        with self._lock:
            if self._is_open and not (continues and self._views and self._views[-1].spans):
                self._views.append(report.as_view())

    def end(self) -> None:
        """Take no further reports."""
        with self._lock:
            self._is_open = False


class ContextReports:
    """The reports of each context: of a thread or a task of asyncio."""

    def __init__(self) -> None:
        self._last: ContextValue[Report] = ContextValue()
        self._open: ContextValue[tuple[CollectedReports, ...]] = ContextValue()

    @property
    def last(self) -> Report | None:
        """The report of this context's last call."""
        return self._last.get()

    def add(self, report: Report, *, continues: bool = False) -> None:
        """Add the report of a call.

        Args:
            report: its report.
            continues: the call has no media and continues a prompt in a cache. The report before it stays the
                last one, if it has media.
        """
        last = self.last
        if not (continues and last is not None and last.spans):
            self._last.set(report)
        for collected in self._open.get() or ():
            collected.add(report, continues=continues)

    @contextmanager
    def collect(self) -> Iterator[CollectedReports]:
        """Collect the reports of calls in the body, in this context and in copies of it."""
        collected = CollectedReports()
        with self._open.using((*(self._open.get() or ()), collected)):
            try:
                yield collected
            finally:
                collected.end()

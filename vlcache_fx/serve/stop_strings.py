"""Stop strings, in text that arrives in parts."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string begins.

    Text that may be the beginning of a stop string is held back until more is known.

    Args:
        stops: the stop strings; may be empty.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """Take more text; return what may be passed on. Nothing follows a stop string."""
        if self.is_found:
            return ""
        self._held += text
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            self.is_found = True
            passed, self._held = self._held[: min(found)], ""
            return passed
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        end = len(self._held) - kept
        passed, self._held = self._held[:end], self._held[end:]
        return passed

    def finish(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        passed, self._held = self._held, ""
        return passed


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return min((text.partition(stop)[0] for stop in stops if stop), key=len, default=text)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

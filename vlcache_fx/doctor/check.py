"""One line of the checklist."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from vlcache_fx.errors import VlcacheError

log = logging.getLogger("vlcache_fx")


class Status(StrEnum):
    """Result of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """A check and its result.

    Attributes:
        name: what was checked.
        status: the result; a warning does not stop anything from working.
        found: what is there.
        advice: what to do about it; empty if there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)


def checked(name: str, check: Callable[[], Check]) -> Check:
    """Return the result of a check; a failed one, with the error's text, if it raises."""
    try:
        return check()
    except Exception as error:
        log.debug("vlcache: the check %r failed", name, exc_info=True)
        return Check(
            name, Status.FAILED, text_of(error), "VLCACHE_LOG=debug vlcache doctor shows the traceback"
        )


def text_of(error: BaseException) -> str:
    """Return an error in one line; errors of this package say themselves what they are."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, VlcacheError) else f"{type(error).__name__}: {text}"

"""Output of transformers while it loads models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers show no progress bars in the body: they would break others, and fill log files."""
    from transformers.utils import logging as untyped

    log: Any = untyped
    was_shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            log.enable_progress_bar()

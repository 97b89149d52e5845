"""Python's collector of garbage while programs are traced."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_afterwards() -> Iterator[None]:
    """Collect garbage once, after the body.

    Traces make millions of objects that stay, so collections in between look at ever more of them: they are
    about a tenth of the time until a server is ready.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
            gc.collect()

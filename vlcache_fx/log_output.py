"""The environment variable ``VLCACHE_LOG``: shows the package's log on stderr.

Nothing happens at import: engines apply it when they are created, and the console script does. An application
that configures logging itself keeps what it has configured.
"""

from __future__ import annotations

import functools
import logging
import os

VARIABLE = "VLCACHE_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
FORMAT = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger("vlcache_fx")


@functools.cache
def apply_log_variable() -> bool:
    """Let the log go to stderr from the level of ``VLCACHE_LOG`` on; only the first call does anything.

    Returns:
        whether it goes there now: not without the variable, with a bad value, or if the application has
        configured this logger or the root logger.
    """
    value = os.environ.get(VARIABLE, "")
    if not value or log.handlers or log.level != logging.NOTSET or logging.getLogger().handlers:
        return False
    level = LEVELS.get(value.lower())
    if level is None:
        log.warning("vlcache: %s=%r is not valid: it must be one of %s", VARIABLE, value, ", ".join(LEVELS))
        return False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(lambda _: not logging.getLogger().handlers)  # configured later: it has the log now
    log.addHandler(handler)
    log.setLevel(level)
    return True

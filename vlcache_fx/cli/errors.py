"""Errors on the terminal."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vlcache_fx.errors import VlcacheError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of the signal."""

log = logging.getLogger("vlcache_fx")


@contextmanager
def readable_errors(status: int = 1) -> Iterator[None]:
    """Print mistakes of users without a traceback, and exit.

    Exits with ``status`` after errors of this package and of files, with 130 after Ctrl-C. The traceback is
    in the log, at the level ``debug``. A closed pipe ends the command without a message.
    """
    try:
        yield
    except VlcacheError as error:
        _print(str(error))
        raise typer.Exit(status) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # typer ends the command
        _print(_text_of(error))
        raise typer.Exit(status) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error


def _print(text: str) -> None:
    log.debug("vlcache: the command failed", exc_info=True)
    typer.echo(f"error: {text}", err=True)


def _text_of(error: OSError) -> str:
    if error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.filename is None else f"{str(error.filename)!r}: {error.strerror}"

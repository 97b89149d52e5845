"""Calls of transformers' serving functions, whose arguments differ between its versions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def taken(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments in ``given`` that ``function`` takes.

    For arguments that newer versions added, and that older ones do without.
    """
    return {name: value for name, value in given.items() if name in inspect.signature(function).parameters}

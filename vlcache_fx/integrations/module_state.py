"""Digest of an eager module's state other than weights: configuration, hooks, attributes and code.

``generate()`` runs encoders eagerly, so no graph shows what they compute. Besides weights and inputs, their
outputs depend on configuration, hooks, replaced methods, plain attributes of submodules, and the code of all
functions that they call. This module walks these as an object graph and describes them as text. Models with
equal text and equal weights compute the same. An object without a description, such as an open file, makes
the state unknown, and nothing is reused.

A walk takes milliseconds, so it notes all values that it reads. The next call compares the notes by identity
and walks again after a change.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vlcache_fx.integrations.object_graph import Note, ObjectGraph
from vlcache_fx.keys.digest import content_digest

_log = logging.getLogger(__name__)


class ModuleState:
    """The digest of one module's state, updated from call to call.

    Args:
        roots: the called objects, such as the module and its method.
        weights: returns the tensors with a fingerprint of their own, which the digest leaves out.
    """

    def __init__(self, *roots: Any, weights: Callable[[], Sequence[Tensor]] = tuple) -> None:
        self._roots, self._weights = roots, weights
        self._notes: list[Note] = []
        self._digest: str | None = None
        self._was_walked = False

    def digest(self) -> str | None:
        """Return 64 hexadecimal digits, or None if the state is unknown."""
        if not self._was_walked or not all(map(_is_unchanged, self._notes)):
            self._digest, self._notes = _walk(self._roots, self._weights())
            self._was_walked = True
        return self._digest


def _walk(roots: tuple[Any, ...], weights: Sequence[Tensor]) -> tuple[str | None, list[Note]]:
    names = frozenset({"forward", "__call__", "training"})
    while True:  # until the functions use no names that the walk skipped
        graph = ObjectGraph(names, roots[0], weights)
        try:
            text = [graph.text(root) for root in roots]
            if graph.names <= names:
                return content_digest(text), graph.notes
        except Exception as error:  # noqa: BLE001 - attributes of arbitrary classes may raise anything
            _log.debug("vlcache: unknown state of %s: %s", type(roots[0]).__name__, error)
            return None, graph.notes
        names |= graph.names


def _is_unchanged(note: Note) -> bool:
    read, before = note
    now = read()
    return len(now) == len(before) and (
        all(map(operator.is_, now, before)) or all(map(_is_same, now, before))
    )


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in (str, int) and one == other)

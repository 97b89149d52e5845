"""Values of a thread or an asyncio task, such as the settings of its calls."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# One variable for all: Python never frees a ContextVar, and engines come and go. The mapping in it is never
# changed, only replaced, because copies of a context share it.
_values: ContextVar[Mapping[weakref.ref[Any], Any]] = ContextVar("vlcache_fx", default=MappingProxyType({}))


class ContextValue(Generic[T]):
    """A value that each context has of its own (see ``contextvars``).

    A new thread has its own context, without a value. Tasks of asyncio, ``asyncio.to_thread`` and
    ``contextvars.copy_context().run`` begin with the value of their creator; what they set is theirs.
    """

    def __init__(self) -> None:
        self._own = weakref.ref(self)

    def get(self) -> T | None:
        """Return the value of this context; None without one."""
        value: T | None = _values.get().get(self._own)
        return value

    def set(self, value: T | None) -> None:
        """Set the value of this context; None removes it."""
        kept = {own: other for own, other in _values.get().items() if own() is not None}
        kept.pop(self._own, None)
        if value is not None:
            kept[self._own] = value
        _values.set(kept)

    @contextmanager
    def using(self, value: T) -> Iterator[None]:
        """Set the value in the body. May end in another context, as generators of servers do."""
        before = self.get()
        self.set(value)
        try:
            yield
        finally:
            self.set(before)

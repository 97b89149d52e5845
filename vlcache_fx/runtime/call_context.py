"""What is known of a call before its decoder's graph runs, from what ran before it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from vlcache_fx.runtime.requests.media_spans import MediaItems


@dataclass(frozen=True)
class CallContext:
    """What encoders outside the decoder's graph tell its call.

    Attributes:
        encoder_hit: True where they were skipped, False where one ran, None where there was none.
        items: per modality the items that were encoded.
    """

    encoder_hit: bool | None = None
    items: tuple[tuple[str, MediaItems], ...] = ()

    @property
    def media_items(self) -> list[MediaItems]:
        """The items, without their modalities."""
        return [items for _, items in self.items]

    def with_items(self, modality: str, items: MediaItems) -> CallContext:
        """The same, with the items of one modality."""
        others = dict(self.items)
        return replace(self, items=tuple({**others, modality: items}.items()))


class PendingContext:
    """The context of the next call that a thread makes.

    For encoders that a model's own code calls: between them and the decoder's graph lie that code and
    Dynamo's, which hand tensors on and nothing else. Who calls a decoder itself gives it a ``CallContext``.
    """

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def _context(self) -> CallContext:
        context: CallContext = getattr(self._thread, "context", None) or CallContext()
        return context

    def note_encoder(self, *, hit: bool) -> None:
        """An encoder was skipped, or ran."""
        self._thread.context = replace(self._context, encoder_hit=hit)

    def note_items(self, modality: str, items: MediaItems) -> None:
        """Items were encoded."""
        self._thread.context = self._context.with_items(modality, items)

    def take(self) -> CallContext:
        """What was noted since this thread's last call."""
        context, self._thread.context = self._context, None
        return context

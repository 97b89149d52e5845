"""Facts about a call from encoders that ran before the decoder's graph."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vlcache_fx.runtime.requests.media_spans import MediaItems


@dataclass(frozen=True)
class CallContext:
    """Facts about a call from encoders outside the decoder's graph.

    Attributes:
        encoder_hit: True if all were skipped, False if one ran, None without encoders.
        items: the encoded items of each modality.
        parts: per modality, the parts of the features' keys: a mapping per item, or one for items that are
            encoded as one.
    """

    encoder_hit: bool | None = None
    items: tuple[tuple[str, MediaItems], ...] = ()
    parts: tuple[tuple[str, tuple[Mapping[str, str], ...]], ...] = ()

    @property
    def media_items(self) -> list[MediaItems]:
        """The items of all modalities."""
        parts = dict(self.parts)
        return [items.with_notes(parts.get(modality, ())) for modality, items in self.items]

    def with_items(self, modality: str, items: MediaItems) -> CallContext:
        """Return the context with the items of one modality."""
        others = dict(self.items)
        return replace(self, items=tuple({**others, modality: items}.items()))


class PendingContext:
    """The context of a thread's next call.

    For encoders that the model's own code calls: that code and Dynamo pass only tensors on to the decoder's
    graph. Callers of a ``DecoderRunner`` pass a ``CallContext`` instead.
    """

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def _context(self) -> CallContext:
        context: CallContext = getattr(self._thread, "context", None) or CallContext()
        return context

    def note_encoder(self, *, hit: bool) -> None:
        """Note that an encoder was skipped (``hit``) or ran."""
        self._thread.context = replace(self._context, encoder_hit=hit)

    def note_items(self, modality: str, items: MediaItems) -> None:
        """Note encoded items."""
        self._thread.context = self._context.with_items(modality, items)

    def note_parts(self, modality: str, parts: Sequence[Mapping[str, str]]) -> None:
        """Note the parts of the features' keys, see ``CallContext``."""
        context, others = self._context, dict(self._context.parts)
        self._thread.context = replace(context, parts=tuple({**others, modality: tuple(parts)}.items()))

    def take(self) -> CallContext:
        """Return and clear the context noted since this thread's last call."""
        context, self._thread.context = self._context, None
        return context

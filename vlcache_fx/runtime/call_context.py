"""Facts about a call from encoders that ran before the decoder's graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from vlcache_fx.runtime.context_value import ContextValue
from vlcache_fx.runtime.requests.media_spans import MediaItems


@dataclass(frozen=True)
class CallContext:
    """Facts about a call from encoders outside the decoder's graph.

    Attributes:
        encoder_hit: True if all were skipped, False if one ran, None without encoders.
        items: the encoded items of each modality.
        parts: per modality, the parts of the features' keys: a mapping per item, or one for items that are
            encoded as one.
        features: per modality, the features of each item, [rows, hidden].
    """

    encoder_hit: bool | None = None
    items: tuple[tuple[str, MediaItems], ...] = ()
    parts: tuple[tuple[str, tuple[Mapping[str, str], ...]], ...] = ()
    features: tuple[tuple[str, tuple[Tensor, ...]], ...] = ()

    @property
    def media_items(self) -> list[MediaItems]:
        """The items of all modalities."""
        parts = dict(self.parts)
        return [items.with_notes(parts.get(modality, ())) for modality, items in self.items]

    @property
    def media_features(self) -> list[Tensor]:
        """The features of all modalities."""
        return [features for _, items in self.features for features in items]

    def with_items(self, modality: str, items: MediaItems) -> CallContext:
        """Return the context with the items of one modality."""
        others = dict(self.items)
        return replace(self, items=tuple({**others, modality: items}.items()))


@dataclass
class _Notes:
    """What was noted for the next call; shared by copies of the context in which it was noted."""

    context: CallContext


class PendingContext:
    """The call context of the next call of a thread or a task of asyncio.

    For encoders that the model's own code calls: that code and Dynamo pass only tensors on to the decoder's
    graph. Callers of a ``DecoderRunner`` pass a ``CallContext`` instead.
    """

    def __init__(self) -> None:
        self._notes: ContextValue[_Notes] = ContextValue()

    @property
    def _context(self) -> CallContext:
        notes = self._notes.get()
        return CallContext() if notes is None else notes.context

    def _note(self, context: CallContext) -> None:
        self._notes.set(_Notes(context))

    def note_encoder(self, *, hit: bool) -> None:
        """Note that an encoder was skipped (``hit``) or ran."""
        self._note(replace(self._context, encoder_hit=hit))

    def note_items(self, modality: str, items: MediaItems) -> None:
        """Note encoded items."""
        self._note(self._context.with_items(modality, items))

    def note_features(self, modality: str, features: Sequence[Tensor]) -> None:
        """Note the features of items, [rows, hidden] each; those of an encoder's earlier run are let go."""
        context, others = self._context, dict(self._context.features)
        self._note(replace(context, features=tuple({**others, modality: tuple(features)}.items())))

    def note_parts(self, modality: str, parts: Sequence[Mapping[str, str]]) -> None:
        """Note the parts of the features' keys, see ``CallContext``."""
        context, others = self._context, dict(self._context.parts)
        self._note(replace(context, parts=tuple({**others, modality: tuple(parts)}.items())))

    def take(self) -> CallContext:
        """Return and clear what was noted since the last call.

        A call in a copy of the context clears it for the copied context as well: notes are of one call.
        """
        notes = self._notes.get()
        if notes is None:
            return CallContext()
        context, notes.context = notes.context, CallContext()
        self._notes.set(None)
        return context

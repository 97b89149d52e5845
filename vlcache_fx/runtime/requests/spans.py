"""Media spans of a call, and the keys of their donors."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlcache_fx.keys.digest import Part
from vlcache_fx.keys.digest_cache import cached_digests
from vlcache_fx.keys.entry_key import EntryKey, KeyScope
from vlcache_fx.runtime.requests.marked_spans import found_spans, marked_spans
from vlcache_fx.runtime.requests.media_spans import (
    NO_ITEMS,
    MediaItems,
    MediaSpan,
    flagged_positions,
    media_spans_of,
    token_flags,
    with_deepstack,
)
from vlcache_fx.runtime.requests.prologue import Values
from vlcache_fx.spec.decoder import SpanSpec


class Identifier:
    """Finds the media spans in the inputs of one graph.

    Args:
        spec: the inputs with features, or with embeddings that may be marked.
        masks: the program that returns the mask of each merge and each deepstack add.
    """

    def __init__(self, spec: SpanSpec, masks: Values) -> None:
        self._spec, self._masks = spec, masks

    def media_spans(
        self, args: Sequence[Any], items: Sequence[MediaItems] = (), results: Sequence[Tensor] = ()
    ) -> tuple[int, int, list[MediaSpan]] | None:
        """Return ``(samples, tokens per sample, sorted media spans)``; None for a mismatch with the features.

        Args:
            args: the graph's inputs.
            items: the encoded items of each modality, where known. They separate media spans without text
                between them, such as frames.
            results: the encoders' features, [rows, hidden] each. Where the graph takes embeddings and none
                are marked, their rows are looked for there.
        """
        spec = self._spec
        if spec.embeddings is not None:
            embeds = args[spec.embeddings]
            return *embeds.shape[:2], [
                MediaSpan(sample, start, length, (embeds[sample, start : start + length],))
                for sample, start, length in marked_spans(embeds) or found_spans(embeds, results)
            ]
        samples, tokens, found = 1, 0, []
        for number, (mask, index) in enumerate(zip(self._masks(*args), spec.features, strict=True)):
            if spec.width is not None and args[index].shape[-1] != spec.width:
                return None
            flags = token_flags(mask)
            samples, tokens = flags.shape
            positions = flagged_positions(flags)
            features = args[index].reshape(-1, args[index].shape[-1])
            if len(positions) != features.shape[0]:
                return None
            digests = cached_digests(args[index]) if args[index].dim() == features.dim() else {}
            if number < spec.num_merges:
                encoded = next((group for group in items if sum(group.lengths) == len(positions)), NO_ITEMS)
                found.extend(media_spans_of(positions, features, tokens, encoded, digests))
            else:
                extended = with_deepstack(found, positions, features, tokens, digests)
                if extended is None:
                    return None
                found = extended
        return samples, tokens, sorted(found, key=lambda span: (span.sample, span.start))


def donor_key(span: MediaSpan, parts: Mapping[str, Part], scope: KeyScope) -> EntryKey:
    """Return the key of a media span's donor.

    Args:
        span: the media span; its feature bytes enter the key.
        parts: all else that the rows depend on, by name: the computation, the weights, the global state,
            positions, and what masks show to its tokens.
        scope: tenant and model.
    """
    return scope.key("donor", {"content": span.digests, **parts})

"""Which runs of media a request has, and the keys of what fills them."""

from collections.abc import Sequence
from typing import Any

from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.digest_cache import cached_digests
from vlcache_fx.runtime.requests.marked_spans import marked_spans
from vlcache_fx.runtime.requests.media_spans import (
    NO_ITEMS,
    MediaItems,
    Run,
    flagged_places,
    runs_of,
    token_flags,
    with_additions,
)
from vlcache_fx.runtime.requests.prologue import Values
from vlcache_fx.spec.decoder import SpanSpec


class Identifier:
    """Finds runs in the inputs of one graph.

    Args:
        spec: where they come from.
        masks: the program that gives the mask of each merge and addition.
    """

    def __init__(self, spec: SpanSpec, masks: Values) -> None:
        self._spec, self._masks = spec, masks

    def runs(
        self, args: Sequence[Any], items: Sequence[MediaItems] = ()
    ) -> tuple[int, int, list[Run]] | None:
        """``(samples, tokens of each, runs in order)``; None where placeholders and features do not agree.

        Args:
            args: the graph's inputs.
            items: per modality, where they are known. Items that follow each other without text between them,
                such as frames, are runs of their own then.
        """
        spec = self._spec
        if spec.embeddings is not None:
            embeds = args[spec.embeddings]
            return *embeds.shape[:2], [
                Run(sample, start, length, (embeds[sample, start : start + length],))
                for sample, start, length in marked_spans(embeds)
            ]
        samples, tokens, found = 1, 0, []
        for place, (mask, index) in enumerate(zip(self._masks(*args), spec.features, strict=True)):
            if spec.width is not None and args[index].shape[-1] != spec.width:
                return None
            flags = token_flags(mask)
            samples, tokens = flags.shape
            places = flagged_places(flags)
            features = args[index].reshape(-1, args[index].shape[-1])
            if len(places) != features.shape[0]:
                return None
            known = cached_digests(args[index]) if args[index].dim() == features.dim() else {}
            if place < spec.num_merges:
                encoded = next((one for one in items if sum(one.lengths) == len(places)), NO_ITEMS)
                found.extend(runs_of(places, features, tokens, encoded, known))
            else:
                extended = with_additions(found, places, features, tokens, known)
                if extended is None:
                    return None
                found = extended
        return samples, tokens, sorted(found, key=lambda run: (run.sample, run.start))


def donor_key(run: Run, parts: list[Part], identity: str, salt: str) -> str:
    """The complete key of a donor.

    Args:
        run: whose feature bytes count.
        parts: what its rows depend on beside these: positions, and what masks let its tokens see.
        identity: of the computation, the weights and the global state.
        salt: of the tenant.
    """
    return content_digest(["donor", salt, identity, run.digests, tuple(parts)])

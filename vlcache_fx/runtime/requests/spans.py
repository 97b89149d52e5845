"""Which runs of media a request has, and the keys of what fills them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.decoder.merge import Addition, Merge
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.digest_cache import cached_digests
from vlcache_fx.runtime.requests.marked_spans import marked_spans
from vlcache_fx.runtime.requests.media_spans import Run, flagged_places, runs_of, token_flags, with_additions
from vlcache_fx.runtime.requests.on_cpu import evaluated_on_cpu


@dataclass(frozen=True)
class Identifier:
    """Finds runs in the inputs of one graph.

    Attributes:
        masks: a small graph from the graph's inputs to the mask of each merge and addition.
        on_host: indices of the inputs that ``masks`` reads on the CPU; empty where it runs on the device.
        features: per merge and addition, the index of the input that holds its feature rows.
        num_merges: how many of these are merges; additions follow.
        embeddings: where there is no merge, the index of the input whose rows may be marked as spans.
        width: values per token of what is merged; None where there is no merge, or the graph takes any.
    """

    masks: Callable[..., Sequence[Tensor]]
    features: tuple[int, ...]
    num_merges: int
    embeddings: int | None = None
    width: int | None = None
    on_host: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: fx.GraphModule, facts: DecoderFacts, data_inputs: Sequence[int]) -> "Identifier":
        """Build it from the facts of ``module``; every merge's features must be an input."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        index = {node: i for i, node in enumerate(placeholders)}
        width = facts.merges[-1].node.meta["val"].shape[-1] if facts.merges else None
        places: list[Merge | Addition] = [*facts.merges, *facts.additions]
        place_masks, on_host = evaluated_on_cpu(
            extract(module, [place.mask for place in places]), data_inputs
        )
        return cls(
            masks=place_masks,
            on_host=on_host,
            features=tuple(index[place.features] for place in places),
            num_merges=len(facts.merges),
            embeddings=None if facts.merges else index[facts.stream.boundaries[0]],
            width=width if isinstance(width, int) else None,
        )

    def runs(
        self, args: Sequence[Any], items: Sequence[Sequence[int]] = ()
    ) -> tuple[int, int, list[Run]] | None:
        """``(samples, tokens of each, runs in order)``; None where placeholders and features do not agree.

        Args:
            args: the graph's inputs.
            items: where it is known, the rows of features of each item, per modality. Items that follow each
                other without text between them, such as frames, are runs of their own then.
        """
        if self.embeddings is not None:
            embeds = args[self.embeddings]
            return *embeds.shape[:2], [
                Run(sample, start, length, (embeds[sample, start : start + length],))
                for sample, start, length in marked_spans(embeds)
            ]
        samples, tokens, found = 1, 0, []
        for place, (mask, index) in enumerate(zip(self.masks(*args), self.features, strict=True)):
            if self.width is not None and args[index].shape[-1] != self.width:
                return None
            flags = token_flags(mask)
            samples, tokens = flags.shape
            places = flagged_places(flags)
            features = args[index].reshape(-1, args[index].shape[-1])
            if len(places) != features.shape[0]:
                return None
            known = cached_digests(args[index]) if args[index].dim() == features.dim() else {}
            if place < self.num_merges:
                lengths = next((one for one in items if sum(one) == len(places)), ())
                found.extend(runs_of(places, features, tokens, lengths, known))
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

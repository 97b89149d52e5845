"""Which donors a request has, and what it leaves behind: the store as one decoder graph sees it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.token_axis import shape_of
from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime import donors
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.identify import Identifier, Run, arithmetic, donor_key
from vlcache_fx.runtime.mask_check import MaskCheck
from vlcache_fx.runtime.prefix import Piece, PrefixReader
from vlcache_fx.runtime.request import Request
from vlcache_fx.store.entry import Entry
from vlcache_fx.store.keys import content_digest

LEAST_PREFIX_SHARE = 0.5
"""A known prefix without a reused span is worth the warm program from this share of the prompt on."""


class DonorLookup:
    """Finds and stores donors.

    Args:
        captured: the decoder graph.
        facts: its analysis.
        slots: names of what its programs record.
        masks: tell whether rows depend on keys of earlier calls.
        engine: has the store.
    """

    def __init__(
        self, captured: Captured, facts: DecoderFacts, slots: Sequence[str], masks: MaskCheck, engine: Engine
    ) -> None:
        self._engine, self._masks = engine, masks
        data = [index for index, kind in enumerate(captured.kinds) if kind is InputKind.DATA]
        place = {node: index for index, node in enumerate(captured.placeholders)}
        self.identifier = Identifier.of(captured.graph_module, facts, data)
        self._prefixes = PrefixReader.of(captured, facts, self.identifier.features)
        self._weights = tuple(place[node] for node in facts.weights)
        frontiers = {donors.RESIDUAL: (facts.stream.boundaries[-1], facts.tail_rows.axis)}
        for index, layer in enumerate(facts.layers):
            for letter, node in (("k", layer.key_frontier), ("v", layer.value_frontier)):
                frontiers[f"{index}.{letter}"] = (node, facts.steps[node].axis)
        self.forms = {
            slot: donors.RowForm.of(frontiers[slot][0].meta["val"], frontiers[slot][1]) for slot in slots
        }
        # What a stored row looks like, and what layers do beside weights: graphs of one model agree on it.
        rows = {slot: frontiers[slot][0] for slot in slots if slot != donors.RESIDUAL}
        sites = {layer.site.node for layer in facts.layers}  # whose dropout of 0.0 may be spelled out or not
        self._form = str(
            (
                [(slot, str(node.meta["val"].dtype), str(shape_of(node)[-1])) for slot, node in rows.items()],
                [layer.site.scale for layer in facts.layers],
                arithmetic(n for members in facts.stream.members for n in members if n not in sites),
            )
        )

    def request(
        self,
        args: Sequence[Any],
        num_tokens: int,
        runs: Sequence[Run],
        encoder_hit: bool | None,
        clock: Clock,
    ) -> Request:
        """The request for a call of the graph; nothing has been looked up yet."""
        long = [run for run in runs if run.length >= self._engine.options.min_span_tokens]
        if not long:  # text alone: nothing to look the weights over for
            return Request(args, num_tokens, runs, (), "", encoder_hit, clock)
        fingerprint = self._engine.weights_fingerprint([args[index] for index in self._weights])
        weights, salt = f"{fingerprint}|{self._form}", self._engine.options.salt
        spans = []
        for run in long:
            positions = self.identifier.positions(args, run, num_tokens)
            spans.append(Span(0, run.start, run.length, donor_key(run, positions, weights, salt), False))
        root = content_digest([weights, salt])
        return Request(args, num_tokens, runs, tuple(spans), root, encoder_hit, clock)

    def find(self, request: Request) -> tuple[Request, list[Entry]]:
        """The request with what the store has for it, and these donors in the order of their tokens."""
        looked, found = [], {}
        for span in request.spans:
            entry = self._get(span.key)
            if entry is not None and donors.fits(entry, self.forms, span.length):
                found[span.start] = entry
                looked.append(replace(span, hit=True, tier=self._engine.store.tier))
            else:
                looked.append(span)
        prefix, entries = self._known_prefix(request, found)
        entries += [entry for start, entry in found.items() if start >= prefix]
        return replace(request, spans=tuple(looked), prefix=prefix), entries

    def _get(self, key: str) -> Entry | None:
        with self._engine.tolerating_store_errors():
            return self._engine.store.get(key)
        return None

    def _known_prefix(self, request: Request, found: Mapping[int, Entry]) -> tuple[int, list[Entry]]:
        policy, _ = self._engine.choice()
        if not request.spans or not request.is_causal or not policy.keeps_prefix:
            return 0, []

        def find(piece: Piece) -> Entry | None:
            return self._get(piece.key) if piece.span is None else found.get(piece.start)

        length, entries = donors.known_prefix(self._pieces(request), find, self.forms)
        if length and not self.is_whole(request):
            return 0, []
        reuses = any(start < length for start in found)
        return (length, entries) if reuses or length >= LEAST_PREFIX_SHARE * request.num_tokens else (0, [])

    def _pieces(self, request: Request) -> Iterator[Piece]:
        return self._prefixes.pieces(
            request.args, request.runs, request.spans, request.num_tokens, request.root
        )

    def is_whole(self, request: Request) -> bool:
        """True where rows depend on this call's tokens alone, not on what a cache holds already.

        Rows behind keys of earlier calls are neither exact for the same tokens elsewhere, nor known to be
        computed exactly: those keys may be reused ones.
        """
        return not self.identifier.has_past or self._masks.hides_the_past(request.args, request.num_tokens)

    def is_worth_recording(self, request: Request) -> bool:
        """True where an item has missed for the second time: it recurs, so an exact run is worth its donor.

        In a warm run it could not be recorded: it attends to approximate rows before it, and approximate rows
        are never stored.
        """
        missed = [
            span.key for span in request.spans if not span.hit and not self._engine.is_unstorable(span.key)
        ]
        repeated = [self._engine.missed_before(key) for key in missed]
        return any(repeated) and self.is_whole(request)

    def admit(self, request: Request, recorded: Mapping[str, Tensor], plan: Plan) -> None:
        """Store the pieces behind the known prefix; every one of their rows was computed, and exactly."""
        if request.prefix == request.num_tokens or not self.is_whole(request):
            return
        for piece in self._pieces(request):
            with self._engine.tolerating_store_errors():
                if piece.start >= request.prefix and self._is_wanted(piece, request):
                    stored = donors.admit(self._engine.store, piece, recorded, self.forms, plan)
                    if not stored and piece.span is not None:
                        self._engine.note_unstorable(piece.key)

    def _is_wanted(self, piece: Piece, request: Request) -> bool:
        """True for media, whose donor may be of another prefix, and for text that is not stored yet."""
        return piece.span is not None or (request.is_causal and piece.key not in self._engine.store)

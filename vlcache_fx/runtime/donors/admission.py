"""Stores the exact rows that a request records."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.donors import tables as donors
from vlcache_fx.runtime.donors.donor_dtype import MODEL
from vlcache_fx.runtime.pace import Pace
from vlcache_fx.runtime.requests.blocks import Block, BlockSplitter
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.decoder import DecoderSpec
from vlcache_fx.spec.slots import StoredSlot


class Admission:
    """Stores the rows of one decoder graph.

    Args:
        spec: spec of the decoder graph.
        engine: has the store.
        pace: time of the graph's cold runs, per token.
    """

    def __init__(self, spec: DecoderSpec, engine: ServingState, pace: Pace) -> None:
        self._spec, self._engine, self._pace = spec, engine, pace
        self._splitter = BlockSplitter(spec.spans.embeddings)

    def admit(
        self, request: Request, recorded: Mapping[StoredSlot, Tensor], plans: Sequence[Plan]
    ) -> set[str]:
        """Store the rows after the exact prefix, for samples whose rows are all exact.

        Returns:
            The keys of spans whose donors are stored.
        """
        admitted: set[str] = set()
        if not request.ignores_past:
            return admitted
        for sample, plan in zip(request.samples, plans, strict=True):
            if not sample.reuse_is_exact or sample.prefix == request.num_tokens:
                continue
            of_spans = {span.key for span in sample.spans}
            for block in self._kept_blocks(request, sample):
                with self._engine.tolerating_store_errors():
                    if self._engine.clears.covers(block.key, request.began):
                        continue
                    if block.start >= sample.prefix and self._is_wanted(block, request):
                        store, index = self._engine.store, sample.index
                        contexts = self._engine.options.donor_contexts
                        stored = donors.admit(
                            store,
                            block,
                            recorded,
                            self._spec.rows,
                            plan,
                            index,
                            contexts,
                            self._engine.options.donor_dtype,
                            donor_rank=self._engine.options.donor_rank,
                            states=self._spec.states,
                            cost_ms=self._pace.cost_ms(block.length),
                        )
                        keys = [block.key] if block.span is None else [block.key, refine.exact_key(block.key)]
                        if self._engine.drop_if_cleared(keys, request.began) or block.key not in of_spans:
                            continue
                        if stored:
                            admitted.add(block.key)
                        else:
                            self._engine.unstorable.add(block.key)
        return admitted

    def _kept_blocks(self, request: Request, sample: Sample) -> Iterable[Block]:
        """Yield the blocks that later requests can find; text after a packed donor is in no exact prefix."""
        packs, is_exact = self._engine.options.donor_dtype != MODEL, True
        for block in self._splitter.of_sample(request, sample):
            if is_exact or block.span is not None:
                yield block
            is_exact = is_exact and not (packs and block.span is not None)

    def _is_wanted(self, block: Block, request: Request) -> bool:
        """Return True for spans, whose donor may be of another context, and for new blocks of text."""
        return block.span is not None or (request.is_causal and block.key not in self._engine.store)

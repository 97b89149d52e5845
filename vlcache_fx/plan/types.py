"""Spans and plans, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlcache_fx.errors import NotReused


@dataclass(frozen=True)
class Span:
    """The consecutive token positions of one media item.

    Attributes:
        sample: index of the sample in the batch.
        start: first token position.
        length: number of tokens, at least 1.
        key: key of the item's donor.
        hit: True if a donor was found, so that its rows may be reused.
        tier: store tier of the donor; None without a donor.
        contexts: number of contexts averaged in the donor; 0 without a donor.
        miss: reason why rows are not reused; None if they are, or if nothing was looked up.
    """

    sample: int
    start: int
    length: int
    key: str
    hit: bool
    tier: str | None = None
    contexts: int = 0
    miss: NotReused | None = None

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Plan:
    """Nested row sets R_0 ⊇ R_1 ⊇ ... of one request, and the gathers that assemble full tensors.

    With L layers and N tokens. Index l < L is the input of layer l, whose K and V are computed for
    ``rows[l]``; index L is the residual stream after the last layer. All tensors are int64, one-dimensional
    and on the CPU. Neighbouring layers with equal rows share their tensor objects: ``rows[l] is rows[l + 1]``
    means that nothing is gathered between them.

    Example, with tokens ``text, image, image`` and the first image token recomputed in layer l::

        rows[l]   = [0, 1]          computed token positions
        source[l] = [-1, -2, 1]     computed row 0, computed row 1, donor row 1

    Attributes:
        num_tokens: N.
        rows: L + 1 sorted sets of active token positions; at least two entries if N >= 2, because compiled
            programs specialise on sizes 0 and 1.
        keep: L index tensors; ``rows[l][keep[l]]`` equals ``rows[l + 1]``.
        source: L + 1 tensors of shape [N]. For token i, v >= 0 is row v of the donor table (the donor rows of
            all hit spans, concatenated); v < 0 is computed row j = -(v + 1), with ``rows[l][j] == i``. At
            index L, tokens that are neither computed nor in a hit span have a meaningless 0: no output needs
            them.
        rows_per_layer: number of rows at each of the L + 1 indices.
        token_layer_fraction: computed share of the hit spans' token-layers (layers 0 to L - 1), including
            rows for outputs; 0.0 without hit spans.
        explanations: one sentence per repair of the policy's choice.
    """

    num_tokens: int
    rows: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    rows_per_layer: tuple[int, ...]
    token_layer_fraction: float
    explanations: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return len(self.keep)

"""Spans and plans, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from vlcache_fx.errors import Reason
from vlcache_fx.plan.jumps import Jump, Record

if TYPE_CHECKING:
    from vlcache_fx.policies.profile import Profile


Grid: TypeAlias = tuple[int, int, int]
"""Tokens of a media item in time, height and width; they follow each other row by row."""


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
        miss_detail: details of the reason, such as the slot that does not fit; may be empty.
        grid: grid of the media item, if known.
        cuts: offsets at which the donor's maps of recurrent layers begin and end, see ``plan.jumps``; empty
            without recurrent layers.
    """

    sample: int
    start: int
    length: int
    key: str
    hit: bool
    tier: str | None = None
    contexts: int = 0
    miss: Reason | None = None
    grid: Grid | None = None
    miss_detail: str = ""
    cuts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class SpanContext:
    """All that a policy knows of a reused span when it chooses rows.

    Fields may be added in minor versions, with defaults. The defaults describe a span that is alone in its
    prompt::

        a system prompt  [ span, 4 tokens ]  text  [ other span ]  a question
        0 1 2            3  4  5  6          7 8   9 ...  12       13 14 15

        start=3, length=4, num_tokens=16, text_before=3, text_after=5

    Attributes:
        length: tokens in the span, at least 1.
        num_layers: layers of the model, L.
        budget: share in [0, 1] of the span's token-layers that may be recomputed.
        profile: the model's sensitivities, None without them.
        start: position of the first token in its prompt, padding included.
        num_tokens: tokens of the prompt, padding included; 0 stands for ``start + length``.
        text_before: tokens before the span that are neither in another span nor known to be padding.
        text_after: tokens after the span, likewise.
        grid: tokens in time, height and width, whose product is ``length``. None where the encoder gets no
            grids, runs inside of the traced graph, or its grid does not fit the span.
        contexts: number of contexts in the span's donor, at least 1.
    """

    length: int
    num_layers: int
    budget: float
    profile: Profile | None = None
    start: int = 0
    num_tokens: int = 0
    text_before: int = 0
    text_after: int = 0
    grid: Grid | None = None
    contexts: int = 1

    def __post_init__(self) -> None:
        if not self.num_tokens:
            object.__setattr__(self, "num_tokens", self.start + self.length)


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
        jumps: tokens that recurrent layers skip, in order; empty without such layers.
        records: tokens whose states are recorded.
    """

    num_tokens: int
    rows: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    rows_per_layer: tuple[int, ...]
    token_layer_fraction: float
    explanations: tuple[str, ...] = ()
    jumps: tuple[Jump, ...] = ()
    records: tuple[Record, ...] = ()

    def __repr__(self) -> str:
        rows = f"rows per layer {self.rows_per_layer[0]} to {self.rows_per_layer[-1]}"
        share = f"{100 * self.token_layer_fraction:.1f} % of the spans recomputed"
        return f"<Plan {self.num_tokens} tokens, {len(self.keep)} layers, {rows}, {share}>"

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return len(self.keep)

"""A bound that no implementation of the same rows can beat on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlcache_fx.bench.model import DecoderSize
from vlcache_fx.bench.rates import Rates


@dataclass(frozen=True)
class Bound:
    """Lower bound of a prefill.

    Attributes:
        flops: operations of the rows: projections, attention, MLP, output of the last token.
        nbytes: weights of the decoder and the output, keys and values of all tokens, read once.
        seconds: the longer one of both at the measured rates.
        limited_by: which one it is.
    """

    flops: float
    nbytes: float
    seconds: float
    limited_by: Literal["compute", "memory"]


def bound(
    size: DecoderSize,
    rates: Rates,
    rows_per_layer: Sequence[int],
    num_tokens: int,
    text_positions: Sequence[int],
    batch: int = 1,
) -> Bound | None:
    """The bound of computing these rows; None for decoders with experts, which do not use all weights.

    Args:
        size: of the decoder.
        rates: of the machine.
        rows_per_layer: as in the engine's report, and so one more than there are layers: K and V are computed
            for the rows of a layer, the rest of it for the rows of the next.
        num_tokens: per sample.
        text_positions: positions that are not vision tokens, sorted.
        batch: samples.
    """
    if size.experts:
        return None
    kv_weights = 2 * size.hidden * size.kv_heads * size.head_dim
    other_weights = size.layer_weights / size.layers - kv_weights
    vision_positions = sorted(set(range(num_tokens)) - set(text_positions))
    flops = 2.0 * size.head_weights
    for layer in range(size.layers):
        rows, queries = rows_per_layer[layer], rows_per_layer[layer + 1]
        pairs = _attended(queries, text_positions, vision_positions)
        flops += 2 * kv_weights * rows + 2 * other_weights * queries
        flops += 4 * size.heads * size.head_dim * pairs
    flops *= batch
    weights = (size.layer_weights + size.head_weights) * size.item_bytes
    nbytes = float(weights + batch * num_tokens * size.kv_bytes_per_token)
    computing, moving = flops / rates.matmul_flops, nbytes / rates.copy_bytes
    limited_by: Literal["compute", "memory"] = "compute" if computing >= moving else "memory"
    return Bound(flops, nbytes, max(computing, moving), limited_by)


def _attended(queries: int, text: Sequence[int], vision: Sequence[int]) -> int:
    """Pairs of a query and a key at or before it, for the cheapest rows that it can be.

    These are all text rows and the earliest vision rows; where there are fewer rows than text, the last
    ones, as behind the last layer.
    """
    positions = (
        [*text, *vision[: queries - len(text)]] if queries >= len(text) else text[len(text) - queries :]
    )
    return sum(position + 1 for position in positions)

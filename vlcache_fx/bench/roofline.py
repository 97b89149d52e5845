"""Roofline: a lower bound of the time for given rows on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlcache_fx.bench.model import DecoderSize
from vlcache_fx.bench.rates import Rates


@dataclass(frozen=True)
class Bound:
    """Lower bound of a prefill.

    Attributes:
        flops: operations of the rows: projections, attention, states of recurrent layers, MLP, output of the
            last token. Maps of donors do not count.
        nbytes: weights of the decoder and the output, keys and values of all tokens, and states, read once.
        seconds: the longer time of both at the measured rates.
        limited_by: the longer time's resource.
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
    """Compute the bound for given rows; None for mixtures of experts, which do not use all weights.

    Args:
        size: sizes of the decoder.
        rates: rates of the machine.
        rows_per_layer: as in the engine's report, ``num_layers + 1`` numbers: a layer computes K and V for
            its rows, and the rest for the next layer's rows.
        num_tokens: tokens per sample.
        text_positions: positions of text tokens, sorted.
        batch: number of samples.
    """
    if size.experts:
        return None
    kv_weights = 2 * size.hidden * size.kv_heads * size.head_dim
    vision_positions = sorted(set(range(num_tokens)) - set(text_positions))
    flops = 2.0 * size.head_weights
    for layer in range(size.layers):
        rows, queries = rows_per_layer[layer], rows_per_layer[layer + 1]
        if size.has_attention and not size.has_attention[layer]:
            # A row's query and key read the state, and its key and value are added to it.
            flops += 2 * size.weights_of_layers[layer] * queries + 6 * size.state_values * rows
            continue
        pairs = _attended(queries, text_positions, vision_positions)
        flops += 2 * kv_weights * rows + 2 * (size.weights_of_layers[layer] - kv_weights) * queries
        flops += 4 * size.heads * size.head_dim * pairs
    flops *= batch
    weights = (size.layer_weights + size.head_weights) * size.item_bytes
    nbytes = float(weights + batch * (num_tokens * size.kv_bytes_per_token + size.state_bytes))
    computing, moving = flops / rates.matmul_flops, nbytes / rates.copy_bytes
    limited_by: Literal["compute", "memory"] = "compute" if computing >= moving else "memory"
    return Bound(flops, nbytes, max(computing, moving), limited_by)


def _attended(queries: int, text: Sequence[int], vision: Sequence[int]) -> int:
    """Count pairs of a query and a key at or before it, for the cheapest choice of rows.

    These are all text rows and the first vision rows; for fewer rows than text, the last text rows, as after
    the last layer.
    """
    positions = (
        [*text, *vision[: queries - len(text)]] if queries >= len(text) else text[len(text) - queries :]
    )
    return sum(position + 1 for position in positions)

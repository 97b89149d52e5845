"""Token of each key of an attention whose keys include those of earlier calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.spec.decoder import CacheValue, KeyMove, MoveKind

NO_TOKEN = -1


def key_tokens(moves: Sequence[KeyMove], num_tokens: int, values: Sequence[Any]) -> Tensor:
    """Return the token of each key, int64 [keys]; -1 for keys that are not of this call.

    Repeats on token numbers what the graph does to its keys::

        tokens [0 1 2]  ->  JOIN after a cache of 2  ->  [-1 -1 0 1 2]

    Args:
        moves: the steps of the keys through the cache.
        num_tokens: tokens of the call.
        values: results of the program ``cache_values``.
    """
    tokens = torch.arange(num_tokens)
    for move in moves:
        operands = [values[part.index] if isinstance(part, CacheValue) else part for part in move.operands]
        tokens = _moved(move, tokens, operands)
    return tokens


def _moved(move: KeyMove, tokens: Tensor, operands: Sequence[Any]) -> Tensor:
    match move.kind:
        case MoveKind.WRITE:
            buffer, positions = operands
            written = _no_tokens(buffer, move.dim)
            written[positions.cpu()] = tokens
            return written
        case MoveKind.JOIN:
            return torch.cat([tokens if part is None else _no_tokens(part, move.dim) for part in operands])
        case MoveKind.CUT:
            return tokens[slice(*operands)]


def _no_tokens(value: Tensor, dim: int) -> Tensor:
    return torch.full((value.shape[dim],), NO_TOKEN)

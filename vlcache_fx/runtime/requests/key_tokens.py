"""Where a call's tokens lie among the keys of an attention that also sees those of earlier calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.spec.decoder import CacheValue, KeyMove, MoveKind

NO_TOKEN = -1


def key_tokens(moves: Sequence[KeyMove], num_tokens: int, values: Sequence[Any]) -> Tensor:
    """Per key the number of its token, int64 [keys]; -1 for keys that this call did not make.

    Args:
        moves: of the keys, repeated here on token numbers.
        num_tokens: of the call.
        values: of the program ``cache_values``.
    """
    tokens = torch.arange(num_tokens)
    for move in moves:
        operands = [values[one.index] if isinstance(one, CacheValue) else one for one in move.operands]
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
            return torch.cat([tokens if one is None else _no_tokens(one, move.dim) for one in operands])
        case MoveKind.CUT:
            return tokens[slice(*operands)]


def _no_tokens(value: Tensor, dim: int) -> Tensor:
    return torch.full((value.shape[dim],), NO_TOKEN)

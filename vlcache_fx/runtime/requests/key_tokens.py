"""Where a call's tokens lie among the keys of an attention that also sees those of earlier calls."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.analysis.decoder.kv_caches import Move
from vlcache_fx.ir.scatters import scattered_rows
from vlcache_fx.ir.subgraph import extract

aten = torch.ops.aten
NO_TOKEN = -1


class KeyTokens:
    """The moves of one layer's keys, repeated on token numbers.

    Args:
        module: the graph.
        moves: of the keys, on their way to the attention.
    """

    def __init__(self, module: fx.GraphModule, moves: Sequence[Move]) -> None:
        self._moves = moves
        self._needed = list(dict.fromkeys(node for move in moves for node in _settings(move)))
        self._graph = extract(module, self._needed) if self._needed else None

    def __call__(self, args: Sequence[Any], num_tokens: int) -> Tensor:
        """Per key the number of its token, int64 [keys]; -1 for keys that this call did not make."""
        given = () if self._graph is None else self._graph(*args)
        values = dict(zip(self._needed, given, strict=True))
        tokens = torch.arange(num_tokens)
        for move in self._moves:
            tokens = _moved(move, tokens, values)
        return tokens


def _settings(move: Move) -> Iterator[Node]:
    """What a call must tell about a move beside the tokens themselves."""
    return (operand for operand in move.node.all_input_nodes if operand is not move.own)


def _moved(move: Move, tokens: Tensor, values: Mapping[Node, Any]) -> Tensor:
    node, own = move.node, move.own
    rank = node.meta["val"].dim()
    rows = scattered_rows(node)
    if rows is not None:
        _, dim, places = rows
        buffer = _nothing(values[node.args[0]], dim)  # type: ignore[index]
        buffer[values[places].cpu()] = tokens
        return buffer
    dim = int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        return torch.cat([tokens if part is own else _nothing(values[part], dim) for part in parts])
    bounds = [value if not isinstance(value, Node) else values[value] for value in node.args[2:]]
    return tokens[slice(*[*bounds, None, None, None][:3])]


def _nothing(value: Tensor, dim: int) -> Tensor:
    return torch.full((value.shape[dim],), NO_TOKEN)

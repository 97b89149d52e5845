"""Jumps of recurrent layers over reused tokens, and the records that are made of a prompt's states.

A recurrent layer computes its rows one after the other, so reused tokens must be consecutive: a *jump*. It
replaces the state by what the tokens make of it. Tokens of a media item are a map, ``state -> A state + B``;
an exact prefix is the state behind it, a map with A = 0. The first tokens of an item are recomputed up to a
*cut*, of which a donor has a few. Example with cuts at 0, 2 and 6 and the first two tokens recomputed::

    tokens       t0 t1 | a0 a1 a2 a3 a4 a5 | t8 t9
    computed     t0 t1   a0 a1               t8 t9
    jump                      `-- map 1 ---^            from token 4 to 8, with the donor's second map

Records of this prompt: ``t0 t1``, for prompts that share this prefix; ``a0 a1`` and ``a2 .. a5``, for the
donor's maps; and text up to the last block boundary, for prompts that continue this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vlcache_fx.plan.budget import row_allowance

LEAST_ENTRIES = 2
"""Least size of a tensor that a program reads: compiled programs specialise on 0 and 1."""


@dataclass(frozen=True)
class Jump:
    """Consecutive tokens that recurrent layers skip.

    Attributes:
        start, end: the tokens.
        maps: indices of their maps in the table of all donors' maps, in order.
        tail: index of their last inputs of convolutions among those of all donors.
    """

    start: int
    end: int
    maps: tuple[int, ...]
    tail: int


@dataclass(frozen=True)
class Record:
    """Consecutive tokens after which states are recorded, with the map that they make."""

    start: int
    end: int


def chosen_cut(cuts: Sequence[int], counts: Sequence[int]) -> int:
    """Return the last cut within the mean number of rows that a policy chose per layer.

    Args:
        cuts: cuts of a donor, 0 included, in order.
        counts: rows of each layer.
    """
    return max(cut for cut in cuts if cut * len(counts) <= sum(counts))


def cuts_of(length: int, budget: float) -> tuple[int, ...]:
    """Return the cuts at which an item's maps are recorded: its start, the budget's rows, and its end."""
    return tuple(sorted({0, row_allowance(budget, length), length}))


def records_of(
    num_tokens: int, media: Sequence[tuple[int, int, bool]], budget: float, block_tokens: int
) -> list[Record]:
    """Return the records of a prompt: each media item from cut to cut, and text up to where a prefix may end.

    Args:
        num_tokens: length of the prompt.
        media: start, length and whether it may be reused, of each media item, in order.
        budget: share of an item that is recomputed when it is reused.
        block_tokens: tokens of a block of text, from which the last text is cut.
    """
    records, at = [], 0
    for start, length, is_reused in media:
        if start > at:
            records.append(Record(at, start))
        cuts = cuts_of(length, budget) if is_reused else (0, length)
        records += [Record(start + before, start + after) for before, after in pairwise(cuts)]
        at = start + length
    whole = (num_tokens - at) // block_tokens * block_tokens
    return [*records, Record(at, at + whole)] if whole else records


def jump_at(jumps: Sequence[Jump], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of ``JumpAt`` and ``JumpMap``.

    Args:
        jumps: in the order of tokens.
        rows: computed tokens, sorted, int64 [n].
    """
    ends = _ranks(rows, [jump.end for jump in jumps])
    pairs = [(end, index) for jump, end in zip(jumps, ends, strict=True) for index in jump.maps]
    pairs += [(len(rows), -1)] * (LEAST_ENTRIES - len(pairs))
    at, maps = torch.tensor(pairs).view(-1, 2).t()
    return at[None].contiguous(), maps[None].contiguous()


def joined(jumps: Sequence[Jump], rows: Tensor, width: int) -> Tensor:
    """Return the value of ``Joined``: the computed rows, and W stored inputs before those behind a jump."""
    source = torch.empty(len(rows) + width * len(jumps), dtype=torch.int64)
    source[own(jumps, rows, width)] = torch.arange(-1, -len(rows) - 1, -1)
    for number, (jump, end) in enumerate(zip(jumps, _ranks(rows, [j.end for j in jumps]), strict=True)):
        at = end + number * width
        source[at : at + width] = torch.arange(jump.tail * width, (jump.tail + 1) * width)
    return source


def own(jumps: Sequence[Jump], rows: Tensor, width: int) -> Tensor:
    """Return the value of ``Own``: the indices of the computed rows in ``joined``."""
    ends = torch.tensor([jump.end for jump in jumps], dtype=torch.int64)
    return torch.arange(len(rows)) + width * torch.searchsorted(ends, rows, right=True)


def record_bounds(records: Sequence[Record], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of ``RecordStart`` and ``RecordEnd``."""
    starts, ends = ([getattr(record, name) for record in records] for name in ("start", "end"))
    padding = [0] * (LEAST_ENTRIES - len(records))
    bounds = [torch.tensor([[*_ranks(rows, tokens), *padding]]) for tokens in (starts, ends)]
    return bounds[0], bounds[1]


def last(records: Sequence[Record], jumps: Sequence[Jump], rows: Tensor, width: int) -> Tensor:
    """Return the value of ``Last``: indices in the joined rows behind W rows of zeros."""
    index = own(jumps, rows, width)
    ends = _ranks(rows, [record.end for record in records]) + [0] * (LEAST_ENTRIES - len(records))
    first = torch.tensor([int(index[end - 1]) + 1 if end else 0 for end in ends])
    return (first[:, None] + torch.arange(width)).flatten()


def _ranks(rows: Tensor, tokens: Iterable[int]) -> list[int]:
    """Return the number of rows before each token."""
    return torch.searchsorted(rows, torch.tensor([*tokens], dtype=torch.int64)).tolist()

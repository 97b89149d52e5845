"""What a donor stores of its contexts besides their mean: differences of low rank.

Per slot, a context's difference from the mean is about ``left @ core @ right``. ``left`` and ``right`` span
the rows and channels in which contexts differ most, and are shared by all contexts (a Tucker decomposition of
the contexts' differences, see Kolda and Bader 2009); ``core`` is the context's own. A donor's tensors are
then, for C contexts, n tokens, rank R, and W channels in all::

    0.k  [1, heads, tokens, width]    0.k.left [n, R]   0.k.core [C, R, R]   0.k.right [R, W]

Programs combine them, see ``ops.fit``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.differences import LEAST_RIDGE
from vlcache_fx.spec.slots import Difference, Key, StoredSlot, Value
from vlcache_fx.store.entry import Entry

LARGEST_SHARE = 0.25
"""Most bytes of differences, as a share of the bytes of their mean."""

LEAST_GAIN = 0.05
"""Least share of a context's difference that storing it adds to what other contexts tell of it."""

EXPLAINED_RIDGE = 0.01
"""Regularisation where all rows of a context are known."""

LEAST_RANK, LEAST_CONTEXTS = 2, 2
OVERSAMPLED = 4
"""Directions that are looked at beyond the rank."""


@dataclass(frozen=True)
class Subspace:
    """The differences of one slot; shapes as above, in float32 or wider while they are built."""

    left: Tensor
    core: Tensor
    right: Tensor

    def to(self, dtype: torch.dtype) -> Subspace:
        """Return it in another dtype."""
        return Subspace(self.left.to(dtype), self.core.to(dtype), self.right.to(dtype))


def rank_for(length: int, width: int, contexts: int, rank: int) -> int:
    """Return the rank of a slot: at most ``rank``, and so that bytes stay in ``LARGEST_SHARE``; or 0.

    Args:
        length: tokens of the item.
        width: channels of the slot in all.
        contexts: most contexts of a donor.
        rank: the option ``donor_rank``.
    """
    most = min(rank, length, width)
    room = LARGEST_SHARE * length * width
    while most >= LEAST_RANK and most * (length + width) + contexts * most**2 > room:
        most -= 1
    return most if most >= LEAST_RANK else 0


def extended(old: Subspace | None, shift: Tensor, contexts: int, rank: int) -> Subspace:
    """Return the differences from a new mean, with those of a new context.

    Args:
        old: the differences from the old mean; None if it had one context, or its differences are not known.
        shift: new mean minus old mean, [n, W].
        contexts: number of contexts in the old mean.
        rank: of the result.
    """
    left, right = _directions(shift, rank + OVERSAMPLED)
    if old is not None:
        left = _orthonormal(torch.cat([old.left, left], 1))
        right = _orthonormal(torch.cat([old.right.t(), right], 1))
        others = (left.t() @ old.left) @ old.core @ (old.right @ right)
    else:
        others = shift.new_zeros(1, left.shape[1], right.shape[1])
    step = left.t() @ shift @ right
    # The new context is ``contexts`` shifts away from the new mean, the others one more than before.
    core = torch.cat([others - step, contexts * step.unsqueeze(0)])
    rows = _leading(torch.einsum("cij,ckj->ik", core, core), rank)
    channels = _leading(torch.einsum("cij,cik->jk", core, core), rank)
    return Subspace(left @ rows, rows.t() @ core @ channels, (right @ channels).t().contiguous())


def explained(others: Subspace, difference: Tensor) -> Tensor:
    """Return how much of a difference's energy (sum of squares) a combination of contexts explains."""
    seen = (others.left.t() @ difference @ others.right.t()).double()
    core = others.core.flatten(1).double()
    gram, wanted = core @ core.t(), core @ seen.flatten()
    ridge = EXPLAINED_RIDGE * gram.diagonal().mean().clamp(min=LEAST_RIDGE)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram + ridge * identity, wanted)
    energy: Tensor = 2 * weights @ wanted - weights @ gram @ weights
    return energy


def subspace_of(entry: Entry, slot: StoredSlot) -> Subspace | None:
    """Return the differences that a donor stores of a slot, in its dtype; None without any."""
    names = part_names(slot)
    if any(name not in entry.tensors for name in names):
        return None
    return Subspace(*(entry.tensors[name] for name in names))


def differences_fit(entry: Entry, specs: Mapping[StoredSlot, RowSpec]) -> bool:
    """Return True if a donor has differences, and each fits the rows beside it."""
    found = False
    for slot, spec in specs.items():
        names = part_names(slot)
        held = [name for name in names if name in entry.tensors]
        if not held:
            continue
        if len(held) < len(names):
            return False
        rows = entry.peek(str(slot))
        length = rows.shape[spec.dim]
        left, core, right = (entry.peek(name) for name in names)
        rank = left.shape[-1]
        shapes = ((length, rank), (core.shape[0], rank, rank), (rank, rows.numel() // max(1, length)))
        dtypes = {part.dtype for part in (left, core, right)}
        if dtypes != {getattr(torch, spec.dtype)} or core.shape[0] < LEAST_CONTEXTS or rank < LEAST_RANK:
            return False
        if tuple(tuple(part.shape) for part in (left, core, right)) != shapes:
            return False
        found = True
    return found


def part_names(slot: StoredSlot) -> tuple[str, ...]:
    """Return the names of a slot's ``left``, ``core`` and ``right``."""
    return tuple(f"{slot}.{part}" for part in Difference.parts)


def as_matrix(rows: Tensor, spec: RowSpec) -> Tensor:
    """Return stored rows as a matrix [n, W], in float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide).movedim(spec.dim, 0).flatten(1)


@dataclass(frozen=True)
class Differences:
    """Stores differences beside the means of donors.

    Attributes:
        rank: largest rank, the option ``donor_rank``.
        max_contexts: most contexts of a donor, the option ``donor_contexts``.
        specs: the slots of rows.
    """

    rank: int
    max_contexts: int
    specs: Mapping[StoredSlot, RowSpec]

    @classmethod
    def of(cls, rank: int, max_contexts: int, specs: Mapping[StoredSlot, RowSpec]) -> Differences | None:
        """Return what stores differences for values of the options; None if nothing does."""
        return cls(rank, max_contexts, specs) if rank and max_contexts > 1 else None

    @torch.no_grad()
    def with_context(
        self, donor: Entry, means: Mapping[str, Tensor], rows: Mapping[str, Tensor], contexts: int
    ) -> dict[str, Tensor] | None:
        """Return the tensors to store beside the new means; None if the context adds nothing to the others.

        Args:
            donor: the donor so far.
            means: its means, in the graph's dtype.
            rows: exact rows in the new context.
            contexts: number of contexts in ``means``.
        """
        found: dict[str, Tensor] = {}
        energies = []
        for slot, spec in self.specs.items():
            name = str(slot)
            if not isinstance(slot, Key | Value):
                continue
            before = as_matrix(means[name], spec)
            difference = as_matrix(rows[name].to(before.device), spec) - before
            rank = rank_for(len(before), before.shape[1], self.max_contexts, self.rank)
            if not rank:
                continue
            known = subspace_of(donor, slot)
            known = None if known is None else known.to(before.dtype)
            made = extended(known, difference / (contexts + 1), contexts, rank)
            own = made.to(means[name].dtype)
            found |= dict(zip(part_names(slot), (own.left, own.core, own.right), strict=True))
            # The new context is nearer to the new mean than to the old one, by this factor.
            told = made.core[-1].square().sum() * ((contexts + 1) / contexts) ** 2
            before_told = torch.zeros_like(told).double() if known is None else explained(known, difference)
            energies.append(torch.stack([difference.square().sum().double(), told.double(), before_told]))
        if contexts > 1 and energies:
            total, told_by_all, told_by_others = torch.stack(energies).sum(0).tolist()
            if told_by_all - told_by_others < LEAST_GAIN * total:
                return None
        return found


def _directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns that span about the leading singular vectors, [n, k] and [W, k].

    A randomized range finder with two power iterations (Halko, Martinsson and Tropp 2011), the same for the
    same matrix.
    """
    count = min(count, *matrix.shape)
    generator = torch.Generator().manual_seed(0)  # that of the process is the caller's
    start = torch.randn(matrix.shape[1], count, generator=generator, dtype=matrix.dtype).to(matrix.device)
    left = _orthonormal(matrix @ start)
    for _ in range(2):
        left = _orthonormal(matrix @ _orthonormal(matrix.t() @ left))
    return left, _orthonormal(matrix.t() @ left)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _leading(gram: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -rank:]

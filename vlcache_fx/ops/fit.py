"""``torch.ops.vlcache.fit_rows``: splice donor rows that are fitted to the rows which a call recomputes.

A donor of several contexts is their mean and, per context, a difference of low rank: ``left @ core @ right``.
``left`` and ``right`` are shared by all contexts of a slot, so that the best combination of contexts costs as
much as one difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlcache_fx.ops.rows import splice_rows_reference
from vlcache_fx.spec.differences import BLOCK_ROWS, LEAST_RIDGE, RIDGE

__all__ = ["fit_rows", "fit_rows_reference"]


def fit_rows_reference(
    donor: Tensor,
    fresh: Tensor,
    source: Tensor,
    rows: Tensor,
    donor_row: Tensor,
    left_row: Tensor,
    left: Tensor,
    core: Tensor,
    right: Tensor,
    left_donor: Tensor,
    dim: int,
    batch_dim: int | None = None,
) -> Tensor:
    """Splice rows as ``splice_rows`` does; add to donor rows the differences of their contexts, weighted.

    Per donor, weights minimise the squared distance between its combined rows and those that the call
    recomputes, plus ``RIDGE`` times their own squares: ridge regression. Differences are linear in weights,
    so this is a system of as many equations as there are contexts.

    With b samples (1 without ``batch_dim``), N tokens, n recomputed rows of width W (all other dimensions), g
    donors of C contexts, rank R, and B blocks of ``BLOCK_ROWS`` rows:

    Args:
        donor: table of the donors' means, as in ``splice_rows``.
        fresh: recomputed rows, likewise.
        source: int64 [N] or [b, N], likewise.
        rows: positions of the recomputed rows, int64 [n] or [b, n]; equal neighbours count once.
        donor_row: per token its row in ``donor``, recomputed or not, int64 [N] or [b, N]; read where
            ``left_row`` is not -1.
        left_row: per token its row in the blocks of ``left``; -1 where no difference is stored.
        left: [B, BLOCK_ROWS, R].
        core: [g, C, R, R].
        right: [g, R, W], with orthonormal rows; dimensions of W in the order of ``donor``.
        left_donor: the donor of each block, int64 [B].
        dim: row dimension.
        batch_dim: batch dimension, if each sample has its own source.

    Returns:
        [..., N, ...] of the dtype of ``fresh``.
    """
    spliced = splice_rows_reference(donor, fresh, source, dim, batch_dim)
    wide = torch.promote_types(fresh.dtype, torch.float32)
    # The rows of a donor that are known in this call.
    index, at = left_row.gather(-1, rows).flatten(), donor_row.gather(-1, rows).flatten()
    is_new = torch.cat(
        [torch.ones_like(rows[..., :1], dtype=torch.bool), rows[..., 1:] != rows[..., :-1]], -1
    )
    known = ((index >= 0) & is_new.flatten()).unsqueeze(1)
    index, at = index.clamp(min=0), at.clamp(min=0)
    means = _matrix(donor, dim, batch_dim).index_select(0, at)
    missing = torch.where(known, _matrix(fresh, dim, batch_dim).to(wide) - means.to(wide), 0)
    own = torch.where(known, left.flatten(0, 1).index_select(0, index).to(wide), 0)
    donors = left_donor.index_select(0, index // BLOCK_ROWS)
    effects = _effects(own, missing, donors, core.to(wide), right.to(wide)).to(left.dtype)
    # All differences of a slot in one product, as large as the spliced rows.
    differences = torch.bmm(left, effects.index_select(0, left_donor)).flatten(0, 1)
    added = differences.index_select(0, left_row.clamp(min=0).flatten())
    reads = ((source >= 0) & (left_row >= 0)).flatten().unsqueeze(1)
    added = torch.where(reads, added, 0).to(spliced.dtype)
    leading, to = ((dim,), (0,)) if batch_dim is None else ((batch_dim, dim), (0, 1))
    sizes = spliced.movedim(leading, to).shape
    return spliced + added.view(sizes).movedim(to, leading)


def _matrix(rows: Tensor, dim: int, batch_dim: int | None) -> Tensor:
    """Return rows as a matrix: the rows of all samples, and their width."""
    if batch_dim is None:
        return rows.movedim(dim, 0).flatten(1)
    return rows.movedim((batch_dim, dim), (0, 1)).flatten(0, 1).flatten(1)


def _effects(own: Tensor, missing: Tensor, donors: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Return ``sum of weight * core @ right`` per donor, [g, R, W].

    Args:
        own: rows of ``left`` that are known, [rows, R].
        missing: what they lack, [rows, W].
        donors: their donors, [rows].
        core, right: as in ``fit_rows_reference``.
    """
    count, contexts, rank, _ = core.shape
    member = (donors.unsqueeze(1) == torch.arange(count, device=donors.device)).to(own.dtype)
    scaled = (member.unsqueeze(2) * own.unsqueeze(1)).flatten(1)  # [rows, g R]
    gram = (scaled.t() @ own).view(count, rank, rank)
    product = torch.bmm((scaled.t() @ missing).view(count, rank, -1), right.transpose(1, 2))
    flat = core.flatten(2)  # [g, C, R R]
    beside = core.transpose(1, 2).reshape(count, rank, contexts * rank)  # cores side by side
    seen = torch.bmm(gram, beside).view(count, rank, contexts, rank).transpose(1, 2).flatten(2)
    equations = torch.bmm(seen, flat.transpose(1, 2))
    wanted = torch.bmm(flat, product.flatten(1).unsqueeze(2))
    identity = torch.eye(contexts, dtype=own.dtype, device=own.device)
    trace = (equations * identity).sum((1, 2))  # Inductor's `diagonal` warns
    ridge = RIDGE * (trace / contexts).clamp(min=LEAST_RIDGE)
    weights = torch.linalg.solve_ex(equations + ridge.view(-1, 1, 1) * identity, wanted)[0]
    return torch.bmm(torch.bmm(weights.transpose(1, 2), flat).view(count, rank, rank), right)


@torch.library.custom_op("vlcache::fit_rows", mutates_args=())
def fit_rows(
    donor: Tensor,
    fresh: Tensor,
    source: Tensor,
    rows: Tensor,
    donor_row: Tensor,
    left_row: Tensor,
    left: Tensor,
    core: Tensor,
    right: Tensor,
    left_donor: Tensor,
    dim: int,
    batch_dim: int | None = None,
) -> Tensor:
    """See ``fit_rows_reference``."""
    return fit_rows_reference(
        donor, fresh, source, rows, donor_row, left_row, left, core, right, left_donor, dim, batch_dim
    ).contiguous()


@fit_rows.register_fake
def _(
    donor: Tensor,  # noqa: ARG001 (the schema)
    fresh: Tensor,
    source: Tensor,
    rows: Tensor,  # noqa: ARG001
    donor_row: Tensor,  # noqa: ARG001
    left_row: Tensor,  # noqa: ARG001
    left: Tensor,  # noqa: ARG001
    core: Tensor,  # noqa: ARG001
    right: Tensor,  # noqa: ARG001
    left_donor: Tensor,  # noqa: ARG001
    dim: int,
    batch_dim: int | None = None,  # noqa: ARG001
) -> Tensor:
    sizes = list(fresh.shape)
    sizes[dim] = source.shape[-1]
    return fresh.new_empty(sizes)

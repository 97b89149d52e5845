"""Shadow runs: compare the logits of a warm request with those of a full computation. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.runtime.requests.request import Request

CHUNK_ROWS = 64
"""Rows of logits that are compared at once, which bounds memory."""


@dataclass(frozen=True)
class Comparison:
    """Difference between the logits with reuse and the exact logits of one request.

    Attributes:
        kl: mean KL divergence of the logits with reuse from the exact ones, in nats: mean over the compared
            rows of each sample, then over samples.
        flip: the most likely next token of some sample differs.
    """

    kl: float
    flip: bool


def compare(
    exact: Tensor, reused: Tensor, rows: Sequence[Tensor | None], last: Sequence[int] | None = None
) -> Comparison:
    """Compare logits, [..., vocabulary], of ``len(rows)`` samples.

    Args:
        exact: logits of the full computation.
        reused: logits with reuse, same shape.
        rows: per sample, indices of the rows to compare; None for all.
        last: per sample, the row that predicts the next token; by default the last.
    """
    exact, reused = (
        part.detach()
        .reshape(len(rows), -1, part.shape[-1])
        .to(torch.promote_types(part.dtype, torch.float32))
        for part in (exact, reused)
    )
    means, flip = [], False
    for sample, chosen in enumerate(rows):
        ours, theirs = exact[sample], reused[sample]
        at = -1 if last is None else last[sample]
        flip = flip or bool(ours[at].argmax() != theirs[at].argmax())
        if chosen is not None:
            ours, theirs = (part[chosen.to(part.device)] for part in (ours, theirs))
        chunks = zip(*(torch.split(part, CHUNK_ROWS) for part in (ours, theirs)), strict=True)
        means.append(torch.cat([kl_per_row(*chunk) for chunk in chunks]).mean())
    return Comparison(float(torch.stack(means).mean()), flip)


def kl_per_row(exact: Tensor, reused: Tensor) -> Tensor:
    """Return the KL divergence of ``reused`` from ``exact`` per row of logits [..., vocabulary], in nats.

    Computed in the logits' dtype, summed in float64. 0 for equal rows; infinite where ``reused`` excludes a
    token that ``exact`` does not.
    """
    p, q = exact.log_softmax(-1), reused.log_softmax(-1)
    terms = (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0)
    return terms.sum(-1, dtype=torch.float64).clamp(min=0.0)


def compared_rows(
    request: Request, positions: Tensor | None, num_rows: int
) -> tuple[list[Tensor | None], list[int] | None]:
    """Return ``(rows, last)`` for ``compare``: the rows at tokens of text.

    Predictions at image tokens are not used, and those at padding are meaningless. All rows are compared if
    ``num_rows`` does not match the positions.

    Args:
        request: the call.
        positions: tokens that results need; None for all.
        num_rows: rows of logits per sample.
    """
    tokens = torch.arange(request.num_tokens) if positions is None else positions
    if len(tokens) != num_rows:
        return [None] * len(request.samples), None
    rows: list[Tensor | None] = []
    last = []
    for sample in request.samples:
        real = torch.ones(num_rows, dtype=torch.bool)
        if sample.padding is not None:
            real = ~torch.isin(tokens, sample.padding.cpu())
        at = int(real.nonzero()[-1]) if real.any() else num_rows - 1
        for span in sample.spans:
            real &= (tokens < span.start) | (tokens >= span.end)
        real[at] = True
        last.append(at)
        rows.append(real.nonzero().flatten())
    return rows, last

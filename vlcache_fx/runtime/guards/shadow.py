"""Shadow runs: a warm request is computed in full as well, and its logits are compared.

Everything here is pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.runtime.requests.request import Request

CHUNK_ROWS = 64
"""Rows of logits that are compared at once: vocabularies are large, prompts are long."""


@dataclass(frozen=True)
class Comparison:
    """Logits with reuse beside the exact ones, of one request.

    Attributes:
        kl: mean KL divergence of the former from the latter, in nats: over the compared rows of each sample,
            then over samples.
        flip: the likeliest token of some sample's last row is another one.
    """

    kl: float
    flip: bool


def compare(
    exact: Tensor, reused: Tensor, rows: Sequence[Tensor | None], last: Sequence[int] | None = None
) -> Comparison:
    """Compare logits, [..., vocabulary], of as many samples as there are ``rows``.

    Args:
        exact: of the full computation.
        reused: of the same shape, with reuse.
        rows: per sample, indices of the rows to compare; None for all.
        last: per sample, the row that says the next token; by default the last one.
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
    """KL divergence of ``reused`` from ``exact``, in nats, of each row of floating logits [..., vocabulary].

    Computed in the logits' dtype, added up in float64. 0 for equal rows; infinite where ``reused`` rules a
    token out that ``exact`` does not.
    """
    p, q = exact.log_softmax(-1), reused.log_softmax(-1)
    terms = (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0)
    return terms.sum(-1, dtype=torch.float64).clamp(min=0.0)


def compared_rows(
    request: Request, positions: Tensor | None, num_rows: int
) -> tuple[list[Tensor | None], list[int] | None]:
    """``(rows, last)`` for ``compare``: those of text that is read.

    What a model says behind an image's token is not read, and what it says behind padding means nothing (nor
    is it computed). Where it is not known which tokens the rows of logits are of, all are compared.

    Args:
        request: the call.
        positions: tokens that results need, None for all.
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

"""Text that describes a mask, as part of keys.

Stored rows depend on the mask. Graphs express one mask in many ways: ``is_causal``, built in the graph,
passed by the caller, bool or additive. So the text describes the values:

- *causal*: a token attends to itself and all tokens before it;
- *both ways*: also to the later tokens of its span;
- *window n*: as causal, but to no token more than n before it;
- a digest for anything else.

Parameters of a mask rule, such as a window's width, enter the text: values of short prompts do not show
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlcache_fx.keys.digest import content_digest
from vlcache_fx.plan.types import Span

HIDDEN_BELOW = -1e3
"""Values of an additive mask below this hide a key; values above are a bias."""

CAUSAL, BOTH_WAYS, ALL = "causal", "both ways", "all"


@dataclass(frozen=True)
class MaskView:
    """The mask of one sample.

    Attributes:
        is_plain: the mask is causal, or causal except within spans; then ``seen`` and ``bias`` are None.
        spans_both_ways: tokens of a span attend to all tokens of the span.
        seen: bool [heads, tokens, tokens]: True where the row's token attends to the column's token.
        bias: values that an additive mask adds where ``seen``, same shape; None where all are 0.
        rule: see ``MaskSite``.
    """

    is_plain: bool
    spans_both_ways: bool = False
    seen: Tensor | None = None
    bias: Tensor | None = None
    rule: str = ""

    def shown_to_span(self, span: Span) -> str:
        """Return the text for the tokens of a span."""
        if self.seen is None:
            text = BOTH_WAYS if self.spans_both_ways else CAUSAL
            return f"{text}, {self.rule}" if self.rule else text
        start, end = span.start, span.end
        rows = self.seen[:, start:end]
        inside, before = self._inside(rows[..., start:end]), self._before(rows, start, end)
        if self.bias is not None:
            bias = self.bias[:, start:end, :start]
            inside += f" {content_digest([self.bias[:, start:end, start:end].contiguous()])}"
            if bool(bias.any()):
                before += f" {self.rule or content_digest([start, bias.contiguous()])}"
        return inside if before == ALL else f"{inside}, {before}"

    def _inside(self, inside: Tensor) -> str:
        if bool(inside.all()):
            return BOTH_WAYS if inside.shape[-1] > 1 else CAUSAL
        if bool((inside == _causal(inside.shape[-1], inside.device)).all()):
            return CAUSAL
        return content_digest([_packed(inside)])

    def _before(self, rows: Tensor, start: int, end: int) -> str:
        """Return the text for tokens before the span; padding does not count."""
        assert self.seen is not None
        if self.rule:
            return self.rule
        real = self.seen.any(1, keepdim=True)  # [heads, 1, tokens]
        if bool((rows[..., :start] == real[..., :start]).all()):
            return ALL
        own = torch.arange(start, end, device=rows.device)
        columns = torch.arange(end, device=rows.device)
        distance = own[:, None] - columns  # from a row back to a column
        candidates = rows[..., :end] & real[..., :end]
        reach = torch.where(candidates, distance, -1).amax(-1)  # [heads, rows]
        is_limited = (real[..., :end] & (distance >= 0) & ~candidates).any(-1)
        reaches = torch.unique(reach[is_limited])
        if len(reaches) == 1:
            limit = int(reaches[0])
            window = real[..., :end] & (distance <= limit)
            window &= (distance >= 0) | candidates
            if bool((candidates == window).all()):
                return f"window {limit}"
        return content_digest([start, _packed(rows[..., :start])])

    def shown_to_tokens(self, num_tokens: int) -> list[bytes]:
        """Return bytes per token for what it attends to; independent of the length of the prompt."""
        if self.seen is None:  # attention within a span is part of the span's key
            return [b""] * num_tokens
        packed = _packed(self.seen.transpose(0, 1))  # [tokens, heads, bytes]
        rows = [b"|".join(head.tobytes().rstrip(b"\0") for head in row) for row in packed.numpy()]
        if self.bias is None:
            return rows
        values = self.bias.transpose(0, 1).contiguous().cpu()
        return [
            row + bytes.fromhex(content_digest([value[..., : 1 + int(last)]]))
            for row, value, last in zip(rows, values, last_seen(self.seen), strict=True)
        ]


def view_of(mask: Tensor, tokens: Tensor, num_tokens: int, spans: Sequence[Span], rule: str = "") -> MaskView:
    """Describe the mask of one sample.

    Args:
        mask: [..., rows, keys], bool or additive; one row per token, or one row for all.
        tokens: the token of each key, int64 [keys]; negative for keys of earlier calls.
        num_tokens: tokens of the sample.
        spans: spans of the sample.
        rule: see ``MaskSite``.
    """
    shown = visible(mask)
    bias = _bias(mask, shown)
    rows = torch.arange(num_tokens, device=mask.device)
    if bias is None and mask.shape[-2] == num_tokens:
        own = tokens >= 0
        if bool((shown == (own & (tokens <= rows[:, None]))).all()):
            return MaskView(is_plain=True, rule=rule)
        for span in spans:
            rows[span.start : span.end] = span.end - 1
        if spans and bool((shown == (own & (tokens <= rows[:, None]))).all()):
            return MaskView(is_plain=True, spans_both_ways=True, rule=rule)
    seen = _by_token(shown, tokens, num_tokens)
    biases = None if bias is None else _by_token(bias, tokens, num_tokens)
    return MaskView(False, False, seen, biases, rule)


def visible(mask: Tensor) -> Tensor:
    """Return a bool mask, True where attention is allowed."""
    return mask > HIDDEN_BELOW if mask.is_floating_point() else mask


def _bias(mask: Tensor, shown: Tensor) -> Tensor | None:
    if not mask.is_floating_point():
        return None
    bias = mask.masked_fill(~shown, 0.0)
    return bias if bool(bias.any()) else None


def _by_token(value: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Return [..., rows, keys] as [heads, tokens, tokens] on the CPU, keys in token order."""
    own = (tokens >= 0) & (tokens < num_tokens)
    keys = value[..., own].reshape(-1, value.shape[-2], int(own.sum()))
    keys = keys.expand(-1, num_tokens, -1)
    found = keys.new_zeros(keys.shape[0], num_tokens, num_tokens)
    found[..., tokens[own]] = keys
    return found.cpu()


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _packed(flags: Tensor) -> Tensor:
    """Pack flags as bits, uint8 [..., ceil(last / 8)]."""
    return torch.from_numpy(np.packbits(flags.contiguous().numpy(), axis=-1, bitorder="little"))


def last_seen(seen: Tensor) -> Tensor:
    """Return the last token to which each token attends, [tokens]; -1 where it attends to none.

    Args:
        seen: as in ``MaskView``.
    """
    columns = torch.arange(seen.shape[-1])
    return torch.where(seen, columns, -1).amax(-1).amax(0)

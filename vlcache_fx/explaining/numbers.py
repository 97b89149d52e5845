"""Numbers and keys as short texts."""

from __future__ import annotations


def ms_text(ms: float) -> str:
    """Return a time with three digits: ``0.412 ms``, ``41.2 ms``, ``1.24 s``."""
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    digits = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3
    return f"{ms:.{digits}f} ms"


def seconds_text(seconds: float) -> str:
    """Return a duration in its largest unit: ``12 s``, ``3 min``, ``5 h``, ``2 d``."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def bytes_text(nbytes: float) -> str:
    """Return bytes in their largest unit: ``960 B``, ``2.5 KiB``, ``1.2 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def flops_text(flops: float) -> str:
    """Return a number of operations: ``3.1 GFLOP``."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if flops < 1000:
            return f"{flops:.3g} {unit}"
        flops /= 1000
    return f"{flops:,.1f} TFLOP"


def tokens_text(start: int, length: int) -> str:
    """Return a span: ``tokens 6 to 1,205``."""
    return f"tokens {start:,} to {start + length - 1:,}"


def rank_text(rank: int) -> str:
    """Return the rank of a donor's differences."""
    return str(rank) if rank else "mean only"


def ago_text(seconds: float | None) -> str:
    """Return how long ago something was: ``3 min ago``; ``unknown`` for None."""
    return "unknown" if seconds is None else f"{seconds_text(seconds)} ago"


def short_key(key: str) -> str:
    """Return the kind of a key and the first 12 digits of its digest."""
    kind, _, rest = key.partition("-")
    return f"{kind} {rest.rpartition('-')[2][:12]}" if rest else key

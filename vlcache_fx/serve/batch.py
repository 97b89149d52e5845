"""Which of the waiting requests run together."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from vlcache_fx.serve.job import Job

KNOWN_SHARE = 0.05
"""Estimated share of a known picture's tokens that a request computes, with its text."""


def choose(waiting: Sequence[Job], batch_size: int, max_tokens: int, seen: Container[str]) -> list[Job]:
    """Return the requests that run next: the first, and those that fit to it, in order.

    A batch computes the longest prompt for each of its rows, the others with padding. Large prompts keep the
    processor busy by themselves: together they only make each other wait. Requests that bring the same new
    picture part, too: the second one reuses it.

    Args:
        waiting: at least one request, oldest first.
        batch_size: largest number of requests.
        max_tokens: largest number of tokens that the batch computes, with padding, as far as can be known.
        seen: pictures that have left donors, so that a request with them is expected to reuse them.
    """
    first, *others = waiting
    found, longest, new = [first], num_computed(first, seen), _new(first, seen)
    for job in others:
        if len(found) == batch_size:
            break
        if first.group is None or job.group != first.group:
            continue
        own, most = _new(job, seen), max(longest, num_computed(job, seen))
        if (len(found) + 1) * most > max_tokens or own & new:
            continue
        found, longest, new = [*found, job], most, new | own
    return found


def num_computed(job: Job, seen: Container[str]) -> int:
    """Estimate how many tokens of a prompt are computed; 0 for an example, which runs with its like."""
    if job.is_example:
        return 0
    if job.settings.bypass or not job.pictures:
        return job.prompt_tokens
    new = len(_new(job, seen)) / len(job.pictures)
    return math.ceil(job.prompt_tokens * max(new, KNOWN_SHARE))


def _new(job: Job, seen: Container[str]) -> set[str]:
    """The pictures that are not known; none where nothing is reused anyway."""
    return set() if job.settings.bypass else {name for name in job.pictures if name not in seen}

"""What a router knows of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """Where a request would like to go.

    Attributes:
        pictures: digests of its pictures, in its order.
        avoid: replicas that already failed it.
    """

    pictures: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()

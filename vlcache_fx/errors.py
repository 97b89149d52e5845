"""The errors that this package raises.

::

    VlcacheError
    ├── OptionError            (also a ValueError)  an option is unknown or has a bad value
    ├── PolicyError            a policy or profile is unknown, malformed, or does not fit the model
    ├── PlanError              no valid plan can be made from the spans or row sets
    ├── StoreError             a store, an entry or a key cannot be created, read or written
    │   ├── StoreClosedError        the store is closed
    │   ├── DamagedEntryError       the bytes of an entry are not those that were stored
    │   └── UnreadableWeightsError  the bytes of a weight cannot be read, so keys cannot cover it
    ├── UnsupportedGraphError  the graph is refused; it runs unmodified instead
    ├── SlotError              (also a ValueError)  a string is not the name of a slot
    ├── PassError              a pass failed
    ├── LoweringError          a rewritten graph cannot be compiled
    │   └── NoCompilerError    torch's compiler lacks a tool on this machine
    ├── ExportError            a model cannot be exported, or an exported model cannot be read or run
    └── CopyError              (also a TypeError)   a compiled model cannot be copied or pickled

``UnsupportedGraphError`` reaches users only with the option ``strict``. Otherwise the model runs as it would
without this package, and the report states the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlcache_fx.reasons import Reason as Reason


class VlcacheError(Exception):
    """Base class of all errors of this package."""


class OptionError(VlcacheError, ValueError):
    """An option is unknown or has a bad value; the message names the value and the valid ones."""


class PolicyError(VlcacheError):
    """A policy or a profile is unknown, malformed, or does not fit the model."""


class PlanError(VlcacheError):
    """Spans or row sets make no valid plan or, with the option ``strict``, need a repair."""


class SlotError(VlcacheError, ValueError):
    """A string is not the name of a slot, that is, of an input that passes add or of rows in a donor."""


class StoreError(VlcacheError):
    """A store, an entry or a key cannot be created, read or written."""


class StoreClosedError(StoreError):
    """The store is closed and empty."""


class DamagedEntryError(StoreError):
    """The bytes of an entry are not those that were stored; names the key.

    The entry counts as a miss. Its store has logged it.
    """


class UnreadableWeightsError(StoreError):
    """The bytes of a weight cannot be read, so keys cannot cover it; names the weight and the cause."""


class CopyError(VlcacheError, TypeError):
    """A compiled model cannot be copied or pickled; the message names the alternative."""


LONGEST_DETAIL = 300
"""Limit of a refusal's detail, in characters."""


class UnsupportedGraphError(VlcacheError):
    """A graph cannot be rewritten; names the reason and the line of the user's model.

    Args:
        reason: the kind of refusal.
        detail: the cause, in words.
        node: name of the graph node that is the cause, or None.
        source_line: source of the node, ``file:line: code``, or None.
    """

    def __init__(
        self, reason: Reason, detail: str, node: str | None = None, source_line: str | None = None
    ) -> None:
        # One line, and short: a compiler's message may list every input of a graph.
        detail = " ".join(detail.split())
        if len(detail) > LONGEST_DETAIL:
            detail = f"{detail[: LONGEST_DETAIL - 80]} ... {detail[-75:]}"
        super().__init__(reason, detail, node, source_line)
        self.reason = reason
        self.detail = detail
        self.node = node
        self.source_line = source_line

    def __str__(self) -> str:
        parts = []
        if self.node is not None:
            parts.append(f"node {self.node!r}")
        if self.source_line is not None:
            parts.append(f"from {self.source_line.strip()}")
        location = f" (at {', '.join(parts)})" if parts else ""
        return f"graph not supported [{self.reason.value}]: {self.detail.rstrip('.')}{location}."

    def as_dict(self) -> dict[str, str | None]:
        """Return the refusal as JSON-serialisable data."""
        return {
            "reason": self.reason.value,
            "detail": self.detail,
            "node": self.node,
            "source_line": self.source_line,
        }


class PassError(VlcacheError):
    """A pass of the pipeline failed.

    Args:
        pass_name: registered name of the failing pass.
        passes_before: names of the passes that had run on this graph, in order.
        detail: the cause, in words.
    """

    def __init__(self, pass_name: str, passes_before: Sequence[str] = (), detail: str = "failed") -> None:
        super().__init__(pass_name, tuple(passes_before), detail)
        self.pass_name = pass_name
        self.passes_before = tuple(passes_before)
        self.detail = detail

    def __str__(self) -> str:
        before = ", ".join(self.passes_before) or "no other pass"
        return f"pass {self.pass_name!r}: {self.detail.rstrip('.')} (it ran after: {before})."


class LoweringError(VlcacheError):
    """A rewritten graph cannot be compiled or bound to its inputs."""


class NoCompilerError(LoweringError):
    """Torch's compiler lacks a tool on this machine (a C++ compiler, Triton); names it and the remedy."""


class ExportError(VlcacheError):
    """A model cannot be exported, or an exported model cannot be read or run; names the file or value."""

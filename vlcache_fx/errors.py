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
from enum import StrEnum
from typing import Self


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


class Reason(StrEnum):
    """Reasons for refusing a graph, or for computing a call or a span without reuse.

    The values are stable and appear in reports and metrics. Calls of a refused graph have the graph's reason.

    Attributes:
        text: the reason in words.
    """

    text: str

    def __new__(cls, value: str, text: str = "") -> Self:
        """Create a member with its text."""
        reason = str.__new__(cls, value)
        reason._value_, reason.text = value, text
        return reason

    # Of graphs. The refusal names the node and its source line.
    NO_ATTENTION = "no_attention", "the graph has no attention"
    NO_MERGE = "no_merge", "no encoder features enter the token embeddings, and no spans are marked"
    NO_STREAM = "no_stream", "no residual stream is found between two attention calls"
    UNKNOWN_OP = "unknown_op", "an operator on the token dimension is not known to be token-wise"
    TOKEN_AXIS_LOST = "token_axis_lost", "an operator merges, flattens or permutes the token dimension away"
    TOKEN_MIXING = "token_mixing", "tokens mix outside attention, in a form that is not known as a recurrence"
    POSITION_IN_STREAM = "position_in_stream", "learned position embeddings are added to the residual stream"
    BATCHED = "batched", "rows cannot be gathered for each sample of a batch"
    MUTATED_INPUTS = "mutated_inputs", "the graph writes to its inputs in a way that cannot be repeated"
    PAST_KEYS = "past_keys", "a decoding step: it continues a KV cache and has nothing to reuse"
    ATTENTION_FORM = "attention_form", "an attention cannot be brought to the canonical form"
    MASK_FORM = "mask_form", "an attention mask cannot be cut to rows"
    CAPTURE_FAILED = "capture_failed", "the graph cannot be brought to functional ATen"
    GRAD_REQUIRED = "grad_required", "gradients are recorded, and reused values have none"
    LOWERING_FAILED = "lowering_failed", "the rewritten graph did not compile"
    RANDOM = "random", "the graph draws random numbers"
    NO_COMPILER = "no_compiler", "no C++ compiler or Triton: eager kernels run, with reuse"
    DATA_DEPENDENT = "data_dependent", "shapes or control flow depend on tensor values"
    WEIGHTS_UNREADABLE = "weights_unreadable", "the bytes of a weight cannot be read, so keys cannot cover it"
    UNCOMPILED = "uncompiled", "Dynamo ran the call uncompiled: no graph reached the backend"
    NO_LOGITS = "no_logits", "no result is the logits: reuse without shadow runs"

    # Of calls, where the graph allows reuse.
    NO_SPAN = "no_span", "no media span"
    ONE_TOKEN = "one_token", "a sequence of one token"
    MISMATCH = "mismatch", "placeholders and encoder features do not agree in number or width"
    CANNOT_WRITE = (
        "cannot_write",
        "a mutated input shares memory with another input, or is not contiguous",
    )
    TOO_FEW_ROWS = (
        "too_few_rows",
        "results need fewer than two tokens, in a graph for any number of tokens",
    )
    GUARDED = "guarded", "shadow runs or the gate turned reuse off for the model"
    NO_PLAN = "no_plan", "the policy's rows make no plan"
    PROGRAM_FAILED = "program_failed", "the rewritten graph did not compile"

    # Of spans, and of calls without any reused span.
    NEW_ITEM = "new_item", "its content is new"
    NOT_RECORDED = "not_recorded", "seen before, but not recorded or no longer stored"
    OTHER_WEIGHTS = "other_weights", "seen before, but only with other weights"
    OTHER_ENCODING = (
        "other_encoding",
        "its pixels were seen before, but with another grid, other settings or another encoder",
    )
    OTHER_POSITIONS = "other_positions", "seen before, but only at other positions or under another mask"
    OTHER_TEXT = "other_text", "seen before, but its tokens attend to the question, which was another"
    NO_PREFIX = (
        "no_prefix",
        "its tokens attend to the question, so it is reused in an exact prefix only, and there is none",
    )
    OTHER_COMPUTATION = (
        "other_computation",
        "seen before, but only in another dtype, numeric mode or kind of attention",
    )
    EVICTED = "evicted", "its donor was evicted to make room"
    DAMAGED_ENTRY = "damaged_entry", "its donor was damaged and set aside"
    TOO_LARGE = "too_large", "its donor is too large for the store"
    STORE_CLOSED = "store_closed", "the store is closed"
    STORE_FAILED = "store_failed", "the store failed"
    INCOMPATIBLE_ENTRY = "incompatible_entry", "its donor does not fit the graph"
    RECOMPUTED_TO_RECORD = (
        "recomputed_to_record",
        "it has a donor, but is recomputed to record another context",
    )
    RECOMPUTED_TO_REFINE = (
        "recomputed_to_refine",
        "it has a donor, but its first returns are computed, as the option exact_returns says",
    )


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

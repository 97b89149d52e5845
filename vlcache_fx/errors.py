"""Every error that this package raises on purpose.

::

    VlcacheError
    ├── OptionError            (also a ValueError)  an option is unknown or has a bad value
    ├── PolicyError            a policy or profile is unknown, malformed, or does not fit the model
    ├── PlanError              spans or row sets from which no valid plan can be made
    ├── StoreError             a store, an entry or a key could not be made, read or written
    │   ├── StoreClosedError        somebody closed the store
    │   └── UnreadableWeightsError  the bytes of a weight cannot be read, so nothing can be kept under them
    ├── UnsupportedGraphError  the typed refusal: the graph runs unmodified instead
    ├── SlotError              (also a ValueError)  a name is not that of a slot
    ├── PassError              a pass failed; names itself and the passes before it
    ├── LoweringError          a rewritten graph could not be compiled
    │   └── NoCompilerError    torch's compiler lacks something on this machine; says what, and the remedy
    ├── ExportError            a model could not be exported, or an exported one not be read
    └── CopyError              (also a TypeError)   a compiled model was to be copied or pickled

A refusal never reaches users unless the option ``strict`` is set: the model then runs as it would without
this package, and the report says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class VlcacheError(Exception):
    """Base class of all errors of this package."""


class OptionError(VlcacheError, ValueError):
    """An option is unknown or has a bad value; the message names the value and what would be valid."""


class PolicyError(VlcacheError):
    """A policy or a profile is unknown, malformed, or does not fit the model it is used with."""


class PlanError(VlcacheError):
    """The spans or row sets are not executable (and, in strict mode, when they would need a repair)."""


class SlotError(VlcacheError, ValueError):
    """A name is not that of a slot: an input that passes add to a program, or rows that donors store."""


class StoreError(VlcacheError):
    """A store, an entry or a key could not be made, read or written."""


class StoreClosedError(StoreError):
    """Somebody closed the store; it holds nothing any more."""


class UnreadableWeightsError(StoreError):
    """The bytes of a weight cannot be read, so nothing can be kept under them; says which weight and why."""


class CopyError(VlcacheError, TypeError):
    """A compiled model was to be copied or pickled; says what to do instead."""


class Reason(StrEnum):
    """Why a graph was refused. The values are stable: reports and metrics carry them."""

    NO_ATTENTION = "no_attention"
    """No attention site was found."""
    NO_MERGE = "no_merge"
    """No place was found where encoder features enter the token embeddings, and no spans were marked."""
    NO_STREAM = "no_stream"
    """The residual stream between two attention sites could not be isolated."""
    UNKNOWN_OP = "unknown_op"
    """An operator on the token axis is not known to be token-wise."""
    TOKEN_AXIS_LOST = "token_axis_lost"
    """The token axis could not be followed through an operator (merged, flattened, permuted away)."""
    TOKEN_MIXING = "token_mixing"
    """Tokens meet outside attention, in recurrent layers or convolutions: a row depends on all before it."""
    POSITION_IN_STREAM = "position_in_stream"
    """Positions are added to the residual stream itself (learned embeddings): K cannot be position-free."""
    BATCHED = "batched"
    """Several samples per call, and rows cannot be taken sample by sample."""
    MUTATED_INPUTS = "mutated_inputs"
    """The graph writes to its inputs in a way that cannot be repeated after it has run."""
    PAST_KEYS = "past_keys"
    """The call continues a KV cache and brings nothing that could be reused: a decoding step."""
    ATTENTION_FORM = "attention_form"
    """An attention cannot be brought to the one form that is understood; says which one and why."""
    MASK_FORM = "mask_form"
    """An attention mask has a form that cannot be cut to rows."""
    CAPTURE_FAILED = "capture_failed"
    """The graph could not be brought to the functional ATen form."""
    GRAD_REQUIRED = "grad_required"
    """Gradients are needed; reused values carry none."""
    LOWERING_FAILED = "lowering_failed"
    """The rewritten graph did not compile."""
    RANDOM = "random"
    """The graph draws random numbers: what it gave once says nothing of the next call."""
    NO_COMPILER = "no_compiler"
    """Torch's compiler lacks a C++ compiler or Triton: programs run with eager kernels, reuse goes on."""
    DATA_DEPENDENT = "data_dependent"
    """Shapes or control flow depend on tensor values."""
    WEIGHTS_UNREADABLE = "weights_unreadable"
    """The bytes of a weight cannot be read (it is on ``meta``, packed by a kernel library, or a tensor of a
    class that does not say what it is made of): nothing could be told apart by weights."""
    UNCOMPILED = "uncompiled"
    """Dynamo ran a call without compiling it: none of its graphs reached this backend."""
    NO_LOGITS = "no_logits"
    """Results hold no logits: the graph is served, but shadow runs could not be judged and are not made."""


class NotReused(StrEnum):
    """Why a call or a span was not reused, where its graph could be. The values are stable, as ``Reason``'s.

    Calls of graphs that were refused carry the ``Reason`` instead.
    """

    NEW_ITEM = "new_item"
    """Nothing of this content was seen lately, at these positions relative to each other."""
    NOT_RECORDED = "not_recorded"
    """It was seen before, but there is no donor: it could not be recorded then, or is not stored any more."""
    OTHER_WEIGHTS = "other_weights"
    """The same content was seen with other weights, or in another model, alone."""
    TOO_LARGE = "too_large"
    """The store refused its donor."""
    STORE_CLOSED = "store_closed"
    """The store is closed."""
    STORE_FAILED = "store_failed"
    """The store failed when it was asked."""
    INCOMPATIBLE_ENTRY = "incompatible_entry"
    """There is a donor, of a graph that recorded less than this one reads, or something else."""
    RECOMPUTED_TO_RECORD = "recomputed_to_record"
    """There is a donor, but the call was computed in full so that another item could be recorded."""
    NO_SPAN = "no_span"
    """Nothing in the call can be reused: no media, none that is long enough, or none that is marked."""
    ONE_TOKEN = "one_token"
    """A sequence of one token."""
    MISMATCH = "mismatch"
    """Placeholders and encoder features do not agree."""
    CANNOT_WRITE = "cannot_write"
    """An input that is written to has a layout in which that cannot be repeated."""
    TOO_FEW_ROWS = "too_few_rows"
    """Results are made of less than two tokens in a graph for any number of them."""
    GUARDED = "guarded"
    """Shadow runs or the gate decided that the model goes without reuse."""
    NO_PLAN = "no_plan"
    """The policy's rows make no plan."""
    PROGRAM_FAILED = "program_failed"
    """A rewritten graph did not compile, or failed when it ran."""


LONGEST_DETAIL = 300
"""Characters of a refusal's detail."""


class UnsupportedGraphError(VlcacheError):
    """A graph that cannot be rewritten: the reason, and where in the user's model it lies.

    Args:
        reason: the kind of refusal.
        detail: what was found, in words.
        node: name of the graph node concerned, if one is.
        source_line: ``file:line: code`` of the user's model that made the node, if known.
    """

    def __init__(
        self, reason: Reason, detail: str, node: str | None = None, source_line: str | None = None
    ) -> None:
        # One line: errors of a compiler that end up here may list every input of a graph.
        detail = " ".join(detail.split())
        if len(detail) > LONGEST_DETAIL:
            detail = f"{detail[: LONGEST_DETAIL - 80]} ... {detail[-75:]}"
        super().__init__(reason, detail, node, source_line)
        self.reason = Reason(reason)
        self.detail = detail
        self.node = node
        self.source_line = source_line

    def __str__(self) -> str:
        where = []
        if self.node is not None:
            where.append(f"node {self.node!r}")
        if self.source_line is not None:
            where.append(f"from {self.source_line.strip()}")
        place = f" (at {', '.join(where)})" if where else ""
        return f"graph not supported [{self.reason.value}]: {self.detail.rstrip('.')}{place}."

    def as_dict(self) -> dict[str, str | None]:
        """The refusal as plain, JSON-serialisable data."""
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
        detail: what went wrong.
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
    """A rewritten graph could not be compiled or bound to its inputs."""


class NoCompilerError(LoweringError):
    """Torch's compiler lacks something on this machine (a C++ compiler, Triton); names the remedy."""


class ExportError(VlcacheError):
    """A model could not be exported, or what was exported cannot be read or run; says which file or value."""

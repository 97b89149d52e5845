"""Typed reasons: why a graph, a call or a span goes without reuse, and what to do about it."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self, TypeAlias

Scope: TypeAlias = Literal["graph", "call", "span"]
Texts: TypeAlias = tuple[str, Scope, str, str, str]


def _graph(value: str, text: str, advice: str, more: str = "") -> Texts:
    return value, "graph", text, advice, more


def _call(value: str, text: str, advice: str, more: str = "") -> Texts:
    return value, "call", text, advice, more


def _span(value: str, text: str, advice: str, more: str = "") -> Texts:
    return value, "span", text, advice, more


class Reason(StrEnum):
    """Reasons for refusing a graph, or for computing a call or a span without reuse.

    The values are stable and appear in reports and metrics. Calls of a refused graph have the graph's reason.

    ``docs/troubleshooting.md`` has an entry for each, made of these texts.

    Attributes:
        scope: what goes without reuse: a ``graph``, a ``call`` or a ``span``.
        text: the reason in words.
        advice: what to do about it, in words; names in backticks.
        more: what the text leaves out, in sentences for the manual; may be empty.
    """

    scope: Scope
    text: str
    advice: str
    more: str

    def __new__(
        cls, value: str, scope: Scope = "graph", text: str = "", advice: str = "", more: str = ""
    ) -> Self:
        """Create a member with its texts."""
        reason = str.__new__(cls, value)
        reason._value_, reason.scope = value, scope
        reason.text, reason.advice, reason.more = text, advice, more
        return reason

    # Of graphs. The refusal names the node and its source line.
    NO_ATTENTION = _graph(
        "no_attention",
        "the graph has no attention",
        "nothing, unless it is the whole model: then its attention has an unknown form",
        "A part of a model has none.",
    )
    NO_MERGE = _graph(
        "no_merge",
        "no encoder features enter the token embeddings, and no spans are marked",
        "a prompt of text alone: nothing. Otherwise mark the spans",
    )
    NO_STREAM = _graph(
        "no_stream",
        "no residual stream is found between two attention calls",
        "the layer structure is not supported; report the model",
    )
    UNKNOWN_OP = _graph(
        "unknown_op",
        "an operator on the token dimension is not known to be token-wise",
        "rewrite it in plain operators, or add a rule",
    )
    TOKEN_AXIS_LOST = _graph(
        "token_axis_lost",
        "an operator merges, flattens or permutes the token dimension away",
        "reshape so that tokens keep a dimension of their own",
    )
    TOKEN_MIXING = _graph(
        "token_mixing",
        "tokens mix outside attention, in a form that is not known as a recurrence",
        "the page about recurrent layers says which forms are known",
    )
    POSITION_IN_STREAM = _graph(
        "position_in_stream",
        "learned position embeddings are added to the residual stream",
        "keys depend on positions: no reuse for this model",
    )
    BATCHED = _graph(
        "batched", "rows cannot be gathered for each sample of a batch", "call with one prompt at a time"
    )
    MUTATED_INPUTS = _graph(
        "mutated_inputs",
        "the graph writes to its inputs in a way that cannot be repeated",
        "use a cache of transformers, or return new values",
    )
    PAST_KEYS = _graph(
        "past_keys", "a decoding step: it continues a KV cache and has nothing to reuse", "nothing"
    )
    ATTENTION_FORM = _graph(
        "attention_form",
        "an attention cannot be brought to the canonical form",
        'use `attn_implementation="sdpa"` or `"eager"`',
        "The detail names it.",
    )
    MASK_FORM = _graph(
        "mask_form",
        "an attention mask cannot be cut to rows",
        "such calls run unmodified; check the prompt's mask",
        "Or it lets an item's tokens see later text, in a batch, or without a known end of what they see.",
    )
    CAPTURE_FAILED = _graph(
        "capture_failed",
        "the graph cannot be brought to functional ATen",
        "the detail has torch's error; try another torch version",
    )
    GRAD_REQUIRED = _graph(
        "grad_required",
        "gradients are recorded, and reused values have none",
        "`torch.no_grad()` or `torch.inference_mode()`",
    )
    LOWERING_FAILED = _graph(
        "lowering_failed", "the rewritten graph did not compile", 'try `lowering="eager"`; report the error'
    )
    RANDOM = _graph("random", "the graph draws random numbers", "`model.eval()`")
    NO_COMPILER = _graph(
        "no_compiler",
        "no C++ compiler or Triton: eager kernels run, with reuse",
        "install the compiler that the warning names",
    )
    DATA_DEPENDENT = _graph(
        "data_dependent",
        "shapes or control flow depend on tensor values",
        "rewrite the operator with sizes that do not depend on values",
    )
    WEIGHTS_UNREADABLE = _graph(
        "weights_unreadable",
        "the bytes of a weight cannot be read, so keys cannot cover it",
        "load weights to a device; use torchao formats that can be unpacked",
    )
    UNCOMPILED = _graph(
        "uncompiled",
        "Dynamo ran the call uncompiled: no graph reached the backend",
        "`TORCH_LOGS=graph_breaks,recompiles`; raise `torch._dynamo.config.recompile_limit`",
    )
    NO_LOGITS = _graph(
        "no_logits",
        "no result is the logits: reuse without shadow runs",
        "compile the model that returns logits",
    )

    # Of calls, where the graph allows reuse.
    DRY_RUN = _call(
        "dry_run",
        "a dry run: graphs are explained, and nothing is compiled or stored",
        "nothing: `explanations` of the engine has the graphs; compile without `dry_run` to reuse",
    )
    NO_SPAN = _call(
        "no_span",
        "no media span",
        "nothing, or lower `min_span_tokens`",
        "There is no media, none is marked, or none has `min_span_tokens`.",
    )
    ONE_TOKEN = _call("one_token", "a sequence of one token", "nothing")
    MISMATCH = _call(
        "mismatch",
        "placeholders and encoder features do not agree in number or width",
        "check the prompt's image tokens and the features",
    )
    CANNOT_WRITE = _call(
        "cannot_write",
        "a mutated input shares memory with another input, or is not contiguous",
        "give each cache tensor memory of its own",
    )
    TOO_FEW_ROWS = _call(
        "too_few_rows",
        "results need fewer than two tokens, in a graph for any number of tokens",
        "ask for two rows or more",
    )
    GUARDED = _call(
        "guarded",
        "shadow runs or the gate turned reuse off for the model",
        "see Guards; `model.vlcache.resume()` lifts it",
    )
    NO_PLAN = _call(
        "no_plan",
        "the policy's rows make no plan",
        "the log has the error; check the policy with `check_policy`, and its profile",
    )
    PROGRAM_FAILED = _call(
        "program_failed",
        "the rewritten graph did not compile",
        'the log has the error; try `lowering="eager"`',
        "Or it failed when it ran.",
    )

    # Of spans, and of calls without any reused span.
    NEW_ITEM = _span(
        "new_item",
        "its content is new",
        "nothing: the next call with it is warm",
        "That is, to this engine and salt.",
    )
    NOT_RECORDED = _span(
        "not_recorded",
        "seen before, but not recorded or no longer stored",
        "nothing: an item that misses twice is recorded",
        "`clear()` drops donors, too.",
    )
    OTHER_WEIGHTS = _span(
        "other_weights",
        "seen before, but only with other weights",
        "nothing: each setting of weights has its own donors",
        "Another model has other weights, too.",
    )
    OTHER_ENCODING = _span(
        "other_encoding",
        "its pixels were seen before, but with another grid, other settings or another encoder",
        "give all requests the same processor settings",
    )
    OTHER_POSITIONS = _span(
        "other_positions",
        "seen before, but only at other positions or under another mask",
        "nothing",
        "Positions are compared relative to each other.",
    )
    OTHER_TEXT = _span(
        "other_text",
        "seen before, but its tokens attend to the question, which was another",
        "nothing: it is reused, exactly, where the whole prompt is the same",
        "Models such as PaliGemma let an image see the question: the rows would differ.",
    )
    NO_PREFIX = _span(
        "no_prefix",
        "its tokens attend to the question, so it is reused in an exact prefix only, and there is none",
        "nothing: this call records what is missing",
        "Its rows are stored, but not all tokens before it, or the policy reuses no exact prefixes (`full`).",
    )
    OTHER_COMPUTATION = _span(
        "other_computation",
        "seen before, but only in another dtype, numeric mode or kind of attention",
        "use one setting for all requests",
        "Autocast is such a mode.",
    )
    EVICTED = _span("evicted", "its donor was evicted to make room", "raise `capacity_bytes`, or add a tier")
    DAMAGED_ENTRY = _span(
        "damaged_entry",
        "its donor was damaged and set aside",
        "nothing: the call was computed in full, and the damaged entry is set aside; if it recurs, run "
        "`vlcache store verify`, and look at the disk and at who can write to the folder",
        "Its bytes, or those of another donor of the call, are not those that were stored.",
    )
    TOO_LARGE = _span(
        "too_large", "its donor is too large for the store", "raise `capacity_bytes` above one donor's size"
    )
    STORE_CLOSED = _span("store_closed", "the store is closed", "compile with a new store")
    STORE_FAILED = _span("store_failed", "the store failed", "the log has the error")
    INCOMPATIBLE_ENTRY = _span(
        "incompatible_entry",
        "its donor does not fit the graph",
        "nothing: this call records a new one",
        "`miss_detail` names the slot, what was expected and what is there.",
    )
    RECOMPUTED_TO_RECORD = _span(
        "recomputed_to_record",
        "it has a donor, but is recomputed to record another context",
        "nothing: the next call reuses both",
        "The call is computed in full, so that another item can be recorded.",
    )
    RECOMPUTED_TO_REFINE = _span(
        "recomputed_to_refine",
        "it has a donor, but its first returns are computed, as the option exact_returns says",
        "nothing: later calls reuse it; lower the option if these calls cost too much",
    )

"""The standard pipelines, first pass to last."""

from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts, analyze, analyze_decode_step
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured
from vlcache_fx.ir.copies import copy_captured
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.passes.annotate import DeclareInputs, TagSegments
from vlcache_fx.passes.base import Program
from vlcache_fx.passes.cleanup import (
    AnchorSizes,
    CanonicaliseFlex,
    DenseDeepstack,
    DropEmptyCats,
    DropMergeChecks,
    DropNoops,
    FoldRepeatedHeads,
    FuseAttention,
    InvertPermutations,
)
from vlcache_fx.passes.pipeline import Pipeline
from vlcache_fx.passes.rewrite import (
    GatherCrossLayerValues,
    HoistLookups,
    InsertLookups,
    KvOnlyRows,
    RecordDonors,
    RestrictMasks,
    RestrictMerge,
    RestrictRows,
    SpliceRows,
    TrimTail,
    WriteInPlace,
)
from vlcache_fx.passes.rewrite.write_in_place import first_copy
from vlcache_fx.spec.slots import Rows

CLEANUP = Pipeline(
    (
        AnchorSizes(),
        DropNoops(),
        DropEmptyCats(),
        DenseDeepstack(),
        DropMergeChecks(),
        CanonicaliseFlex(),
        FuseAttention(),
        FoldRepeatedHeads(),
        InvertPermutations(),
    ),
    name="cleanup",
)
"""Before analysis."""

COLD = Pipeline(
    (
        RecordDonors(),
        RestrictRows(),
        KvOnlyRows(),
        GatherCrossLayerValues(),
        TrimTail(),
        WriteInPlace(),
        TagSegments(),
        DeclareInputs(),
    ),
    name="cold",
)
"""Computes everything and records donors; dead rows of the last layer are cut."""

WARM = Pipeline(
    (
        InsertLookups(),
        SpliceRows(),
        RecordDonors(),
        HoistLookups(),
        RestrictRows(),
        RestrictMerge(),
        KvOnlyRows(),
        GatherCrossLayerValues(),
        TrimTail(),
        RestrictMasks(),
        WriteInPlace(),
        TagSegments(),
        DeclareInputs(),
    ),
    name="warm",
)
"""Looks donors up and computes only the active rows, which it records: they are exact where all reuse was."""

DECODE_STEP = Pipeline((WriteInPlace(), TagSegments(), DeclareInputs()), name="decode")
"""A decoding step: unchanged, cut into its layers."""


def cold_program(captured: Captured, pipeline: Pipeline = COLD, facts: DecoderFacts | None = None) -> Program:
    """The cold program of a captured, cleaned graph; ``captured`` stays as it is.

    Args:
        captured: the graph.
        pipeline: its passes.
        facts: of the graph, where it was analysed before.

    Raises:
        UnsupportedGraphError: the graph cannot be analysed.
    """
    program = _program(captured, facts)
    last = (
        None
        if program.decoder.tail_rows.selection is None
        else program.add_input(Rows(program.decoder.num_layers))
    )
    program.row_inputs = (*[None] * program.decoder.num_layers, last)
    pipeline.run(program)
    return program


def warm_program(captured: Captured, pipeline: Pipeline = WARM, facts: DecoderFacts | None = None) -> Program:
    """The warm program of a captured, cleaned graph; see ``cold_program``."""
    program = _program(captured, facts)
    program.row_inputs = tuple(
        program.add_input(Rows(level)) for level in range(program.decoder.num_layers + 1)
    )
    pipeline.run(program)
    return program


def _program(captured: Captured, facts: DecoderFacts | None) -> Program:
    """A copy of the graph, on which no pass has run."""
    nodes: dict[Node, Node] = {}
    facts = facts or analyze(captured)
    own = copy_captured(captured, nodes)
    return Program(own.graph_module, facts.on(nodes), own.writes)


def decode_step_program(captured: Captured, pipeline: Pipeline = DECODE_STEP) -> Program:
    """A captured, cleaned decoding step as a program; ``captured`` stays as it is.

    Raises:
        UnsupportedGraphError: its layers are not found, or it would copy a whole cache to write a row to it.
    """
    own = copy_captured(captured)
    program = Program(own.graph_module, analyze_decode_step(own), own.writes)
    pipeline.run(program)
    copy = first_copy(program)
    if copy is not None:
        raise refuse(Reason.MUTATED_INPUTS, copy, "an input is copied to write rows to it")
    return program

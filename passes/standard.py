"""The standard pipelines, and the programs that they build."""

import torch
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts, analyze, analyze_decode_step
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured
from vlcache_fx.ir.copies import copy_captured, copy_module
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.passes.annotate import DeclareInputs, TagSegments
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.cleanup import (
    AddedMerges,
    AnchorSizes,
    CanonicaliseConvolutions,
    CanonicaliseFlex,
    CanonicalNames,
    DenseDeepstack,
    DropEmptyCats,
    DropMergeChecks,
    DropNoops,
    FoldRepeatedHeads,
    FuseAttention,
    InvertPermutations,
    MergeSums,
    WrittenMerges,
)
from vlcache_fx.passes.pipeline import Pipeline
from vlcache_fx.passes.rewrite import (
    CarryStates,
    FitDonors,
    GatherCrossLayerValues,
    HoistLookups,
    InsertLookups,
    KvOnlyRows,
    RecordDonors,
    RecordStates,
    RestrictMasks,
    RestrictMerge,
    RestrictRows,
    SpliceRows,
    TrimTail,
    UnpackDonors,
    WriteInPlace,
)
from vlcache_fx.passes.rewrite.write_in_place import find_copied_input
from vlcache_fx.spec.slots import Rows

CLEANUP = Pipeline(
    (
        AnchorSizes(),
        CanonicalNames(),
        DropNoops(),
        DropEmptyCats(),
        DenseDeepstack(),
        MergeSums(),
        WrittenMerges(),
        AddedMerges(),
        DropMergeChecks(),
        CanonicaliseConvolutions(),
        CanonicaliseFlex(),
        FuseAttention(),
        FoldRepeatedHeads(),
        InvertPermutations(),
    ),
    name="cleanup",
)
"""For every graph, before analysis."""

COLD = Pipeline(
    (
        RecordDonors(),
        RecordStates(),
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
"""Computes all rows and records donors; dead rows of the last layer are cut."""

WARM = Pipeline(
    (
        InsertLookups(),
        SpliceRows(),
        CarryStates(),
        RecordDonors(),
        RecordStates(),
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
"""Reads donors, computes the active rows and records them: they are exact if all reused rows are."""

DECODE_STEP = Pipeline((WriteInPlace(), TagSegments(), DeclareInputs()), name="decode")
"""For a decoding step: computes the same, cut into layers."""


def cold_program(captured: Captured, pipeline: Pipeline = COLD, facts: DecoderFacts | None = None) -> Program:
    """Build the cold program of a captured graph.

    Args:
        captured: the graph after clean-up; it is not changed.
        pipeline: the passes.
        facts: facts of the graph, or None to analyse it.

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
    """Build the warm program of a captured graph; see ``cold_program``."""
    program = _program(captured, facts)
    program.row_inputs = tuple(
        program.add_input(Rows(level)) for level in range(program.decoder.num_layers + 1)
    )
    pipeline.run(program)
    return program


def packed_program(warm: Program, dtype: torch.dtype) -> Program:
    """Build the variant of a warm program that takes one donor, packed, and unpacks it itself.

    Args:
        warm: a complete warm program; it is not changed.
        dtype: dtype of the donor's packed rows.
    """
    return _variant(warm, UnpackDonors(dtype), "packed")


def fitted_program(warm: Program) -> Program:
    """Build the variant of a warm program that fits donors of several contexts; ``warm`` is not changed."""
    return _variant(warm, FitDonors(), "fitted")


def _variant(warm: Program, step: Pass, name: str) -> Program:
    nodes: dict[Node, Node] = {}
    program = Program(
        copy_module(warm.graph_module, nodes),
        writes=warm.writes,
        slots={slot: nodes[node] for slot, node in warm.slots.items()},
        recorded=list(warm.recorded),
        in_place=list(warm.in_place),
        properties=set(warm.properties),
    )
    Pipeline((step,), name=name).run(program)
    return program


def _program(captured: Captured, facts: DecoderFacts | None) -> Program:
    """Return a program of a copy of the graph."""
    nodes: dict[Node, Node] = {}
    facts = facts or analyze(captured)
    own = copy_captured(captured, nodes)
    return Program(own.graph_module, facts.on(nodes), own.writes)


def decode_step_program(captured: Captured, pipeline: Pipeline = DECODE_STEP) -> Program:
    """Build the program of a captured decoding step after clean-up; ``captured`` is not changed.

    Raises:
        UnsupportedGraphError: its layers are not found, or the program would copy a whole cache to write a
            row to it.
    """
    own = copy_captured(captured)
    program = Program(own.graph_module, analyze_decode_step(own), own.writes)
    pipeline.run(program)
    copy = find_copied_input(program)
    if copy is not None:
        raise refuse(Reason.MUTATED_INPUTS, copy, "an input is copied to write rows to it")
    return program

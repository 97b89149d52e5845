"""Carry the states of recurrent layers over rows that are not computed."""

from typing import ClassVar

import torch

from vlcache_fx.analysis.decoder.facts import Tail
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import SAMPLES, index_rows
from vlcache_fx.spec.slots import Donor, Factor, Joined, JumpAt, JumpMap, NumRows, Own, Term

JUMPS, NUM_ROWS = slice(6, 10), 12
"""Arguments of ``vlcache.recur``: before which rows states jump, and by which maps; rows of each sample."""


class CarryStates(Pass):
    """Lets recurrences jump over reused rows, and gives convolutions the inputs before each computed row.

    A recurrence applies the stored map of the rows that it skips. A convolution reads its stored last inputs
    of them between the computed rows::

        x:  t0 t1 | a0   ....   | t5 t6        joined:  t0 t1 a0 | a2 a3 a4 | t5 t6

    Samples of a batch have different numbers of rows. The last row of a shorter one is computed again, and
    changes no state; its convolutions have zeros in front.
    """

    name: ClassVar[str] = "carry_states"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    excludes: ClassVar[frozenset[str]] = frozenset({"segments", "rows_restricted"})

    def run(self, program: Program) -> bool:
        """Rewrite every convolution and recurrence of the decoder."""
        facts = program.decoder
        for tail in facts.tails:
            _join(program, tail)
        for state in facts.states:
            maps = [Donor(Factor(state.layer, state.slot.index)), Donor(Term(state.layer, state.slot.index))]
            node = state.recurrence.node
            inputs = [program.add_input(slot) for slot in (JumpAt(), JumpMap(), *maps)]
            for donor, is_factor in zip(inputs[2:], (True, False), strict=True):
                donor.meta.update(state_of=state, is_factor=is_factor)
            arguments = [*node.args, *[None] * (JUMPS.stop - len(node.args))]
            arguments[JUMPS] = inputs
            if program.is_batched:
                arguments += [None] * (NUM_ROWS - len(arguments))
                arguments.append(program.add_input(NumRows()))
            node.args = tuple(arguments)
        return bool(facts.tails or facts.states)


def _join(program: Program, tail: Tail) -> None:
    facts, graph = program.decoder, program.graph
    convolution, segment = tail.convolution, f"layer.{tail.layer}"
    rows, node, dim, width = convolution.source, convolution.node, convolution.dim, convolution.width
    donor = program.add_input(Donor(tail.slot))
    donor.meta.update(tail_of=(rows, dim), size_name=f"tails_{width}")
    source = program.add_input(Joined(width))
    states = facts.layers[tail.layer].full_part
    readers = [user for user in rows.users if user is node or user in states]
    samples = (SAMPLES,) if program.is_batched else ()
    with graph.inserting_after(rows):
        joined = graph.call_function(
            torch.ops.vlcache.splice_rows.default, (donor, rows, source, dim, *samples)
        )
    for reader in readers:
        reader.replace_input_with(rows, joined)
    users = list(node.users)
    own = program.add_input(Own(tail.layer, width))
    with graph.inserting_after(node):
        taken = index_rows(program, node, dim, own)
    for user in users:
        user.replace_input_with(node, taken)
    joined.meta["segment"] = segment
    taken.meta.update(segment=segment, gathers=(node, dim))

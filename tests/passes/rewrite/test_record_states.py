"""``record_states``: the program returns states at the ends of records, and what records make of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlcache_fx.errors import PassError
from vlcache_fx.ops import recur_reference
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.rewrite import RecordDonors, RecordStates
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.plan.jumps import Record
from vlcache_fx.testing.tiny_hybrid import GROUPS, HEADS, KEY, VALUE, DeltaRule
from vlcache_fx.testing.tiny_vlm import TinyVlm

from .. import programs
from ..hybrids import LENGTH, PROMPT, RECORDS, START, TOKENS, own_donors, plan_of, recorded, small
from ..programs import PassCase, prepared, run, unchanged

CASE = PassCase(RecordStates(), (RecordDonors(),))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("record_states", CASE.shown(small("da")[0], warm=False))


def first_operands(model: TinyVlm) -> tuple[DeltaRule, Tensor, Tensor]:
    """Return the first layer's recurrent part, its input, and what its convolution reads."""
    layer = model.decoder.layers[0]
    embeds = model.embed(PROMPT["input_ids"])
    embeds[:, START : START + LENGTH] = model.encoder(PROMPT["pixel_values"])
    normed = layer.norm_1(embeds)
    return layer.mixer, normed, layer.mixer.qkv(normed).transpose(1, 2)


def test_records_states_at_the_ends_of_records() -> None:
    """Those of the first layer, computed by hand."""
    captured, graph, want, model = small("da")
    program = CASE.program(captured, warm=False)
    plan = plan_of(program, 0, RECORDS, hit=False)
    # Records cut the scan, and kernels for few rows round otherwise on some CPUs.
    torch.testing.assert_close(run(program, graph.calls[0], plan)[0], want, atol=2e-6, rtol=1e-5)
    got = recorded(program, graph.calls[0], plan)
    with torch.no_grad():
        mixer, normed, inputs = first_operands(model)
        q, k, v = F.silu(mixer.convolution(mixer.qkv(normed))).split(mixer.sizes, -1)
        q, k = (part.reshape(1, TOKENS, GROUPS, KEY) for part in (q, k))
        v = v.reshape(1, TOKENS, HEADS, VALUE)
        decay, beta = mixer.gates(normed).chunk(2, -1)
        operands = (q, k, v, -F.softplus(decay), beta.sigmoid())
        padded = F.pad(inputs, (4, 0))
        for number, record in enumerate(RECORDS):
            before = (operand[:, : record.end] for operand in operands)
            state = recur_reference(*before, l2norm=True)[1]
            torch.testing.assert_close(got["0.matrix.0"][0, number], state[0], atol=2e-6, rtol=1e-5)
            last = got["0.inputs.0"][..., 4 * number : 4 * (number + 1)]
            torch.testing.assert_close(last, padded[..., record.end : record.end + 4], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kinds", ["da", "sap"])
def test_records_maps_of_records(kinds: str) -> None:
    """A record takes the state at its start to that at its end."""
    captured, graph, _, _ = small(kinds)
    program = cold_program(captured)
    got = recorded(program, graph.calls[0], plan_of(program, 0, RECORDS, hit=False))
    assert program.decoder.states
    for state in program.decoder.states:
        matrix, factor, term = (
            got[f"{state.layer}.{name}.{state.slot.index}"][0] for name in ("matrix", "factor", "term")
        )
        after = torch.zeros_like(matrix[0])
        for number in range(len(RECORDS)):
            after = factor[number] @ after + term[number]
            torch.testing.assert_close(matrix[number], after, atol=2e-6, rtol=1e-5)


def test_slots_of_results() -> None:
    program = CASE.program(small("cdp")[0], warm=False)
    assert [str(slot) for slot in program.recorded] == [
        "2.k", "2.v", "0.inputs.0", "1.inputs.0", "2.inputs.0",
        "1.matrix.0", "1.factor.0", "1.term.0", "2.matrix.0", "2.factor.0", "2.term.0",
    ]  # fmt: skip


@pytest.mark.parametrize("kinds", ["da", "ca", "cdsap"])
@pytest.mark.parametrize("rows", [0, 2, LENGTH])
def test_warm_program_records_like_the_cold_one(kinds: str, rows: int) -> None:
    """Behind a jump over the item's own rows, states are those of the unmodified model."""
    captured, graph, _, _ = small(kinds)
    records = [RECORDS[0], Record(START + LENGTH, TOKENS)]
    cold, warm = cold_program(captured), warm_program(captured)
    want = recorded(cold, graph.calls[0], plan_of(cold, 0, records, hit=False))
    donors = own_donors(captured, graph.calls[0])
    got = recorded(warm, graph.calls[0], plan_of(warm, rows, records), donors)
    names = [name for name in want if name.count(".") == 2]
    assert names
    for name in names:
        torch.testing.assert_close(got[name], want[name], atol=5e-6, rtol=1e-5)


def test_without_records() -> None:
    """Inputs have two entries then, as compiled programs need."""
    captured, graph, want, _ = small("da")
    program = cold_program(captured)
    plan = plan_of(program, 0, (), hit=False)
    torch.testing.assert_close(run(program, graph.calls[0], plan)[0], want, atol=2e-6, rtol=0)
    got = recorded(program, graph.calls[0], plan)
    assert got["0.matrix.0"].shape == (1, 2, HEADS, KEY, VALUE)
    assert not got["0.matrix.0"].any()
    assert not got["0.inputs.0"].any()


def test_keeps_decoders_of_attention() -> None:
    program = prepared(programs.small()[0], RecordDonors(), warm=False)
    assert unchanged(RecordStates(), program)


def test_requires_recorded_donors() -> None:
    program = prepared(small("da")[0], warm=False)
    before = str(program.graph)
    with pytest.raises(PassError, match=r"record_states.*requires recorded"):
        Pipeline((RecordStates(),)).run(program)
    assert str(program.graph) == before

"""Packed donors: their error, what cannot be packed, and no exact reuse of them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import LoweringError, OptionError
from vlcache_fx.runtime.donors import tables as donor_tables
from vlcache_fx.runtime.donors.donor_dtype import Packing, check_device, is_packed, rows_of, slots_of
from vlcache_fx.runtime.donors.refine import admit_item, contexts_of, exact_donor, exact_key
from vlcache_fx.runtime.donors.refine import packed as pack_donor
from vlcache_fx.runtime.donors.tables import fits, single_packed, tables
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, Packed, Residual, StoredSlot, Value
from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..helpers import Pair, hits, keys, settings_of, vlcache_store, with_api, with_backend

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "heads first": ((1, 2, 5, 8), 2),
    "tokens first": ((1, 5, 2, 8), 1),
    "joined heads": ((1, 5, 16), 1),
    "tokens last": ((1, 2, 8, 5), 3),
    "no batch": ((5, 8), 0),
    "one token": ((1, 4, 1, 8), 2),
}
"""Sizes of rows, and the dimension of tokens."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spec_of(layout: str, dtype: torch.dtype = torch.float32) -> RowSpec:
    shape, dim = LAYOUTS[layout]
    return RowSpec(dim, name_of(dtype), tuple(None if at == dim else size for at, size in enumerate(shape)))


def specs_of(layout: str, dtype: torch.dtype = torch.float32) -> dict[StoredSlot, RowSpec]:
    return {slot: spec_of(layout, dtype) for slot in (Key(0), Value(0), Residual())}


def rows_like(layout: str, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Return rows with large channels and channels off zero."""
    shape, dim = LAYOUTS[layout]
    made = torch.Generator().manual_seed(seed)
    channels = [1 if at == dim else width for at, width in enumerate(shape)]
    rows = torch.randn(shape, generator=made) * torch.randn(channels, generator=made).exp()
    return ((rows + 3 * torch.randn(channels, generator=made)) * size).to(dtype)


def packed(
    rows: Tensor, layout: str, donor_dtype: str = "int8", dtype: torch.dtype | None = None
) -> tuple[Entry, dict[StoredSlot, RowSpec]]:
    specs = specs_of(layout, dtype or rows.dtype)
    shape, dim = LAYOUTS[layout]
    packing = Packing(donor_dtype, specs)
    return pack_donor(exact_donor({str(slot): rows for slot in specs}, shape[dim], "a"), packing), specs


def largest_error(rows: Tensor, donor: Entry, slot: StoredSlot) -> Tensor:
    """Return the largest error in half scales, without the rounding of the result to its dtype."""
    exact, got = rows.double(), rows_of(donor, str(slot)).double()
    scale = donor.tensors[f"{slot}.scale"].double()
    rounding = torch.finfo(rows.dtype).eps * torch.maximum(exact.abs(), got.abs())
    return ((got - exact).abs() - rounding).div(scale / 2).amax()


# Rows -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    size=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e3]),
)
def test_int8_error_is_half_a_scale(layout: str, dtype: torch.dtype, seed: int, size: float) -> None:
    rows = rows_like(layout, seed, dtype, size)
    donor, specs = packed(rows, layout)
    assert fits(donor, specs, LAYOUTS[layout][0][LAYOUTS[layout][1]])
    for slot in specs:
        assert donor.tensors[str(slot)].dtype == torch.int8
        assert rows_of(donor, str(slot)).dtype == dtype
        assert float(largest_error(rows, donor, slot)) <= 1.0


@settings(deadline=None)
@given(layout=st.sampled_from(list(LAYOUTS)), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_float8_error_is_a_sixteenth(layout: str, dtype: torch.dtype, seed: int) -> None:
    rows = rows_like(layout, seed, dtype)
    donor, specs = packed(rows, layout, "float8")
    for slot in specs:
        assert donor.tensors[str(slot)].dtype == torch.float8_e4m3fn
        scale = donor.tensors[f"{slot}.scale"].double()
        off = (rows_of(donor, str(slot)).double() - rows.double()).abs()
        near_zero = scale * 2.0**-10  # half of the smallest float8
        bound = rows.double().abs() * (1 / 16 + 2 * torch.finfo(dtype).eps) + near_zero
        assert bool((off <= bound).all())
        assert f"{slot}.offset" not in donor.tensors


def test_scales_of_keys_are_per_channel_and_of_values_per_token() -> None:
    donor, _ = packed(rows_like("heads first", 0), "heads first")
    shapes = {name: tuple(tensor.shape) for name, tensor in donor.tensors.items() if "." in name[2:]}
    assert shapes == {
        "0.k.scale": (1, 2, 1, 8),
        "0.k.offset": (1, 2, 1, 8),
        "0.v.scale": (1, 2, 5, 1),
        "residual.scale": (1, 2, 5, 1),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_constant_channels_of_keys_are_exact(dtype: torch.dtype) -> None:
    constant = torch.linspace(-300, 300, 8).to(dtype).expand(1, 2, 5, 8)
    donor, _ = packed(constant, "heads first")
    assert torch.equal(rows_of(donor, "0.k"), constant)
    zeros = torch.zeros(1, 2, 5, 8, dtype=dtype)
    donor, specs = packed(zeros, "heads first")
    assert all(torch.equal(rows_of(donor, str(slot)), zeros) for slot in specs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("donor_dtype", ["int8", "float8"])
def test_rows_that_are_not_finite_keep_their_dtype(bad: float, donor_dtype: str) -> None:
    specs, good = specs_of("heads first"), rows_like("heads first", 0)
    spoilt = good.clone()
    spoilt[0, 1, 2, 3] = bad
    rows = {"0.k": good, "0.v": spoilt, "residual": good}
    donor = pack_donor(exact_donor(rows, 5, "a"), Packing(donor_dtype, specs))
    assert fits(donor, specs, 5)
    assert slots_of(donor) == set(rows)
    assert donor.tensors["0.k"].dtype != torch.float32
    assert torch.equal(rows_of(donor, "0.v").nan_to_num(), spoilt.nan_to_num())
    assert "0.v.scale" not in donor.tensors


def test_largest_numbers_do_not_overflow() -> None:
    rows = torch.full((1, 2, 5, 8), 65504.0, dtype=torch.float16)
    donor, specs = packed(rows, "heads first")
    assert all(torch.equal(rows_of(donor, str(slot)), rows) for slot in specs)


@given(seed=st.integers(0, 100))
def test_strides_of_rows_do_not_matter(seed: int) -> None:
    wide = rows_like("tokens first", seed).repeat(1, 3, 1, 1).transpose(1, 2)  # [1, heads, tokens, width]
    rows = wide.narrow(2, 5, 5)
    assert not rows.is_contiguous()
    strided, _ = packed(rows, "heads first")
    plain, _ = packed(rows.contiguous(), "heads first")
    assert strided.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(strided.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert all(tensor.is_contiguous() for tensor in strided.tensors.values())


@pytest.mark.parametrize(
    ("dtype", "donor_dtype", "ratio"),
    [
        (torch.bfloat16, "int8", 0.52),
        (torch.bfloat16, "float8", 0.52),
        (torch.float32, "int8", 0.27),
    ],
)
def test_bytes_of_packed_rows(dtype: torch.dtype, donor_dtype: str, ratio: float) -> None:
    rows = torch.randn(1, 2, 1024, 64).to(dtype)
    spec = RowSpec(2, name_of(dtype), (1, 2, None, 64))
    specs: dict[StoredSlot, RowSpec] = {Key(0): spec, Value(0): spec}
    donor = pack_donor(exact_donor({"0.k": rows, "0.v": rows}, 1024, "a"), Packing(donor_dtype, specs))
    assert donor.nbytes <= ratio * 2 * rows.nbytes


# Entries ----------------------------------------------------------------------------------------------------


def changed(donor: Entry, **tensors: Tensor | None) -> Entry:
    found = {**donor.tensors, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    return Entry({name: tensor for name, tensor in found.items() if tensor is not None}, donor.info)


def test_rows_without_their_scales_do_not_fit() -> None:
    donor, specs = packed(rows_like("heads first", 0), "heads first")
    scale, offset = donor.tensors["0.k.scale"], donor.tensors["0.k.offset"]
    assert fits(donor, specs, 5)
    wrong: list[dict[str, Any]] = [
        {"0.k__scale": None},
        {"0.k__offset": None},
        {"0.k__scale": None, "0.k__offset": None},
        {"0.v__scale": None},
        {"0.v__offset": donor.tensors["0.v.scale"]},
        {"0.k__scale": scale.double()},
        {"0.k__scale": scale[..., :4]},
        {"0.k__scale": scale.expand(1, 2, 5, 8)},
        {"0.v__scale": scale},
        {"0.k__offset": offset.to(torch.bfloat16)},
        {"0.k": donor.tensors["0.k"].to(torch.int16)},
        {"0.k": donor.tensors["0.k"].float()},  # scales of rows that are not packed
        {"0.k": donor.tensors["0.k"].to(torch.float8_e4m3fn)},
        {"0.k": None},
    ]
    for tensors in wrong:
        assert not fits(changed(donor, **tensors), specs, 5), tensors


def test_tables_unpack_one_slot_at_a_time() -> None:
    donor, specs = packed(rows_like("heads first", 0), "heads first")
    exact = {str(slot): rows_like("heads first", 1) for slot in specs}
    text = Entry(exact, {"length": 5})
    for entries in ([donor], [text, donor], [donor, text, donor]):
        found = tables(entries, specs, CPU)
        for slot, late in found.items():
            assert isinstance(late, PendingTensor)
            assert not isinstance(late.tensor, Tensor)
            want = torch.cat([rows_of(entry, str(slot)) for entry in entries], 2)
            assert torch.equal(late.get(), want)
            assert late.get() is not late.get()  # not kept
    assert all(isinstance(table, Tensor) for table in tables([text], specs, CPU).values())


def test_tables_wait_for_scales() -> None:
    donor, specs = packed(rows_like("heads first", 0), "heads first")
    waited: list[str] = []
    waits = {name: functools.partial(waited.append, name) for name in donor.tensors}
    slow = Entry.pending(donor.tensors, donor.info, waits, "file")
    assert fits(slow, specs, 5)
    found = tables([slow], specs, CPU)
    assert waited == []
    late = found[Key(0)]
    assert isinstance(late, PendingTensor)
    assert torch.equal(late.get(), rows_of(donor, "0.k"))
    assert set(waited) == {"0.k", "0.k.scale", "0.k.offset"}


def test_single_packed_donor_is_not_unpacked() -> None:
    donor, specs = packed(rows_like("heads first", 0), "heads first")
    alone = single_packed([donor], specs, CPU)
    assert alone is not None
    dtype, parts = alone
    assert dtype == torch.int8
    assert {str(slot): tensor for slot, tensor in parts.items()} == {
        f"packed.{slot}.{part}": donor.tensors[str(slot) + ("" if part == "rows" else f".{part}")]
        for slot in specs
        for part in ("rows", "scale", "offset")
        if part != "offset" or slot == Key(0)
    }


def test_pending_packed_donor_is_read_late() -> None:
    donor, specs = packed(rows_like("heads first", 0), "heads first")
    waited: list[str] = []
    waits = {name: functools.partial(waited.append, name) for name in donor.tensors}
    alone = single_packed([Entry.pending(donor.tensors, donor.info, waits, "file")], specs, CPU)
    assert alone is not None
    assert waited == []
    late = alone[1][Packed(Key(0), "scale")]
    assert isinstance(late, PendingTensor)
    assert torch.equal(late.get(), donor.tensors["0.k.scale"])
    assert waited == ["0.k.scale"]


def test_other_tables_are_unpacked() -> None:
    donor, specs = packed(rows_like("heads first", 0), "heads first")
    exact = {str(slot): rows_like("heads first", 1) for slot in specs}
    text = Entry(exact, {"length": 5})
    partly = changed(donor, **{"0.v": exact["0.v"], "0.v.scale": None})
    for entries in ([], [text], [donor, donor], [text, donor], [partly]):
        assert single_packed(entries, specs, CPU) is None
    assert single_packed([donor], specs, torch.device("meta")) is None  # it is on another device


# Refined donors ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    contexts=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    dtype=st.sampled_from(DTYPES),
    donor_dtype=st.sampled_from(["int8", "float8"]),
)
def test_refined_donor_stays_packed(contexts: list[int], dtype: torch.dtype, donor_dtype: str) -> None:
    store, specs = MemoryStore(1 << 20), specs_of("heads first", dtype)
    most = 4
    for context in contexts:
        rows = {str(slot): rows_like("heads first", context, dtype) for slot in specs}
        assert admit_item(store, "item", rows, 5, str(context), most, Packing(donor_dtype, specs))
    donor = store.get("item")
    assert donor is not None
    assert is_packed(donor)
    assert fits(donor, specs, 5)
    assert "before" not in donor.info
    assert exact_key("item") not in store
    counted = list(dict.fromkeys(contexts))[:most]
    assert contexts_of(donor) == tuple(map(str, counted))
    if donor_dtype != "int8":
        return
    found = [rows_like("heads first", context, dtype) for context in counted]
    mean = torch.stack([rows.double() for rows in found]).mean(0)
    largest = float(torch.stack(found).double().abs().amax())
    scale = 1.02 * largest / 127  # no scale is larger, and keys have smaller ones
    rounding = len(counted) * 2 * torch.finfo(dtype).eps * largest
    for slot in specs:
        off = float((rows_of(donor, str(slot)).double() - mean).abs().amax())
        assert off <= (len(counted) + 1) / 4 * scale + rounding


def test_rounding_grows_by_a_third_over_four_contexts() -> None:
    spec = RowSpec(2, "float32", (1, 2, None, 64))
    specs: dict[StoredSlot, RowSpec] = {Key(0): spec, Value(0): spec}
    made = torch.Generator().manual_seed(0)
    item = torch.randn(1, 2, 512, 64, generator=made)
    own = [item + 0.1 * torch.randn(item.shape, generator=made) for _ in range(4)]
    store, off = MemoryStore(1 << 26), {}
    for count, rows in enumerate(own, 1):
        admit_item(store, "item", {"0.k": rows, "0.v": rows}, 512, str(count), 4, Packing("int8", specs))
        donor = store.get("item")
        assert donor is not None
        mean = torch.stack(own[:count]).mean(0)
        off[count] = (rows_of(donor, "0.v") - mean).pow(2).mean().sqrt()
    assert 1.2 < float(off[4] / off[1]) < 1.45


def test_donors_of_other_packings_are_replaced() -> None:
    store, specs = MemoryStore(1 << 20), specs_of("heads first")
    rows = {str(slot): rows_like("heads first", 0) for slot in specs}
    for packing, kind in ((None, False), (Packing("int8", specs), True), (None, False)):
        assert admit_item(store, "item", rows, 5, "a", 4, packing)
        donor = store.get("item")
        assert donor is not None
        assert is_packed(donor) is kind


# Requests ---------------------------------------------------------------------------------------------------

A, B = (24, 0), (30, 1)
LAYERS = 2


@pytest.fixture(scope="module")
def compiled(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), policy="none", donor_dtype="int8")


@pytest.fixture
def vlm(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def prompt(*images: tuple[int, int], before: int = 40, after: int = 6, seed: int = 0) -> dict[str, Tensor]:
    return tiny_vlm_inputs(before, after, images, text_seed=seed)


def test_int8_donors_serve_warm_calls_closely(vlm: Pair) -> None:
    off, report = vlm.run(**prompt(A, B))
    assert (report["mode"], off) == ("cold", 0.0)
    donor = vlm.engine.store.get(keys(report)[0])
    assert donor is not None
    assert donor.info["donor_dtype"] == "int8"
    near, report = vlm.run(**prompt(A, B))
    assert hits(report) == [True, True]
    assert 0.0 < near < 0.05  # packed rows are exact nowhere, not even in their own prompt
    with settings_of(vlm.engine, donor_dtype="model"):
        _, report = vlm.run(**prompt(A, B, before=30, seed=1))
        assert hits(report) == [False, False]  # other keys
        full, report = vlm.run(**prompt(A, B, before=20, seed=2))
        assert hits(report) == [True, True]
    vlm.engine.clear()
    vlm.run(**prompt(A, B, before=30, seed=1))
    small, report = vlm.run(**prompt(A, B, before=20, seed=2))
    assert hits(report) == [True, True]
    assert small < full + 0.05


@settings(max_examples=10, deadline=None)
@given(
    before=st.integers(0, 24),
    seeds=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    image=st.integers(0, 2),
)
def test_full_recompute_equals_model_with_int8_donors(
    compiled: Pair, before: int, seeds: list[int], image: int
) -> None:
    compiled.engine.clear()
    with compiled.engine.using(policy="full"):
        for step, seed in enumerate(seeds):
            off, _ = compiled.run(**prompt((24, image), before=before + step, seed=seed))
            assert off == 0.0


def programs_run(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the names of the programs that run from now on."""
    names: list[str] = []
    run = ProgramRunner.run

    def noted(self: ProgramRunner, *args: Any) -> Any:
        names.append(self.name)
        return run(self, *args)

    monkeypatch.setattr(ProgramRunner, "run", noted)
    return names


def test_program_unpacks_single_donor(vlm: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    names = programs_run(vlm, monkeypatch)
    vlm.run(**prompt(A))
    off, report = vlm.run(**prompt(A, before=30, seed=1))
    assert (hits(report), report["prefix_tokens"]) == ([True], 0)
    assert names == ["cold", "packed"]
    with monkeypatch.context() as patch:  # the same call, unpacked before the program
        patch.setattr(donor_tables, "single_packed", lambda *_: None)
        same, _ = vlm.run(**prompt(A, before=30, seed=1))
    assert names.pop() == "warm"
    assert off == pytest.approx(same, abs=1e-5)


def test_program_takes_table_of_several_donors(vlm: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    names = programs_run(vlm, monkeypatch)
    vlm.run(**prompt(A, B))
    _, report = vlm.run(**prompt(A, B, before=30, seed=1))
    assert hits(report) == [True, True]
    _, report = vlm.run(**prompt(A))  # text before the image is an exact prefix
    assert (hits(report), report["prefix_tokens"] > 0) == ([True], True)
    assert names == ["cold", "warm", "warm"]


def test_table_program_serves_where_the_other_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair = with_backend(tiny_vlm(), policy="none", donor_dtype="int8", lowering="eager")
    names, lower = programs_run(pair, monkeypatch), pair.engine.lower

    def fail(program: Any, *, name: str, **given: Any) -> Any:
        if name == "packed":
            raise LoweringError("no")
        return lower(program, name=name, **given)

    monkeypatch.setattr(pair.engine, "lower", fail)
    for seed, before in ((0, 40), (1, 30), (2, 20)):
        pair.run(**prompt(A, before=before, seed=seed))
    assert names == ["cold", "warm", "warm"]
    assert "no" in caplog.text


def test_eager_program_equals_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = with_backend(tiny_vlm(), policy="none", donor_dtype="int8", lowering="eager")
    names = programs_run(pair, monkeypatch)
    pair.run(**prompt(A))
    off, _ = pair.run(**prompt(A, before=30, seed=1))
    monkeypatch.setattr(donor_tables, "single_packed", lambda *_: None)
    assert pair.run(**prompt(A, before=30, seed=1))[0] == off
    assert names == ["cold", "packed", "warm"]


def test_probes_read_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = with_backend(tiny_vlm(num_layers=3), policy="cacheblend", donor_dtype="int8", lowering="eager")
    names = programs_run(pair, monkeypatch)
    for seed, before in ((0, 40), (1, 30)):
        pair.run(**prompt(A, before=before, seed=seed))
    assert names == ["cold", "warm", "warm"]


def test_other_lengths_compile_nothing(vlm: Pair) -> None:
    for seed, before in ((0, 40), (1, 30)):
        vlm.run(**prompt(A, before=before, seed=seed))
    compiled_before = vlm.engine.stats()["compilations"]
    for seed in range(2, 8):
        image = (24 + seed, 0)
        vlm.run(**prompt(image, before=20 + seed, seed=seed))
        _, report = vlm.run(**prompt(image, before=30 + seed, after=6 + seed, seed=9 + seed))
        assert hits(report) == [True]
    assert vlm.engine.stats()["compilations"] == compiled_before


def test_exact_prefix_ends_at_packed_donor(vlm: Pair) -> None:
    """Nothing behind an approximate donor is stored, in any turn of a growing conversation."""
    store = vlm.engine.store
    vlm.run(**prompt(A, after=6))
    held = {entry.key for entry in store.entries()}
    _, report = vlm.run(**prompt(A, after=40))
    assert report["mode"] == "warm"
    assert report["spans"][0]["hit"]
    assert {entry.key for entry in store.entries()} == held
    # Text after the image is never found, so it is not stored either.
    texts = sum(entry.key.startswith("text-") for entry in store.entries())
    assert texts == 3  # 40 tokens in blocks of up to 16
    with settings_of(vlm.engine, donor_dtype="model"):
        vlm.engine.clear()
        vlm.run(**prompt(A, after=6))
        assert sum(entry.key.startswith("text-") for entry in store.entries()) > texts
        off, report = vlm.run(**prompt(A, after=40))
        assert report["mode"] == "warm"
        assert off == pytest.approx(0.0, abs=1e-5)


@pytest.fixture(scope="module")
def recurrent(_compiler: None) -> Pair:
    return with_backend(tiny_hybrid("dcap", last_only=False), policy="none", budget=0.1, donor_dtype="int8")


def test_states_of_recurrent_layers_are_kept(recurrent: Pair) -> None:
    """Keys, values and residuals are packed; states, maps and inputs of convolutions are not."""
    recurrent.engine.clear()
    off, report = recurrent.run(**prompt(A, B))
    assert (report["mode"], off < 2e-6) == ("cold", True)
    packed_donor = recurrent.engine.store.get(keys(report)[0])
    assert packed_donor is not None
    with settings_of(recurrent.engine, donor_dtype="model"):
        recurrent.run(**prompt(A, B))
        exact = recurrent.engine.store.get(keys(recurrent.report)[0])
    assert exact is not None
    names = slots_of(exact)
    assert slots_of(packed_donor) == names
    states = {name for name in names if name.count(".") == 2}
    assert {name.split(".")[1] for name in states} == {"inputs", "matrix", "factor", "term"}
    for name in names:
        is_state = name in states
        assert (packed_donor.tensors[name].dtype is torch.int8) is not is_state
        if is_state:
            torch.testing.assert_close(packed_donor.tensors[name], exact.tensors[name])
    assert packed_donor.info["cuts"] == exact.info["cuts"] == [0, 2, 24]


def test_int8_donors_of_recurrent_layers_serve_closely(recurrent: Pair) -> None:
    recurrent.engine.clear()
    recurrent.run(**prompt(A, B))
    off, report = recurrent.run(**prompt(A, B, after=9))
    assert (report["mode"], report["prefix_tokens"], hits(report)) == ("warm", 0, [True, True])
    assert 0.0 < off < 0.05  # states are exact in their own context, rows of attention are not
    with recurrent.engine.using(policy="full"):
        off, report = recurrent.run(**prompt(B, A, before=17, seed=3))
    assert (report["mode"], hits(report)) == ("warm", [True, True])
    assert off < 2e-6


def test_states_of_recurrent_layers_are_means_of_contexts(recurrent: Pair) -> None:
    """Each context is computed alone first; then the second one refines the donor of the first."""
    first, second, other = prompt(A, B), prompt(A, (27, 2), seed=2), prompt(A, (27, 2), before=31, seed=1)
    alone = []
    for own in (first, second):
        recurrent.engine.clear()
        recurrent.run(**own)
        alone.append(recurrent.engine.store.get(keys(recurrent.report)[0]))
    recurrent.engine.clear()
    modes = [recurrent.run(**own)[1]["mode"] for own in (first, other, second)]
    assert modes == ["cold", "warm", "cold"]  # the second image has missed again
    donor = recurrent.engine.store.get(keys(recurrent.report)[0])
    assert donor is not None
    assert len(contexts_of(donor)) == 2
    assert is_packed(donor)
    for name in ("0.inputs.0", "0.matrix.0", "0.factor.0", "3.term.0"):
        mean = sum(entry.tensors[name] for entry in alone if entry is not None) / 2
        torch.testing.assert_close(donor.tensors[name], mean, atol=2e-6, rtol=1e-5)
    off, report = recurrent.run(**prompt(A, before=31, seed=7))
    assert (report["mode"], report["spans"][0]["donor_contexts"]) == ("warm", 2)
    assert off < 1.0


def test_spoilt_scales_are_a_miss(vlm: Pair) -> None:
    _, report = vlm.run(**prompt(A))
    key = keys(report)[0]
    donor = vlm.engine.store.get(key)
    assert donor is not None
    vlm.engine.store.put(key, changed(donor, **{"1.v__scale": None}))
    off, report = vlm.run(**prompt(A, seed=1))
    assert (hits(report), off) == ([False], 0.0)
    assert report["spans"][0]["miss_reason"] == "incompatible_entry"
    _, report = vlm.run(**prompt(A, seed=2))
    assert hits(report) == [True]  # stored anew


def test_keys_cover_donor_dtype(vlm: Pair) -> None:
    _, report = vlm.run(**prompt(A))
    packed_key = keys(report)[0]
    with settings_of(vlm.engine, donor_dtype="model"):
        _, report = vlm.run(**prompt(A))
    assert keys(report)[0] != packed_key
    assert packed_key in vlm.engine.store


@pytest.mark.usefixtures("_compiler")
def test_float8_needs_a_device_that_has_it() -> None:
    with pytest.raises(OptionError, match=r"donor_dtype='float8' needs .* 8\.9 or later.*on cpu"):
        check_device("float8", CPU)
    check_device("int8", CPU)
    pair = with_api(tiny_vlm(num_layers=1), donor_dtype="float8", store=vlcache_store())
    with pytest.raises(OptionError, match="float8"):
        pair.run(**prompt(A))  # without gradients


def test_float8_set_later_needs_such_a_device(vlm: Pair) -> None:
    with settings_of(vlm.engine, donor_dtype="float8"), pytest.raises(OptionError, match="float8"):
        vlm.run(**prompt(A))

"""Donors and features that turn out damaged while a request uses them: it is computed as if they were not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vlcache_fx.bench.stress.faulty_store import FaultyStore
from vlcache_fx.bench.stress.settings import FaultRates
from vlcache_fx.errors import DamagedEntryError, Reason, StoreError
from vlcache_fx.runtime.donors import tables as donors
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, Value
from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.store.file import FileStore
from vlcache_fx.store.file.opened_file import OpenedFile
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, hits, with_api, with_backend

A, B = (24, 0), (30, 1)
LAYERS = 2


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path, 1 << 26)
    # Tensors are verified where programs first read them, not in the background.
    store._jobs.stop()
    yield store
    store.close()


def compiled(store: FileStore, **options: Any) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), store=store, policy="full", **options)


def prompt(*images: tuple[int, int], before: int = 5, seed: int = 0) -> dict[str, Any]:
    return tiny_vlm_inputs(before, 6, images, text_seed=seed)


def damage(store: FileStore, kind: str, at: Callable[[int], int]) -> int:
    """Flip a bit of each file of one kind; return how many there were."""
    changed = 0
    for info in list(store.entries()):
        if info.key.startswith(kind):
            path = store._folder.path_of(info.key)
            content = bytearray(path.read_bytes())
            content[at(len(content))] ^= 4
            path.unlink()
            path.write_bytes(content)
            changed += 1
    return changed


def last(size: int) -> int:
    return size - 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_damage_in_mid_program(
    store: FileStore, lowering: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's rows are damaged: found when the layers before have run."""
    verified: list[str] = []
    wait = OpenedFile.wait

    def noted(self: OpenedFile, name: str) -> None:
        wait(self, name)
        verified.append(name)

    monkeypatch.setattr(OpenedFile, "wait", noted)
    pair = compiled(store, lowering=lowering)
    tolerance = 0.0 if lowering == "eager" else 1e-5
    off, report = pair.run(**prompt(A))
    assert off <= tolerance
    assert damage(store, "donor", last) == 1
    verified.clear()
    caplog.clear()
    off, report = pair.run(**prompt(A, seed=1))
    assert off <= tolerance
    assert verified  # the donor was in use
    assert (report["mode"], report["reason_code"]) == ("cold", Reason.DAMAGED_ENTRY)
    assert [(s["hit"], s["donor_tier"], s["miss_reason"]) for s in report["spans"]] == [
        (False, None, Reason.DAMAGED_ENTRY)
    ]
    assert report["token_layer_fraction"] == 1.0
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vlcache_fx"]
    assert "set aside: entry donor" in line
    assert pair.engine.stats()["store_failures"] == 1
    assert pair.engine.stats()["refusals"] == {}
    # The cold run recorded it anew, and the warm program is as good as before.
    off, report = pair.run(**prompt(A, seed=2))
    assert (report["mode"], hits(report), report["spans"][0]["donor_tier"]) == ("warm", [True], "file")
    assert off <= max(tolerance, 1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
# Compiled programs meet damage in test_damage_in_mid_program.
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_damage_of_one_of_two_donors(store: FileStore, lowering: str) -> None:
    pair = compiled(store, lowering=lowering)
    tolerance = 0.0 if lowering == "eager" else 1e-5
    pair.run(**prompt(A, B))
    second = prompt(B, A, seed=1)
    assert pair.run(**second)[1]["mode"] == "warm"
    (first, *_) = [info.key for info in store.entries() if info.key.startswith("donor")]
    path = store._folder.path_of(first)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    off, report = pair.run(**prompt(B, A, seed=2))
    assert off <= tolerance
    assert [span["miss_reason"] for span in report["spans"]] == [Reason.DAMAGED_ENTRY] * 2
    off, report = pair.run(**prompt(B, A, seed=3))
    assert (report["mode"], hits(report)) == ("warm", [True, True])
    assert off < 1e-5


def test_damage_found_by_a_probe(store: FileStore) -> None:
    pair = with_backend(tiny_vlm(num_layers=3, last_only=False), store=store, policy="cacheblend")
    pair.run(**prompt(A))
    assert damage(store, "donor", lambda size: size // 2 + 2000) == 1
    off, report = pair.run(**prompt(A, seed=1))
    assert off == 0.0
    assert report["reason_code"] is Reason.DAMAGED_ENTRY


def test_damaged_header_is_a_plain_miss(store: FileStore) -> None:
    pair = compiled(store)
    pair.run(**prompt(A))
    damage(store, "donor", lambda size: 40)
    off, report = pair.run(**prompt(A, seed=1))
    assert off == 0.0
    assert (report["mode"], report["reason_code"]) == ("cold", Reason.DAMAGED_ENTRY)
    assert pair.engine.stats().get("store_failures", 0) == 0


def test_other_store_errors_name_themselves(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow tier that times out while a program waits for it."""
    pair = compiled(store)
    pair.run(**prompt(A))

    def hangs(self: OpenedFile, name: str) -> None:
        raise StoreError("no answer within 1 s")

    with monkeypatch.context() as patch:
        patch.setattr(OpenedFile, "wait", hangs)
        off, report = pair.run(**prompt(A, seed=1))
    assert off == 0.0
    assert (report["mode"], report["reason_code"]) == ("cold", Reason.STORE_FAILED)
    assert pair.run(**prompt(A, seed=2))[1]["mode"] == "warm"


def test_strict_tolerates_damage(store: FileStore) -> None:
    """Damage found while a file is opened is a miss as well."""
    pair = compiled(store, strict=True)
    pair.run(**prompt(A))
    damage(store, "donor", last)
    off, report = pair.run(**prompt(A, seed=1))
    assert (off, report["mode"]) == (0.0, "cold")
    assert report["reason_code"] is Reason.DAMAGED_ENTRY


def test_damaged_features_are_encoded_again(store: FileStore) -> None:
    """Through the encoder cache of the transformers integration."""
    pair = with_api(tiny_qwen2_5_vl(1), store=store, policy="full")
    inputs = qwen_inputs(5, 6, [(8, 8, 0)])
    off, report = pair.run(**inputs)
    assert (off, report["encoder_hit"]) == (0.0, False)
    assert damage(store, "features", last) > 0
    off, report = pair.run(**inputs)
    assert off == 0.0
    assert report["encoder_hit"] is False
    off, report = pair.run(**inputs)
    assert off < 1e-5
    assert report["encoder_hit"] is True


def pending(mark: float, log: list[str], fails: bool = False) -> Entry:
    """A donor of four rows whose tensors are NaN until they arrive."""
    tensors = {name: torch.full((1, 4, 2), float("nan")) for name in ("0.k", "0.v")}

    def wait(name: str) -> None:
        log.append(f"{name} of {mark:.0f}")
        if fails and name == "0.v":
            raise DamagedEntryError("damaged")
        tensors[name].fill_(mark)

    waits = {name: lambda name=name: wait(name) for name in tensors}
    return Entry.pending(tensors, {"length": 4}, waits, "file")


def test_tables_of_several_donors_are_pending() -> None:
    spec = RowSpec(dim=1, sizes=(1, None, 2), dtype="float32", batch_dim=None)
    specs = {Key(0): spec, Value(0): spec}
    names = {str(slot) for slot in specs}
    log: list[str] = []
    assert names == {"0.k", "0.v"}
    memory = Entry({name: torch.full((1, 4, 2), 3.0) for name in names}, {"length": 4})
    found = donors.tables([pending(1.0, log), memory, pending(2.0, log)], specs, torch.device("cpu"))
    assert log == []
    key = found[Key(0)]
    assert isinstance(key, PendingTensor)
    for _ in range(2):
        assert key.get()[0, :, 0].tolist() == [1.0] * 4 + [3.0] * 4 + [2.0] * 4
    assert set(log) == {"0.k of 1", "0.k of 2"}
    found = donors.tables([memory, pending(2.0, log, fails=True)], specs, torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(DamagedEntryError):
            found[Value(0)].get()  # type: ignore[union-attr]


# Every entry, whichever path reads it -----------------------------------------------------------------------

DAMAGED = FaultRates(0, 0, 0, 0, late_damage=1)


def check_every_path(pair: Pair, inner: MemoryStore, first: dict[str, Any], second: dict[str, Any]) -> None:
    """After ``first``, ``second`` is right with damaged entries, and warm again with sound ones."""
    assert pair.run(**first)[0] <= 1e-5
    faults: list[str] = []
    pair.engine.store = FaultyStore(inner, 0, DAMAGED, faults.append)
    off, report = pair.run(**second)
    assert off <= 1e-5
    assert faults
    assert report["mode"] == "cold"
    assert report["reason_code"] is Reason.DAMAGED_ENTRY
    assert not any(span["hit"] for span in report["spans"])
    pair.engine.store = inner
    assert pair.run(**second)[1]["mode"] == "warm"
    assert pair.engine.refusals == []


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("images", [[(20, 0)], [(20, 0), (24, 1)]], ids=["one donor", "two donors"])
def test_damaged_in_every_read(images: list[tuple[int, int]], strict: bool) -> None:
    inner = MemoryStore(1 << 30)
    pair = with_api(tiny_vlm(last_only=False), policy="none", store=inner, strict=strict)
    check_every_path(pair, inner, tiny_vlm_inputs(3, 5, images), tiny_vlm_inputs(9, 5, images, text_seed=1))


def test_damaged_in_every_read_of_features_and_donors() -> None:
    inner = MemoryStore(1 << 30)
    pair = with_api(tiny_llava(1), policy="none", store=inner)
    check_every_path(pair, inner, llava_inputs(3, 5, [0]), llava_inputs(9, 5, [0], text_seed=1))


def test_damaged_in_every_read_of_a_probe() -> None:
    inner = MemoryStore(1 << 30)
    pair = with_api(tiny_vlm(num_layers=3, last_only=False), policy="cacheblend", budget=0.2, store=inner)
    check_every_path(
        pair, inner, tiny_vlm_inputs(3, 5, [(20, 0)]), tiny_vlm_inputs(9, 5, [(20, 0)], text_seed=1)
    )

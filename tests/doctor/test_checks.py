"""Each check, where things work and where they do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config

from vlcache_fx.doctor import checklist, compiler, machine, self_test
from vlcache_fx.doctor.check import Check, Status, checked
from vlcache_fx.doctor.storage import check_store
from vlcache_fx.errors import OptionError, StoreError
from vlcache_fx.store import FileStore, MemoryStore
from vlcache_fx.testing import mooncake_cluster
from vlcache_fx.testing.assets import MissingAssetsError

from ..runtime.helpers import own_compiler_state


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_a_check_that_raises_is_a_failed_one() -> None:
    def fail() -> Check:
        raise RuntimeError("two\nlines")

    check = checked("it", fail)
    assert (check.name, check.status, check.found) == ("it", Status.FAILED, "RuntimeError: two lines")
    assert "VLCACHE_LOG=debug" in check.advice

    def refuse() -> Check:
        raise OptionError("a message of this package")

    assert checked("it", refuse).found == "a message of this package"


def test_a_module_that_cannot_be_imported_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others run all the same."""
    monkeypatch.setitem(sys.modules, "vlcache_fx.doctor.storage", None)
    names = ("_packages", "_compiler", "_self_test")
    for name in names:
        monkeypatch.setattr(f"vlcache_fx.doctor.all_checks.{name}", lambda name=name: [(name, _fine)])
    found = list(checklist(("memory://",)))
    assert [check.status for check in found] == ["ok", "ok", "failed", "ok"]
    assert found[2].found.startswith("ModuleNotFoundError: ")


def _fine() -> Check:
    return Check("fine", Status.OK, "it is")


# compiler ---------------------------------------------------------------------------------------------------


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.check_backend().status == Status.OK
    monkeypatch.setattr("torch._dynamo.backends.registry.lookup_backend", lambda name: None)
    assert "another package" in compiler.check_backend().found
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: ["inductor"])
    assert "finds no backend 'vlcache'" in compiler.check_backend().found


def test_inductor_compiles_anew_each_time() -> None:
    before = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    for _ in range(2):
        check = compiler.check_inductor()
        assert (check.status, check.advice) == (Status.OK, ""), check
        assert "compiled a function in " in check.found
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == before


def test_inductor_without_a_compiler() -> None:
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        check = compiler.check_inductor()
    assert check.status == Status.FAILED
    assert "g++" in check.advice
    assert 'lowering="eager"' in check.advice


def test_inductor_with_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda values: function(values) + 1)
    assert "wrong results" in compiler.check_inductor().found


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "not for this processor" in compiler.check_kernels().found
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("vlcache_fx.ops.linear.native_kernel", lambda *_: print)
    monkeypatch.setattr("vlcache_fx.ops.attention.native_kernel", lambda *_: None)
    check = compiler.check_kernels()
    assert (check.status, check.found.partition(";")[0]) == (
        Status.WARNING,
        "built: linear of attention, linear",
    )
    monkeypatch.setattr("vlcache_fx.ops.attention.native_kernel", lambda *_: print)
    assert compiler.check_kernels().found == "built: attention, linear"


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: str(tmp_path / "a"))
    check = compiler.check_cache()
    assert (check.status, check.found) == (Status.OK, str(tmp_path / "a"))
    (tmp_path / "b").write_text("")
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: str(tmp_path / "b"))
    check = compiler.check_cache()
    assert check.status == Status.FAILED
    assert "TORCHINDUCTOR_CACHE_DIR" in check.advice


# machine ----------------------------------------------------------------------------------------------------


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.check_threads() == Check("threads", Status.OK, "2 of torch, 2 cores")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert machine.check_threads() == Check(
        "threads", Status.WARNING, "8 of torch, 2 cores", "set OMP_NUM_THREADS=2"
    )


def test_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.check_gpu() == Check("gpu", Status.OK, "none: the CPU is used")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12\n"
    )
    check = machine.check_gpu()
    assert check.status == Status.WARNING
    assert "570.86.15" in check.found
    assert "install torch with CUDA" in check.advice
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "too old for CUDA 12.8" in machine.check_gpu().advice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert machine.check_gpu() == Check("gpu", Status.OK, "GPU 0, GPU 1; driver 570.86.15")


# stores -----------------------------------------------------------------------------------------------------


def test_store_in_memory() -> None:
    check = check_store("memory://")
    assert (check.status, check.advice) == (Status.OK, "")
    assert check.found.endswith("0 entries, 0 of 4,096 MiB")


def test_store_in_a_folder_stays_as_it_is(tmp_path: Path) -> None:
    """Neither its entries nor its bound change."""
    from vlcache_fx.keys.entry_key import KeyScope
    from vlcache_fx.store import Entry

    store, key = FileStore(tmp_path / "s", 1 << 20), KeyScope("", "1" * 64).key("donor", {"content": "a"})
    store.put(key, Entry({"k": torch.zeros(8)}, {}))
    check = check_store(f"file://{tmp_path / 's'}")
    assert check.status == Status.OK, check
    assert "1 entries" in check.found
    assert check.found.endswith(" of 1 MiB")
    assert [entry.key for entry in store.entries()] == [key]
    store.close()


@pytest.mark.parametrize(
    ("url", "found", "advice"),
    [
        ("tape://", "there is no tape://", "docs/store.md"),
        ("memory", "option store='memory' is not valid", "docs/store.md"),
        ("file:///dev/null/folder", "cannot be opened", "check that the folder"),
        ("memory://?capacity=1KiB", "refused as too large", ""),
    ],
)
def test_stores_that_fail(url: str, found: str, advice: str) -> None:
    check = check_store(url)
    assert check.status == Status.FAILED
    assert found in check.found
    assert advice in check.advice


def test_mooncake_without_a_master() -> None:
    pytest.importorskip("mooncake")
    check = check_store("mooncake://127.0.0.1:1")
    assert check.status == Status.FAILED
    assert "nothing answers at mooncake://127.0.0.1:1" in check.found
    assert "its master runs at this address" in check.advice


@pytest.mark.slow
def test_mooncake(tmp_path: Path) -> None:
    reason = mooncake_cluster.missing()
    if reason:
        pytest.skip(reason)
    with mooncake_cluster.MooncakeCluster(tmp_path) as cluster:
        check = check_store(cluster.url("timeout_ms=5000&transfer_ms=10000"))
    assert check.status == Status.OK, check
    assert "written, read and dropped an entry" in check.found


class _Broken(MemoryStore):
    """Loses, changes or keeps entries."""

    fault = ""

    def get(self, key: str) -> Any:
        if self.fault == "read":
            raise StoreError("the disk is gone")
        entry = super().get(key)
        if self.fault == "values" and entry is not None:
            entry.tensors["values"].add_(1)
        return None if self.fault == "loses" else entry

    def clear(self, selection: Any = None) -> int:
        return 0 if self.fault == "keeps" else super().clear(selection)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("read", "the disk is gone"),
        ("loses", "is not found"),
        ("values", "with other values"),
        ("keeps", "is still there"),
    ],
)
def test_stores_that_break_their_word(fault: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _Broken(1 << 20)
    store.fault = fault
    monkeypatch.setattr("vlcache_fx.store.url.open_tier", lambda *_: store)
    monkeypatch.setattr("vlcache_fx.doctor.storage.DROP_S", 0.0)
    check = check_store("memory://")
    assert check.status == Status.FAILED
    assert found in check.found


# self-test --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files of the reference model were missing."""

    def missing() -> Any:
        raise MissingAssetsError("the files of reference_vlm are not installed")

    monkeypatch.setattr(self_test, "_reference", missing)


@pytest.mark.usefixtures("tiny")
def test_reuse_of_the_tiny_model() -> None:
    check = self_test.check_reuse()
    assert check.status == Status.OK, check
    assert check.found.startswith("tiny VLM")
    assert "the largest difference from the unmodified model is " in check.found


@pytest.mark.usefixtures("tiny")
def test_results_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "largest_difference", lambda *_: float("nan"))
    check = self_test.check_reuse()
    assert check.status == Status.FAILED
    assert "nan, more than 0.001" in check.found


@pytest.mark.usefixtures("tiny")
def test_no_reuse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = self_test.vlcache_fx.compile

    def without(model: Any, **options: Any) -> Any:
        return compiled(model, **options, min_span_tokens=1000)

    monkeypatch.setattr(self_test.vlcache_fx, "compile", without)
    check = self_test.check_reuse()
    assert check.status == Status.FAILED
    assert "calls were bypass, bypass" in check.found


@pytest.mark.slow
@pytest.mark.thorough  # cli/test_doctor.py::test_this_installation runs it, too
def test_reuse_of_the_reference_model() -> None:
    pytest.importorskip("transformers")
    check = self_test.check_reuse()
    assert check.status == Status.OK, check
    assert check.found.startswith("reference VLM")

"""Examples of exports: with a session, with numpy, and as engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from .loading import EXAMPLES, load, shorten

pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let examples import each other."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an export that examples share."""
    return tmp_path_factory.mktemp("examples") / "export"


@pytest.mark.slow
@pytest.mark.thorough
def test_export_onnx_reuses_the_picture(folder: Path) -> None:
    exported, first, second = load("export_onnx").main(folder)
    assert exported.endswith("12 lookups")
    assert first.startswith("cold, 100.0 % computed: ")
    assert second.startswith("warm, 1.8 % computed: ")
    assert first.rpartition(" ")[2] == second.rpartition(" ")[2]


@pytest.mark.slow
def test_wire_request_of_two_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, 2)
    check_wire_request(tmp_path / "export")


@pytest.mark.slow
@pytest.mark.thorough
def test_wire_request_equals_model(folder: Path) -> None:
    check_wire_request(folder)


def check_wire_request(folder: Path) -> None:
    lines = load("wire_request").main(folder)
    assert [line.partition(":")[0] for line in lines] == ["cold", "warm"]
    for line in lines:
        answer, alone = line.partition(": ")[2].split(", the model alone: ")
        assert answer == alone


@pytest.mark.slow
@pytest.mark.thorough
def test_build_engines_without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    shorten(monkeypatch, 1)
    lines = load("build_engines").main(tmp_path / "engines", "tensorrt_rtx")
    built = [line.partition(":")[0] for line in lines]
    assert built == ["prefill_cold", "prefill_warm", "spans", "masks", "leaves", "encoder", "decode"]
    assert all((tmp_path / "engines" / f"{name}.engine").stat().st_size > 0 for name in built)

"""Exported graphs are served with reuse: by the session, by numpy alone, and as engines."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script: they import each other
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_an_exported_model_reuses_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, first, second = load("export_onnx", monkeypatch).main(tmp_path / "export")
    assert exported.endswith("12 lookups")
    assert first.startswith("cold, 100.0 % computed: ")
    assert second.startswith("warm, 1.8 % computed: ")
    assert first.rpartition(" ")[2] == second.rpartition(" ")[2]


@pytest.mark.slow
def test_a_server_without_torch_gives_the_models_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = load("wire_request", monkeypatch).main(tmp_path / "export")
    assert [line.partition(":")[0] for line in lines] == ["cold", "warm"]
    for line in lines:
        answer, alone = line.partition(": ")[2].split(", the model alone: ")
        assert answer == alone


@pytest.mark.slow
def test_engines_are_built_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    lines = load("build_engines", monkeypatch).main(tmp_path / "engines", "tensorrt_rtx")
    built = [line.partition(":")[0] for line in lines]
    assert built == ["prefill_cold", "prefill_warm", "spans", "masks", "encoder", "decode"]
    assert all((tmp_path / "engines" / f"{name}.engine").stat().st_size > 0 for name in built)

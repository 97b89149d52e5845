"""Running graphs with ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import torch
from torch import Tensor, nn

from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.onnx import SharedWeights, to_onnx
from vlcache_fx.deploy.onnx_runner import OnnxRunner
from vlcache_fx.deploy.specs import GraphSpec, TensorSpec
from vlcache_fx.errors import ExportError

from .helpers import bare_manifest

CPU = ("CPUExecutionProvider",)


class Lookup(nn.Module):
    """Index rows of a table, and multiply."""

    def forward(self, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return table[index], table.mT @ table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph with two results."""
    path = tmp_path_factory.mktemp("graphs")
    examples = {"table": torch.ones(4, 3), "index": torch.tensor([1, 0])}
    model = to_onnx(Lookup(), examples, ({0: "rows"}, {0: "count"}), ["rows", "product"], 22)
    with SharedWeights(path / "weights.bin") as weights:
        spec = weights.save(model, path / "look.onnx", {})
    bare_manifest(graphs={"look": spec}).save(path)
    return path


@pytest.fixture
def runner(folder: Path) -> OnnxRunner:
    return OnnxRunner(folder, Manifest.load(folder), CPU)


def test_run_results_by_name_at_any_size(runner: OnnxRunner) -> None:
    for rows in (2, 7):
        table = torch.arange(3.0 * rows).reshape(rows, 3)
        index = torch.tensor([1, 1, 0])
        found = runner.run("look", {"table": table, "index": index})
        assert list(found) == ["rows", "product"]
        torch.testing.assert_close(found["rows"], table[index])
        torch.testing.assert_close(found["product"], table.mT @ table)


def test_run_results_are_writable(runner: OnnxRunner) -> None:
    found = runner.run("look", {"table": torch.ones(2, 3), "index": torch.tensor([0])})
    found["rows"] += 1
    assert found["rows"].tolist() == [[2.0, 2.0, 2.0]]


def test_run_noncontiguous_inputs(runner: OnnxRunner) -> None:
    table = torch.arange(12.0).reshape(3, 4).mT
    found = runner.run("look", {"table": table, "index": torch.tensor([3, 2])})
    assert torch.equal(found["rows"], table[[3, 2]])


def test_check_any_size(runner: OnnxRunner) -> None:
    runner.check("look", {"table": torch.ones(100_000, 3), "index": torch.tensor([0])})


def test_run_loads_a_graph_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    loaded = []
    original = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **kw: loaded.append(args) or original(*args, **kw)
    )
    runner = OnnxRunner(folder, Manifest.load(folder), CPU)
    assert not loaded
    for _ in range(2):
        runner.run("look", {"table": torch.ones(2, 3), "index": torch.tensor([0])})
    assert loaded == [(str(folder / "look.onnx"),)]


def test_run_errors_of_onnx_runtime(runner: OnnxRunner) -> None:
    with pytest.raises(ExportError, match="ONNX Runtime cannot run look: "):
        runner.run("look", {"table": torch.ones(2, 4), "index": torch.tensor([0])})
    with pytest.raises(ExportError, match="ONNX Runtime cannot run look: "):
        runner.run("look", {"table": torch.ones(2, 3)})


def test_run_invalid_graph_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "look.onnx").write_bytes(b"no graph")
    runner = OnnxRunner(tmp_path, Manifest.load(folder), CPU)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load look\.onnx: "):
        runner.run("look", {})


def test_onnx_runner_unknown_provider(folder: Path) -> None:
    with pytest.raises(ExportError, match=r"no provider 'NpuExecutionProvider'; available are .*CPUExec"):
        OnnxRunner(folder, Manifest.load(folder), ("NpuExecutionProvider", *CPU))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8e4m3fn"])
def test_onnx_runner_unsupported_dtype(tmp_path: Path, dtype: str) -> None:
    graph = GraphSpec("look.onnx", {"table": TensorSpec(dtype, (2,))}, {})
    with pytest.raises(ExportError, match=f"does not accept {dtype} inputs .*: export the model in float32"):
        OnnxRunner(tmp_path, bare_manifest(graphs={"look": graph}), CPU)


def test_onnx_runner_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"onnxruntime is not installed: .*vlcache_fx\[onnx\]"):
        OnnxRunner(tmp_path, bare_manifest(), CPU)

"""Conversion to ONNX, and shared weights."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

import onnx
import torch
from torch import Tensor, nn

from vlcache_fx.deploy.manifest import MANIFEST
from vlcache_fx.deploy.onnx import ALIGNMENT_BYTES, NOISY, SHARED_FROM_BYTES, SharedWeights, to_onnx
from vlcache_fx.deploy.specs import TensorSpec
from vlcache_fx.errors import ExportError

from .helpers import Exported

PREFILL = ("prefill_cold", "prefill_warm")
EXPORTS = ["llava", "qwen", "tiny", "tiny_profiled"]


def graph_of(exported: Exported, name: str) -> onnx.ModelProto:
    model: onnx.ModelProto = onnx.load(exported.folder / f"{name}.onnx", load_external_data=False)
    return model


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def references(model: onnx.ModelProto) -> dict[tuple[int, int], str]:
    """(Offset, length) in the shared file -> initialiser."""
    found = {}
    for weight in model.graph.initializer:
        entries = {entry.key: entry.value for entry in weight.external_data}
        if entries:
            assert entries["location"] == "weights.bin"
            found[int(entries["offset"]), int(entries["length"])] = weight.name
    return found


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_prefill_graphs_have_portable_operators(any_export: Exported) -> None:
    for name in PREFILL:
        model = graph_of(any_export, name)
        assert {entry.domain for entry in model.opset_import} == {""}
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        unwanted = {"NonZero", "ScatterND", "ScatterElements", "If", "Loop", "SequenceConstruct"}
        assert not unwanted & set(operators(model))


@pytest.mark.parametrize("any_export", EXPORTS[:-1], indirect=True)
def test_attention_decomposed_up_to_opset_22(any_export: Exported) -> None:
    for name in PREFILL:
        model = graph_of(any_export, name)
        assert [entry.version for entry in model.opset_import] == [22]
        assert operators(model)["Softmax"] == any_export.manifest.decoder.num_layers
        assert "Attention" not in operators(model)


def test_attention_node_from_opset_23(tiny_profiled: Exported) -> None:
    for name in PREFILL:
        model = graph_of(tiny_profiled, name)
        assert [entry.version for entry in model.opset_import] == [23]
        assert operators(model)["Attention"] == tiny_profiled.manifest.decoder.num_layers
        assert "Softmax" not in operators(model)


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_prefill_graphs_share_weights(any_export: Exported) -> None:
    cold, warm = (references(graph_of(any_export, name)) for name in PREFILL)
    assert cold
    assert cold.keys() == warm.keys()
    everything = [references(graph_of(any_export, name)) for name in any_export.manifest.graphs]
    shared = (any_export.folder / "weights.bin").stat().st_size
    assert shared < sum(length for one in everything for _, length in one)
    places = sorted({place for one in everything for place in one})
    for (offset, length), (after, _) in zip(places, [*places[1:], (shared, 0)], strict=True):
        assert offset % ALIGNMENT_BYTES == 0
        assert length >= SHARED_FROM_BYTES
        assert offset + length <= after < offset + length + ALIGNMENT_BYTES


@pytest.mark.parametrize("any_export", ["llava", "qwen"], indirect=True)
def test_decoding_step_shares_weights_of_the_prefill(any_export: Exported) -> None:
    cold, decode = (references(graph_of(any_export, name)) for name in ("prefill_cold", "decode"))
    assert cold.keys() == decode.keys()


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_graph_inputs_and_outputs_match_the_manifest(any_export: Exported) -> None:
    for name, spec in any_export.manifest.graphs.items():
        model = graph_of(any_export, name)
        for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            assert [value.name for value in values] == list(specs)
            for value in values:
                form = value.type.tensor_type
                assert onnx.TensorProto.DataType.Name(form.elem_type).lower() == specs[value.name].dtype
                shape = tuple(dim.dim_param or dim.dim_value for dim in form.shape.dim)
                assert shape == specs[value.name].shape


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_graphs_without_paths_of_the_machine(any_export: Exported) -> None:
    import vlcache_fx

    here = [str(Path(module.__file__).parents[1]).encode() for module in (torch, vlcache_fx)]
    for path in (*any_export.folder.glob("*.onnx"), any_export.folder / MANIFEST):
        assert not [place for place in here if place in path.read_bytes()], path.name


class Scale(nn.Module):
    """A large weight, which is shared, and a small one, which is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.large = nn.Parameter(torch.randn(SHARED_FROM_BYTES // 4, generator=generator))
        self.small = nn.Parameter(torch.randn(SHARED_FROM_BYTES // 4 - 1, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.large, y * self.small


def converted(module: nn.Module, opset: int = 22) -> Any:
    examples = {"x": torch.ones(3, SHARED_FROM_BYTES // 4), "y": torch.ones(3, SHARED_FROM_BYTES // 4 - 1)}
    return to_onnx(module, examples, ({0: "rows"}, {0: "rows"}), ["first", "second"], opset)


def test_to_onnx_names_sizes_and_weights(tmp_path: Path) -> None:
    with SharedWeights(tmp_path / "weights.bin") as weights:
        spec = weights.save(converted(Scale()), tmp_path / "scale.onnx", {"large": "layer.scale"})
    assert spec.file == "scale.onnx"
    assert spec.inputs["x"] == TensorSpec("float", ("rows", SHARED_FROM_BYTES // 4))
    assert (
        spec.inputs["y"]
        == spec.outputs["second"]
        == TensorSpec("float", ("rows", SHARED_FROM_BYTES // 4 - 1))
    )
    model = onnx.load(tmp_path / "scale.onnx")
    loaded = {weight.name: onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer}
    assert loaded.keys() == {"layer.scale", "small"}
    assert torch.equal(torch.from_numpy(loaded["layer.scale"].copy()), Scale().large.detach())
    assert (tmp_path / "weights.bin").stat().st_size == SHARED_FROM_BYTES


def test_shared_weights_deduplicates(tmp_path: Path) -> None:
    found = []
    with SharedWeights(tmp_path / "weights.bin") as weights:
        for name, seed in (("one", 0), ("two", 1), ("three", 0)):
            weights.save(converted(Scale(seed)), tmp_path / f"{name}.onnx", {})
            model = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False)
            found.append(next(iter(references(model))))
    assert found[0] == found[2] != found[1]
    assert (tmp_path / "weights.bin").stat().st_size == 2 * SHARED_FROM_BYTES


class Untraceable(nn.Module):
    """Control flow depends on a value."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x, y) if float(x.sum()) > 0 else (y, x)


class Unconvertible(nn.Module):
    """An operator that ONNX lacks."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.special.airy_ai(x), y


@pytest.mark.parametrize("module", [Untraceable(), Unconvertible()])
def test_to_onnx_error_in_one_line(module: nn.Module) -> None:
    with pytest.raises(ExportError, match=r"^torch cannot convert the graph to ONNX: \w+: .+") as refused:
        converted(module)
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is not None


def test_save_invalid_graph_leaves_no_file(tmp_path: Path) -> None:
    model = converted(Scale())
    model.graph[0].op_type = "NoSuchOperator"
    with (
        SharedWeights(tmp_path / "weights.bin") as weights,
        pytest.raises(ExportError, match=r"^scale\.onnx is not a valid ONNX model: .*NoSuchOperator"),
    ):
        weights.save(model, tmp_path / "scale.onnx", {})
    assert not (tmp_path / "scale.onnx").exists()


def test_to_onnx_restores_log_levels() -> None:
    loggers = [logging.getLogger(name) for name in NOISY]
    before = [logger.level for logger in loggers]
    converted(Scale())
    with pytest.raises(ExportError):
        converted(Untraceable())
    assert [logger.level for logger in loggers] == before

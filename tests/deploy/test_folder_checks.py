"""Checks of external weights and of references in a manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("onnx")

import onnx

from vlcache_fx.deploy.folder_checks import check_external_data, check_references
from vlcache_fx.deploy.specs import FileSpec
from vlcache_fx.errors import ExportError

from .helpers import bare_manifest, encoder

FILES = {"weights.bin": FileSpec(64, "0" * 64)}


def graph(folder: Path, nested: bool = False, **said: str) -> Path:
    """Write a graph with one external weight."""
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in said.items():
        weight.external_data.add(key=key, value=value)
    node = onnx.helper.make_node("Constant", [], ["c"], value=weight)
    inner = onnx.helper.make_graph([node], "inner", [], [])
    branch = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    whole = onnx.helper.make_graph([branch] if nested else [], "whole", [], [], [] if nested else [weight])
    path = folder / "graph.onnx"
    path.write_bytes(onnx.helper.make_model(whole).SerializeToString())
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_check_external_data_inside_the_folder(tmp_path: Path, nested: bool) -> None:
    check_external_data(graph(tmp_path, nested, location="weights.bin", offset="48", length="16"), FILES)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"location": "../weights.bin"}, "the name of a file in its folder"),
        ({"location": "/etc/passwd"}, "the name of a file in its folder"),
        ({}, "the name of a file in its folder"),
        ({"location": "other.bin"}, "a file that the manifest lists"),
        ({"location": "weights.bin", "offset": "-16"}, "a number of bytes"),
        ({"location": "weights.bin", "length": "1e9"}, "a number of bytes"),
        ({"location": "weights.bin", "offset": "49", "length": "16"}, "at most the file's 64 bytes"),
        ({"location": "weights.bin", "length": str(1 << 70)}, "at most the file's 64 bytes"),
    ],
)
def test_check_external_data_outside_the_folder(
    tmp_path: Path, nested: bool, said: dict[str, str], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        check_external_data(graph(tmp_path, nested, **said), FILES)


def test_check_external_data_ignores_invalid_graphs(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"\xff\xff no graph")
    check_external_data(tmp_path / "graph.onnx", FILES)


def test_check_references_missing_graph() -> None:
    files = {"prefill_cold.onnx": FileSpec(1, "0" * 64)}
    whole = bare_manifest(files=files)
    check_references(whole)
    elsewhere = dataclasses.replace(whole.cold, graph="nowhere")
    masked = dataclasses.replace(whole.prologue, spans=("a",))
    hidden = dataclasses.replace(whole.prologue, masks=("a",))
    for field, changes in {
        "cold.graph": {"cold": elsewhere},
        "warm.graph": {"warm": elsewhere},
        "decode": {"decode": "nowhere"},
        "encoders.0.graph": {"encoders": (encoder("nowhere", "image"),)},
        "prologue.spans": {"prologue": masked},
        "prologue.masks": {"prologue": hidden},
        "graphs.prefill_cold.file": {"files": {}},
    }.items():
        with pytest.raises(ExportError, match=f"the manifest's {field} is "):
            check_references(dataclasses.replace(whole, **changes))

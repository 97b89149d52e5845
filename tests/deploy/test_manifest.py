"""Manifests: round trip, and errors for folders that are damaged or malicious."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

import torch

from vlcache_fx.deploy.manifest import FORMAT, MANIFEST, Manifest, file_spec, missing
from vlcache_fx.deploy.specs import TORCH_DTYPES, EngineSpec, FileSpec, TensorSpec, torch_dtype
from vlcache_fx.errors import ExportError

from .helpers import Exported, bare_manifest

ENGINE = EngineSpec(
    file="prefill_cold.engine",
    builder="tensorrt_rtx 1.7.1",
    compute_capabilities=("sm86",),
    profile={"input_ids": ((1, 2), (1, 1024), (1, 8192))},
    dtypes={"input_ids": "int64"},
    build_seconds=0.5,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved manifest and two files."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "prefill_cold.onnx").write_bytes(b"a graph")
    (folder / "weights.bin").write_bytes(bytes(1000))
    bare_manifest(engines={"prefill_cold": ENGINE}).save(folder)
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest, but not its digest."""
    path = folder / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as refused:
        Manifest.load(folder, **options)
    return str(refused.value)


def test_load_after_save(folder: Path) -> None:
    saved = bare_manifest(engines={"prefill_cold": ENGINE}, profile_fingerprint="f", wiring=("one", "two"))
    written = saved.save(folder)
    assert Manifest.load(folder) == Manifest.load(str(folder)) == written
    assert dataclasses.replace(written, files={}, digest="") == saved
    assert set(written.files) == {"prefill_cold.onnx", "weights.bin"}
    assert written.files["weights.bin"] == file_spec(folder / "weights.bin")
    assert len(written.digest) == 64


def test_save_twice(folder: Path) -> None:
    before = (folder / MANIFEST).read_bytes()
    Manifest.load(folder).save(folder)
    assert (folder / MANIFEST).read_bytes() == before


def test_load_empty_file(folder: Path) -> None:
    (folder / "empty.bin").touch()
    bare_manifest().save(folder)
    assert Manifest.load(folder).files["empty.bin"].size_bytes == 0


def test_load_missing_folder(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere} is not an exported folder" in refusal(nowhere)


def test_load_missing_manifest(tmp_path: Path) -> None:
    assert f"{tmp_path} is not an exported folder: cannot read manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_load_invalid_json(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert str(folder / MANIFEST) in refusal(folder)


def test_load_truncated_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(folder)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["decoder"].update(surprise=1), "decoder.surprise"),
        (lambda m: m["graphs"]["prefill_cold"].update(surprise=1), "graphs.prefill_cold.surprise"),
        (lambda m: m.pop("opset"), "opset"),
        (lambda m: m["decoder"].pop("layout"), "decoder.layout"),
        (lambda m: m.update(opset="many"), "opset"),
        (lambda m: m["decoder"].update(layer_groups=3), "decoder.layer_groups"),
        (lambda m: m["files"].update({"weights.bin": "big"}), "files.weights.bin"),
    ],
)
def test_load_bad_field(folder: Path, change: Callable[[dict[str, Any]], object], place: str) -> None:
    changed(folder, change)
    message = refusal(folder)
    assert str(folder / MANIFEST) in message
    assert place in message


def test_load_another_format(folder: Path) -> None:
    changed(folder, lambda m: m.update(format=FORMAT + 1))
    message = refusal(folder)
    assert str(folder / MANIFEST) in message
    assert f"format {FORMAT + 1}; this version reads {FORMAT}" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(policy="full"),
        lambda m: m.update(budget=0.9),
        lambda m: m["decoder"].update(layer_groups=[1, 1]),
        lambda m: m["report"]["refused"].append({"graph": "decode", "reason": "?"}),
        lambda m: m["files"]["weights.bin"].update(blake3="0" * 64),
        lambda m: m["files"].pop("weights.bin"),
        lambda m: m.update(digest=""),
    ],
)
def test_load_changed_value(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    changed(folder, change)
    assert refusal(folder).startswith(f"{folder / MANIFEST} was changed after the export")


def test_load_missing_file(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    assert refusal(folder) == f"{folder / 'weights.bin'} is missing, but the manifest lists it"


@pytest.mark.parametrize("content", [bytes(999), bytes(1001)])
@pytest.mark.parametrize("verify", ["files", "sizes"])
def test_load_file_of_another_size(folder: Path, content: bytes, verify: str) -> None:
    (folder / "weights.bin").write_bytes(content)
    message = refusal(folder, verify=verify)
    assert message.startswith(f"{folder / 'weights.bin'} was changed after the export")


def test_load_verify_sizes(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"1" * 1000)
    assert Manifest.load(folder, verify="sizes").files["weights.bin"].size_bytes == 1000
    assert refusal(folder).startswith(f"{folder / 'weights.bin'} was changed after the export")


@pytest.mark.parametrize("name", ["weights.bin", "prefill_warm.onnx", "prefill_cold.onnx", "encoder.onnx"])
def test_load_one_changed_byte(tiny: Exported, tmp_path: Path, name: str) -> None:
    path = tiny.copied(tmp_path / "copy") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert refusal(path.parent).startswith(f"{path} was changed after the export")


def test_session_of_changed_folder(tiny: Exported, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from vlcache_fx.deploy.sessions import OnnxSession

    path = tiny.copied(tmp_path / "copy") / "weights.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ExportError, match=r"weights\.bin was changed after the export"):
        OnnxSession(path.parent)
    with pytest.raises(ExportError, match="is not an exported folder"):
        OnnxSession(tmp_path)


def test_load_manifest_of_another_export(tiny: Exported, tiny_blended: Exported, tmp_path: Path) -> None:
    folder = tiny.copied(tmp_path / "copy")
    (folder / MANIFEST).write_bytes((tiny_blended.folder / MANIFEST).read_bytes())
    message = refusal(folder)
    assert message.startswith(str(folder))
    assert "was changed after the export" in message


def test_manifest_of_an_export(tiny: Exported) -> None:
    manifest = tiny.manifest
    assert (manifest.format, manifest.model, manifest.dtype) == (FORMAT, "TinyVlm", "float32")
    assert (manifest.opset, manifest.policy, manifest.budget) == (22, "layer_aware", 0.02)
    assert set(manifest.graphs) == {"prefill_cold", "prefill_warm", "spans", "leaves", "encoder"}
    on_disk = {
        path.name: FileSpec(path.stat().st_size, file_spec(path).blake3) for path in tiny.folder.iterdir()
    }
    del on_disk[MANIFEST]
    assert manifest.files == on_disk
    for graph in manifest.graphs.values():
        assert graph.file in manifest.files
    assert (tiny.folder / MANIFEST).read_bytes().endswith(b"}\n")


def test_torch_dtype_names() -> None:
    assert torch_dtype(TensorSpec("float16", ())) is torch.float16
    assert torch_dtype(TensorSpec("float", (1, "tokens"))) is torch.float32
    with pytest.raises(ExportError, match="'float8e5m2' is not one of float, "):
        torch_dtype(TensorSpec("float8e5m2", ()))
    assert all(isinstance(dtype, torch.dtype) for dtype in TORCH_DTYPES.values())


def test_missing_names_the_extra() -> None:
    error = missing("onnxscript", "onnx")
    assert isinstance(error, ExportError)
    assert str(error) == "onnxscript is not installed: pip install 'vlcache_fx[onnx]'"


def test_load_without_pydantic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ExportError, match=r"pydantic is not installed: pip install 'vlcache_fx\[onnx\]'"):
        Manifest.load(folder)
    with pytest.raises(ExportError, match="pydantic is not installed"):
        bare_manifest().save(folder)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest and its digest, as an attacker would."""
    import blake3
    from pydantic import TypeAdapter

    changed(folder, change)
    path, adapter = folder / MANIFEST, TypeAdapter(Manifest)
    edited = dataclasses.replace(adapter.validate_json(path.read_bytes()), digest="")
    digest = blake3.blake3(adapter.dump_json(edited)).hexdigest()
    path.write_bytes(adapter.dump_json(dataclasses.replace(edited, digest=digest)))


OUTSIDE = ["../outside.bin", "/etc/hostname", "sub/file", "..", ".", "", "..\\outside", "C:file", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("files.", lambda m, name: m["files"].update({name: {"size_bytes": 3, "blake3": "0" * 64}})),
        ("graphs.prefill_cold.file", lambda m, name: m["graphs"]["prefill_cold"].update(file=name)),
        ("engines.prefill_cold.file", lambda m, name: m["engines"]["prefill_cold"].update(file=name)),
    ],
)
def test_load_does_not_open_files_outside_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, field: str, change: Any, name: str
) -> None:
    (folder.parent / "outside.bin").write_bytes(b"abc")
    forge(folder, lambda m: change(m, name))
    monkeypatch.setattr("vlcache_fx.deploy.manifest.file_spec", lambda path: pytest.fail(f"opened {path}"))
    message = refusal(folder)
    assert message.startswith(f"the manifest's {field}")
    assert "is not the name of a file in its folder" in message


def test_load_link_out_of_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.bin"
    outside.write_bytes(bytes(1000))
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(outside)
    assert "-> " in refusal(folder)
    (folder / "weights.bin").unlink()
    (folder / "kept.bin").write_bytes(bytes(1000))
    (folder / "weights.bin").symlink_to(folder / "kept.bin")
    Manifest.load(folder)


def row(dim: int, dtype: str, size: int) -> dict[str, Any]:
    return {"0.k": {"dim": dim, "dtype": dtype, "sizes": [size, None]}}


PROFILE = "engines.prefill_cold.profile.input_ids"
SHAPE = "graphs.prefill_cold.inputs.input_ids.shape"
MINUS_AN_INPUT = {"constant": 0, "sizes": [{"factor": -1, "input": 4}]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files.weights/bin.size_bytes", -1),
        ("files.weights/bin.blake3", "short"),
        (SHAPE, [-1, 2]),
        (SHAPE, [""]),
        ("graphs.prefill_cold.outputs.logits.shape", [1 << 30] * 3),
        (PROFILE, [[1], [1], [1, 2]]),
        (PROFILE, [[1], [1 << 50], [1 << 60]]),
        (PROFILE, [[-1], [1], [2]]),
        ("engines.prefill_cold.builder", "antigravity 1"),
        ("engines.prefill_cold.builder", "tensorrt"),
        ("engines.prefill_cold.dtypes.input_ids", "void"),
        ("decoder.num_layers", -1),
        ("decoder.num_layers", 1 << 60),
        ("decoder.layer_groups", [5]),
        ("decoder.layer_groups", [2, -1]),
        ("decoder.num_outputs", -3),
        ("decoder.spans.num_merges", 2),
        ("decoder.spans.width", -1),
        ("decoder.spans.features", [7]),
        ("decoder.masks.inputs", [-1]),
        ("decoder.spans.embeddings", 1),
        ("decoder.num_results", 2),
        ("decoder.data", [4]),
        ("decoder.writes", [{"input": 0, "value": 0, "dim": None, "positions": None, "results": []}]),
        ("decoder.weights", [0]),
        ("decoder.has_past", True),
        ("decoder.tail", {"bounds": [{"input": 4}]}),
        ("decoder.tail", {"bounds": [MINUS_AN_INPUT, None, None]}),
    ],
)
def test_load_impossible_number(folder: Path, field: str, value: Any) -> None:
    *path, last = (name.replace("/", ".") for name in field.split("."))

    def change(content: dict[str, Any]) -> None:
        for name in path:
            content = content[name]
        content[last] = value

    forge(folder, change)
    assert refusal(folder).startswith(f"the manifest's {field.replace('/', '.')} is ")


@pytest.mark.parametrize(
    ("field", "rows"),
    [("dim", row(3, "float32", 1)), ("sizes", row(1, "float32", -1)), ("dtype", row(1, "load", 1))],
)
def test_load_impossible_row(folder: Path, field: str, rows: dict[str, Any]) -> None:
    forge(folder, lambda m: m["decoder"].update(rows=rows))
    assert refusal(folder).startswith(f"the manifest's decoder.rows.0.k.{field} is ")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        (
            "decoder.rows",
            lambda m: m["decoder"].update(rows={"0.q": {"dim": 0, "dtype": "int8", "sizes": [1]}}),
        ),
        ("cold.program.slots.0", lambda m: m["cold"]["program"].update(slots=["rows.one"])),
        ("warm.program.slots.0", lambda m: m["warm"]["program"].update(slots=["0.k"])),
        ("warm.program.recorded.0", lambda m: m["warm"]["program"].update(recorded=["rows.0"])),
    ],
)
def test_load_names_of_no_slot(folder: Path, field: str, change: Callable[[Any], None]) -> None:
    changed(folder, change)
    text = refusal(folder)
    assert f"is not a valid manifest: {field}" in text
    assert re.search(
        r"'(0\.q|rows\.one)' is not the name of a slot|slot '(0\.k|rows\.0)' is \w+, not \w+", text
    )


def test_load_valid_forged_digest(folder: Path) -> None:
    forge(folder, lambda m: m.update(model="Another"))
    assert Manifest.load(folder).model == "Another"


def test_load_size_of_file(folder: Path) -> None:
    forge(folder, lambda m: m["files"]["weights.bin"].update(size_bytes=1 << 62))
    assert refusal(folder).startswith(f"{folder / 'weights.bin'} was changed after the export")

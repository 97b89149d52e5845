"""Reports of exports, and their wiring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

from vlcache_fx.deploy.describe import ExportReport, wiring
from vlcache_fx.deploy.manifest import MANIFEST
from vlcache_fx.deploy.specs import EngineSpec, FileSpec

from .helpers import Exported, bare_manifest

EXPORTS = [
    pytest.param("llava", marks=pytest.mark.thorough),
    "qwen",
    "tiny",
    pytest.param("tiny_blended", marks=pytest.mark.thorough),
    "tiny_profiled",
]


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_report_of_the_manifest(any_export: Exported) -> None:
    report = ExportReport.of(any_export.manifest, any_export.folder)
    assert json.loads(json.dumps(report.as_dict())) == any_export.report
    assert any_export.report["directory"] == str(any_export.folder)


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_report_file_sizes(any_export: Exported) -> None:
    sizes = {path.name: path.stat().st_size for path in any_export.folder.iterdir() if path.name != MANIFEST}
    assert any_export.report["files"] == sizes
    assert any_export.report["size_bytes"] == sum(sizes.values())


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_report_lookups_of_every_layer(any_export: Exported) -> None:
    manifest, lookups = any_export.manifest, any_export.report["lookups"]
    layers = range(manifest.decoder.num_layers)
    assert [one["slot"] for one in lookups] == [f"{layer}.{part}" for layer in layers for part in "kv"]
    assert [one["layer"] for one in lookups] == [layer for layer in layers for _ in "kv"]
    assert len({one["node"] for one in lookups}) == len(lookups)
    assert {one["slot"] for one in lookups} == set(map(str, manifest.decoder.rows))
    for one in lookups:
        assert one["source_line"].strip()
        assert one["input"] in manifest.graphs["prefill_warm"].inputs
        assert one["input"] not in manifest.graphs["prefill_cold"].inputs


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_report_hoisted_inputs_of_the_warm_graph(
    any_export: Exported,
) -> None:
    manifest, hoisted = any_export.manifest, any_export.report["hoisted"]
    added = set(manifest.graphs["prefill_warm"].inputs) - set(manifest.inputs)
    assert len(hoisted) == len(set(hoisted))
    assert set(hoisted) == added
    assert {"rows.0", "rows.tail", "source.0"} <= added


@pytest.mark.parametrize(
    ("any_export", "rows"),
    [
        ("tiny", {"0", "tail"}),
        pytest.param("tiny_blended", {"0", "1", "2", "tail"}, marks=pytest.mark.thorough),
    ],
    indirect=["any_export"],
)
def test_one_rows_input_per_layer_group(any_export: Exported, rows: set[str]) -> None:
    hoisted = any_export.report["hoisted"]
    assert {name.removeprefix("rows.") for name in hoisted if name.startswith("rows.")} == rows
    assert {name.removeprefix("source.") for name in hoisted if name.startswith("source.")} == rows - {"tail"}


@pytest.mark.parametrize("any_export", EXPORTS, indirect=True)
def test_report_restricted_nodes(any_export: Exported) -> None:
    restricted = any_export.report["restricted"]
    assert [one["layer"] for one in restricted] == list(range(any_export.manifest.decoder.num_layers))
    for one in restricted:
        assert min(one["query_rows"], one["key_value_rows"], one["in_warm_graph"]) > 0
        assert one["query_rows"] > one["all_tokens"]


def test_plain_torch_model_reports_no_decoding_step(tiny: Exported) -> None:
    assert tiny.report["refused"] == [
        {"graph": "decode", "reason": "the KV cache is known only for models of the transformers library"}
    ]
    assert not (tiny.folder / "decode.onnx").exists()
    assert tiny.manifest.decode is None
    assert tiny.manifest.wiring == wiring(False)


def test_transformers_model_is_exported_completely(llava: Exported, qwen: Exported) -> None:
    for exported in (llava, qwen):
        assert exported.report["refused"] == []
        assert exported.manifest.decode == "decode"
        assert exported.manifest.wiring == wiring(True)
    assert [spec.fixed for spec in llava.manifest.encoders] == [{}]
    grids = [spec.fixed["image_grid_thw"] for spec in qwen.manifest.encoders]
    assert grids == [(1, 8, 8), (1, 4, 8)]


def test_wiring_names_every_step() -> None:
    steps = [step.partition(":")[0] for step in wiring(True)]
    assert [step for step in steps if " " not in step] == [
        "encoder",
        "spans",
        "prefill_cold",
        "prefill_warm",
        "decode",
    ]
    assert wiring(True)[:-1] == wiring(False)


def test_report_engines() -> None:
    engine = EngineSpec("decode.engine", "tensorrt 10", ("sm90",), {}, {}, 1.25)
    manifest = bare_manifest(engines={"decode": engine}, files={"decode.engine": FileSpec(7, "")})
    report = ExportReport.of(manifest, Path("here"))
    assert report.engines == {"decode": {"size_bytes": 7, "build_seconds": 1.25}}
    assert (report.directory, report.size_bytes) == ("here", 7)

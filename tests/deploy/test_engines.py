"""TensorRT engines of exported graphs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import onnx
import torch
from onnx import TensorProto, helper

from vlcache_fx.deploy import engines
from vlcache_fx.deploy.engines import (
    AHEAD_OF_TIME,
    DEFAULT_TAIL,
    DEFAULT_TOKENS,
    TIMING_CACHE,
    EngineOptions,
    build_engines,
    find_package,
)
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import GraphSpec, TensorSpec
from vlcache_fx.errors import ExportError, OptionError

from .helpers import Exported, bare_manifest

FOR_ONE = EngineOptions(package="tensorrt_rtx", compute_capabilities=("sm86",))


@pytest.fixture
def rtx() -> Any:
    """``tensorrt_rtx``, which builds without a GPU."""
    return pytest.importorskip("tensorrt_rtx", reason="it is what builds engines ahead of time")


def test_build_engines_every_graph(qwen_engines: Exported) -> None:
    manifest = qwen_engines.manifest
    assert manifest.engines.keys() == manifest.graphs.keys()
    assert {"prefill_cold", "prefill_warm", "decode", "encoder", "spans"} <= manifest.engines.keys()
    assert manifest.report["refused"] == []
    for name, engine in manifest.engines.items():
        assert engine.file == f"{name}.engine"
        assert (qwen_engines.folder / engine.file).stat().st_size == manifest.files[engine.file].size_bytes
        assert manifest.files[engine.file].size_bytes > 10_000
        assert engine.compute_capabilities == ("sm86",)
        assert engine.build_seconds > 0


def test_engine_spec_names_builder_and_shapes(qwen_engines: Exported, rtx: Any) -> None:
    manifest = qwen_engines.manifest
    for name, engine in manifest.engines.items():
        graph = manifest.graphs[name]
        assert engine.builder == f"tensorrt_rtx {rtx.__version__}"
        assert list(engine.profile) == list(graph.inputs)
        forms = {**graph.inputs, **graph.outputs}
        assert engine.dtypes == {key: form.dtype for key, form in forms.items()}
        for key, sizes in engine.profile.items():
            for place, form in enumerate(graph.inputs[key].shape):
                low, usual, high = (size[place] for size in sizes)
                assert 0 <= low <= usual <= high
                assert isinstance(form, str) or low == high == form


def test_engine_accepts_shapes_of_several_prompts(qwen_engines: Exported) -> None:
    manifest = qwen_engines.manifest
    for images, text in (([0, 1], 0), ([0], 3), ([1, 0], 5), ([], 2)):
        given = qwen_engines.given(images, text)
        tokens = {"input_ids": given["input_ids"].shape}
        if "position_ids" in given:
            tokens["position_ids"] = given["position_ids"].shape
        for name in ("prefill_cold", "prefill_warm", "spans"):
            profile = manifest.engines[name].profile
            for key in tokens.keys() & profile.keys():
                low, _, high = profile[key]
                assert all(a <= b <= c for a, b, c in zip(low, tokens[key], high, strict=True))
    names = {spec.graph: spec for spec in manifest.encoders}
    for name in names:
        ((low, usual, high),) = manifest.engines[name].profile.values()
        assert low == usual == high


@pytest.mark.thorough
def test_build_engines_float16(half: Exported, tmp_path: Path, rtx: Any) -> None:
    manifest = build_engines(half.manifest, half.copied(tmp_path / "copy"), FOR_ONE)
    assert manifest.dtype == "float16"
    assert manifest.engines.keys() == manifest.graphs.keys() >= {"prefill_cold", "prefill_warm", "decode"}
    warm = manifest.engines["prefill_warm"]
    assert {name: warm.dtypes[name] for name in ("input_ids", "donor.0.k", "logits", "present.0.key")} == {
        "input_ids": "int64", "donor.0.k": "float16", "logits": "float16", "present.0.key": "float16",
    }  # fmt: skip


def test_export_builds_engines_with_attention_nodes(tiny_profiled: Exported, rtx: Any) -> None:
    manifest, report = tiny_profiled.manifest, tiny_profiled.report
    assert manifest.opset == 23
    assert manifest.engines.keys() == manifest.graphs.keys() == report["engines"].keys()
    assert [one["graph"] for one in report["refused"]] == ["decode"]
    for name, engine in manifest.engines.items():
        size = (tiny_profiled.folder / engine.file).stat().st_size
        assert report["engines"][name] == {"size_bytes": size, "build_seconds": engine.build_seconds}
        assert report["files"][engine.file] == size


def test_build_engines_several_gpus_in_one_file(tmp_path: Path, rtx: Any) -> None:
    manifest = build_engines(
        written(tmp_path, prefill_cold="Add"),
        tmp_path,
        EngineOptions(package="tensorrt_rtx", compute_capabilities=("sm80", "sm89")),
    )
    assert manifest.engines["prefill_cold"].compute_capabilities == ("sm80", "sm89")
    assert [path.name for path in tmp_path.glob("*.engine")] == ["prefill_cold.engine"]


def written(folder: Path, **operators: str) -> Manifest:
    """Write small graphs of one operator each: ``Add``, or an operator of an unknown domain."""
    graphs = {}
    for name, operator in operators.items():
        form = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 4])
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 4])
        domain = "" if operator == "Add" else "of.ours"
        node = helper.make_node(operator, ["x", "x"], ["y"], domain=domain)
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid("of.ours", 1)]
        model = helper.make_model(
            helper.make_graph([node], name, [form], [result]), opset_imports=opsets, ir_version=10
        )
        onnx.save(model, folder / f"{name}.onnx")
        spec = TensorSpec("float", ("tokens", 4))
        graphs[name] = GraphSpec(f"{name}.onnx", {"x": spec}, {"y": spec})
    return bare_manifest(graphs=graphs)


@pytest.mark.parametrize("name", ["prefill_cold", "prefill_warm"])
def test_build_engines_unparsable_prefill(tmp_path: Path, name: str, rtx: Any) -> None:
    with pytest.raises(ExportError, match=rf"^tensorrt_rtx cannot parse {name}\.onnx: .*(?s:.)*Mystery"):
        build_engines(written(tmp_path, **{name: "Mystery"}), tmp_path, FOR_ONE)
    assert not list(tmp_path.glob("*.engine"))


def test_build_engines_reports_other_unparsable_graphs(tmp_path: Path, rtx: Any) -> None:
    before = written(tmp_path, decode="Mystery", prefill_cold="Add")
    manifest = build_engines(before, tmp_path, FOR_ONE)
    assert list(manifest.engines) == ["prefill_cold"]
    assert [path.name for path in tmp_path.glob("*.engine")] == ["prefill_cold.engine"]
    (refused,) = manifest.report["refused"]
    assert refused["graph"] == "decode (engine)"
    assert refused["reason"].startswith("tensorrt_rtx cannot parse decode.onnx: ")
    assert before.report["refused"] == []


def test_build_engines_sizes(tmp_path: Path, rtx: Any) -> None:
    options = EngineOptions("tensorrt_rtx", ("sm86",), {"tokens": (3, 5, 7)})
    manifest = build_engines(written(tmp_path, prefill_cold="Add"), tmp_path, options)
    assert manifest.engines["prefill_cold"].profile == {"x": ((3, 4), (5, 4), (7, 4))}


def test_build_engines_unknown_size_name(tmp_path: Path, rtx: Any) -> None:
    options = EngineOptions("tensorrt_rtx", ("sm86",), {"tokesn": (1, 2, 3)})
    with pytest.raises(OptionError, match=r"these graphs have no size 'tokesn'; they have tokens"):
        build_engines(written(tmp_path, prefill_cold="Add"), tmp_path, options)
    assert not list(tmp_path.glob("*.engine"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"package": "openvino"}, "package='openvino' is not valid: it must be tensorrt or tensorrt_rtx"),
        (
            {"compute_capabilities": ("sm86", "sm90")},
            "no engine for 'sm90' can be built ahead of time; .*'tensorrt'",
        ),
        (
            {"compute_capabilities": ("86",)},
            "no engine for '86' can be built ahead of time; valid compute capabilities are sm75, ",
        ),
        ({"compute_capabilities": ()}, "compute_capabilities is empty"),
        (
            {"sizes": {"tokens": (1, 9, 8)}},
            r"sizes\['tokens'\]=\(1, 9, 8\) must be \(minimum, optimum, maximum\)",
        ),
        ({"sizes": {"tokens": (9, 8, 10)}}, r"sizes\['tokens'\]"),
        ({"sizes": {"tokens": (0, 8, 10)}}, r"sizes\['tokens'\]"),
        ({"sizes": {"tokens": (1, 8)}}, r"sizes\['tokens'\]"),
        ({"sizes": {"tokens": (1, 8.5, 9)}}, r"sizes\['tokens'\]"),
        ({"sizes": {"tokens": 512}}, r"sizes\['tokens'\]=512 must be \(minimum, optimum, maximum\)"),
    ],
)
def test_engine_options_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EngineOptions(**options)


def test_default_sizes_follow_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    shape = ("tokens", "image_tokens", "rows_tail", "past_tokens", 64)
    graph = GraphSpec("prefill_cold.onnx", {"x": TensorSpec("float", shape)}, {})
    for sizes, reach in (({}, DEFAULT_TOKENS), ({"tokens": (2, 100, 200)}, (2, 100, 200))):
        engine = build_engines(
            bare_manifest(graphs={"prefill_cold": graph}), tmp_path, EngineOptions(sizes=sizes)
        ).engines["prefill_cold"]
        low, usual, high = engine.profile["x"]
        assert low == (reach[0], 1, DEFAULT_TAIL[0], 1, 64)
        assert usual == (reach[1], reach[1], DEFAULT_TAIL[1], reach[1], 64)
        assert high == (reach[2], reach[2], DEFAULT_TAIL[2], reach[2], 64)


def test_ahead_of_time_gpus_of_the_package(rtx: Any) -> None:
    known = {name.lower() for name in dir(rtx.ComputeCapability) if re.fullmatch(r"SM\d+", name)}
    assert set(AHEAD_OF_TIME) <= known


def test_find_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        ExportError, match=r"^tensorrt is not installed: pip install 'vlcache_fx\[tensorrt\]'"
    ):
        find_package("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    for name in (None, "tensorrt_rtx"):
        with pytest.raises(
            ExportError, match=r"^tensorrt-rtx is not installed: .*vlcache_fx\[tensorrt-rtx\]"
        ):
            find_package(name)


def test_find_package_broken_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> ModuleType:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(engines.importlib, "import_module", fail)
    with pytest.raises(ExportError, match=r"^tensorrt is not installed: .*libnvinfer\.so\.10"):
        find_package("tensorrt")


def test_find_package_first_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ModuleType("tensorrt"), ModuleType("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", first)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", second)
    assert find_package() is first
    assert find_package("tensorrt_rtx") is second
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert find_package() is second


class Network:
    """The network of a fake builder."""

    num_layers = 0

    def __init__(self, flags: int) -> None:
        self.flags = flags


class Cache:
    """A timing cache: its initial bytes, and a suffix from the build."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class Fake:
    """The part of ``tensorrt`` that engines use: builds for the local GPU, with a timing cache."""

    __name__ = "tensorrt"
    __version__ = "10.9.0"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    class ILogger:
        """Base class of loggers."""

        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

        def __init__(self) -> None:
            self.made = True

    def __init__(self, plan: bytes | None = b"plan") -> None:
        self.networks: list[Network] = []
        self.caches: list[bytes] = []
        self.profiles: list[dict[str, Any]] = []
        self._plan = plan
        self._log: Any = None

    def Builder(self, log: Any) -> Fake:  # noqa: N802 (the package's name)
        self._log = log
        return self

    def OnnxParser(self, network: Network, log: Any) -> Any:  # noqa: N802
        self.networks.append(network)
        return SimpleNamespace(parse_from_file=lambda path: path.endswith(".onnx"))

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Any:
        state: dict[str, Any] = {}

        def set_timing_cache(cache: Cache, ignore_mismatch: bool) -> None:
            assert not ignore_mismatch
            self.caches.append(cache.content)
            state["cache"] = cache

        return SimpleNamespace(
            create_timing_cache=Cache,
            set_timing_cache=set_timing_cache,
            get_timing_cache=lambda: state["cache"],
            add_optimization_profile=lambda profile: None,
        )

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        self.profiles.append(shapes)
        return SimpleNamespace(set_shape=lambda name, *sizes: shapes.update({name: sizes}))

    def build_serialized_network(self, network: Network, config: Any) -> bytes | None:
        if self._plan is None:
            self._log.log(2, "a warning")
            self._log.log(1, "no implementation for this node")
            self._log.log(2, "another warning")
        return self._plan


def fake(monkeypatch: pytest.MonkeyPatch, plan: bytes | None = b"plan") -> Fake:
    made = Fake(plan)
    monkeypatch.setattr(engines, "find_package", lambda name: made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return made


def test_tensorrt_builds_for_the_local_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = fake(monkeypatch)
    manifest = build_engines(written(tmp_path, prefill_cold="Add", decode="Add"), tmp_path)
    for name in ("prefill_cold", "decode"):
        engine = manifest.engines[name]
        assert engine.compute_capabilities == ("sm90",)
        assert engine.builder == "tensorrt 10.9.0"
        assert (tmp_path / engine.file).read_bytes() == b"plan"
    assert [network.flags for network in package.networks] == [2, 2]
    assert package.profiles == [{"x": ((2, 4), (1024, 4), (8192, 4))}] * 2


def test_tensorrt_continues_the_timing_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = fake(monkeypatch)
    build_engines(written(tmp_path, prefill_cold="Add", decode="Add"), tmp_path)
    assert package.caches == [b"", b"+"]
    assert (tmp_path / TIMING_CACHE).read_bytes() == b"++"


def test_build_engines_reason_of_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, None)
    message = "^tensorrt cannot build prefill_cold: no implementation for this node$"
    with pytest.raises(ExportError, match=message):
        build_engines(written(tmp_path, prefill_cold="Add"), tmp_path)
    manifest = build_engines(written(tmp_path, decode="Add"), tmp_path)
    assert manifest.engines == {}
    assert "no implementation for this node" in manifest.report["refused"][0]["reason"]

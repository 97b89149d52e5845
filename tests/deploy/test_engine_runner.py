"""Engines on a GPU: checks without a GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.deploy import engine_runner
from vlcache_fx.deploy.engine_runner import EngineRunner, bind, check_engines, check_shapes
from vlcache_fx.deploy.engines import EngineOptions
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.sessions import EngineSession
from vlcache_fx.deploy.specs import TORCH_DTYPES, EngineSpec, GraphSpec, TensorSpec
from vlcache_fx.errors import ExportError

from .helpers import Exported, assert_close, bare_manifest, report_of

CPU = torch.device("cpu")
GRAPH = GraphSpec(
    "prefill_cold.onnx",
    {"input_ids": TensorSpec("int64", (1, "tokens")), "features": TensorSpec("float16", ("image_tokens", 4))},
    {"logits": TensorSpec("float", (1, 1, 3)), "present": TensorSpec("float16", (1, "tokens", 2))},
)
ENGINE = EngineSpec(
    file="prefill_cold.engine",
    builder="tensorrt 10.9.0",
    compute_capabilities=("sm80", "sm86"),
    profile={"input_ids": ((1, 2), (1, 8), (1, 16)), "features": ((1, 4), (4, 4), (8, 4))},
    dtypes={"input_ids": "int64", "features": "float16", "logits": "float", "present": "float16"},
    build_seconds=1.0,
)
MANIFEST = bare_manifest(graphs={"prefill_cold": GRAPH}, engines={"prefill_cold": ENGINE})


class Context:
    """An execution context that records its bindings, and writes ones to its outputs."""

    def __init__(self, works: bool = True) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self._works = works

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert name not in self.addresses, "shapes come first"
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tokens = self.shapes["input_ids"][1]
        return {"logits": (1, 1, 3), "present": (1, tokens, 2)}[name]

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        for index in range(3):
            ctypes.c_float.from_address(self.addresses["logits"] + 4 * index).value = 1.0 + index
        self.addresses.clear()
        return self._works


def fake(monkeypatch: pytest.MonkeyPatch, *contexts: Context | None, version: str = "10.9.0") -> list[bytes]:
    """Install a fake ``tensorrt``; return the list of loaded plans."""
    loaded: list[bytes] = []
    waiting = list(contexts)

    def deserialize(plan: bytes) -> Any:
        loaded.append(plan)
        context = waiting.pop(0)
        return None if context is None else SimpleNamespace(create_execution_context=lambda: context)

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            assert severity == self.ERROR

    package = SimpleNamespace(
        __version__=version,
        Logger=Logger,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=deserialize),
    )
    names: list[str] = []
    monkeypatch.setattr(engine_runner, "find_package", lambda name: names.append(name) or package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=77))
    return loaded


def given(tokens: int = 5, rows: int = 3) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(tokens)[None], "features": torch.ones(rows, 4, dtype=torch.float16)}


def test_engine_session_without_engines(tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    bare_manifest().save(tmp_path)
    with pytest.raises(ExportError, match=f"{tmp_path} contains no engines: export with format='tensorrt'"):
        EngineSession(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_engine_session_without_gpu(tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    MANIFEST.save(tmp_path)
    with pytest.raises(ExportError, match="need an NVIDIA GPU, and torch finds none: use OnnxSession"):
        EngineSession(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_engine_session_ahead_of_time_without_gpu(qwen_engines: Exported) -> None:
    with pytest.raises(ExportError, match="torch finds none"):
        vlcache_fx.EngineSession(qwen_engines.folder)


def test_check_engines_package_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    assert check_engines(MANIFEST, "sm86").__version__ == "10.9.0"
    assert check_engines(MANIFEST, "sm80").__version__ == "10.9.0"


def test_check_engines_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, version="10.10.0")
    with pytest.raises(
        ExportError, match=r"built by tensorrt 10\.9\.0, but 10\.10\.0 is installed: build them again"
    ):
        check_engines(MANIFEST, "sm86")


def test_check_engines_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    with pytest.raises(ExportError, match="built for sm80, sm86, but this GPU is sm90: build them again"):
        check_engines(MANIFEST, "sm90")


def test_check_engines_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match="tensorrt is not installed"):
        check_engines(MANIFEST, "sm86")


@pytest.mark.parametrize(("tokens", "rows"), [(2, 1), (16, 8), (7, 3)])
def test_check_shapes_within_the_profile(tokens: int, rows: int) -> None:
    check_shapes("prefill_cold", ENGINE, {**given(tokens, rows), "not an input": torch.ones(99)})
    check_shapes("prefill_cold", ENGINE, {"input_ids": given(tokens)["input_ids"]})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (given(1), r"'input_ids' of prefill_cold has shape \[1, 1\]; .* \[1, 2\] to \[1, 16\]: export"),
        (given(17), r"'input_ids' of prefill_cold has shape \[1, 17\]"),
        (given(5, 9), r"'features' of prefill_cold has shape \[9, 4\]"),
        ({"features": torch.ones(3, 5)}, r"'features' of prefill_cold has shape \[3, 5\]"),
        ({"input_ids": torch.arange(5)}, r"'input_ids' of prefill_cold has shape \[5\]"),
    ],
)
def test_check_shapes_outside_the_profile(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_shapes("prefill_cold", ENGINE, inputs)


def test_bind_without_copies() -> None:
    context, inputs = Context(), given()
    made, kept = bind(context, ENGINE, inputs, GRAPH.outputs, CPU)
    assert context.shapes == {"input_ids": (1, 5), "features": (3, 4)}
    assert context.addresses == {
        "input_ids": inputs["input_ids"].data_ptr(),
        "features": inputs["features"].data_ptr(),
        "logits": made["logits"].data_ptr(),
        "present": made["present"].data_ptr(),
    }
    assert [(value.shape, value.dtype) for value in made.values()] == [
        ((1, 1, 3), torch.float32),
        ((1, 5, 2), torch.float16),
    ]
    assert [value.data_ptr() for value in kept] == [value.data_ptr() for value in inputs.values()]


def test_bind_converts_inputs() -> None:
    context = Context()
    features = torch.arange(12.0).reshape(4, 3).mT  # float32, not contiguous
    _, kept = bind(context, ENGINE, {**given(), "features": features}, GRAPH.outputs, CPU)
    (brought,) = (value for value in kept if value.dtype == torch.float16)
    assert brought.is_contiguous()
    assert torch.equal(brought, features.half())
    assert context.addresses["features"] == brought.data_ptr()


def test_run_loads_once_and_uses_the_current_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ENGINE.file).write_bytes(b"plan")
    context = Context()
    loaded = fake(monkeypatch, context)
    runner = EngineRunner(tmp_path, MANIFEST, "cpu")
    assert loaded == []
    for tokens in (5, 9):
        found = runner.run("prefill_cold", given(tokens))
        assert found["logits"].tolist() == [[[1.0, 2.0, 3.0]]]
        assert found["present"].shape == (1, tokens, 2)
    assert loaded == [b"plan"]
    assert context.streams == [77, 77]


def test_run_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ENGINE.file).write_bytes(b"plan")
    fake(monkeypatch, None, Context(works=False))
    runner = EngineRunner(tmp_path, MANIFEST, "cpu")
    with pytest.raises(ExportError, match=r"TensorRT cannot load prefill_cold\.engine"):
        runner.run("prefill_cold", given())
    with pytest.raises(ExportError, match="TensorRT cannot run prefill_cold"):
        runner.run("prefill_cold", given())
    with pytest.raises(ExportError, match="prefill_cold lacks inputs: features"):
        runner.run("prefill_cold", {"input_ids": given()["input_ids"]})
    with pytest.raises(ExportError, match=r"'input_ids' of prefill_cold has shape \[1, 30\]"):
        runner.run("prefill_cold", given(30))
    with pytest.raises(ExportError, match=r"'input_ids' of prefill_cold has shape \[1, 30\]"):
        runner.check("prefill_cold", given(30))


def test_engine_runner_checks_gpu_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, version="11.0")
    with pytest.raises(ExportError, match="build them again"):
        EngineRunner(tmp_path, MANIFEST, "cpu")


class Computing:
    """An execution context that reads and writes memory like an engine, and computes with ONNX Runtime."""

    def __init__(self, path: Path, spec: EngineSpec) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._spec, self._found = spec, dict[str, Tensor]()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        low, _, high = self._spec.profile[name]
        assert len(shape) == len(low)
        assert all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        self._shapes[name] = shape
        self._found.clear()

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self._found:
            feeds = {key: self._memory(key, self._shapes[key]).numpy() for key in self._spec.profile}
            names = [output.name for output in self._session.get_outputs()]
            results = self._session.run(names, feeds)
            self._found = {key: torch.from_numpy(value) for key, value in zip(names, results, strict=True)}
        return tuple(self._found[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        for name, value in self._found.items():
            self._memory(name, tuple(value.shape)).copy_(value)
        return True

    def _memory(self, name: str, shape: tuple[int, ...]) -> Tensor:
        dtype = TORCH_DTYPES[self._spec.dtypes[name]]
        size = dtype.itemsize * torch.Size(shape).numel()
        held = (ctypes.c_char * size).from_address(self._addresses[name])
        return torch.frombuffer(held, dtype=dtype).reshape(shape)


@pytest.fixture
def on_engines(qwen_engines: Exported, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineSession]:
    """Create sessions on a fake TensorRT with its rules for sizes and memory."""
    manifest, folder = qwen_engines.manifest, qwen_engines.folder
    fake(monkeypatch, version=manifest.engines["decode"].builder.split()[1])
    package = engine_runner.find_package("")
    plans = {(folder / spec.file).read_bytes(): name for name, spec in manifest.engines.items()}

    def deserialize(plan: bytes) -> Any:
        name = plans[plan]
        context = Computing(folder / manifest.graphs[name].file, manifest.engines[name])
        return SimpleNamespace(create_execution_context=lambda: context)

    package.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=deserialize)
    return lambda **options: EngineSession(folder, device="cpu", strict=True, min_span_tokens=4, **options)


STEPS = (([0], "cold"), ([0], "warm"), ([1, 0], "warm"))


def test_engine_session_equals_unmodified_model(
    qwen_engines: Exported, on_engines: Callable[..., EngineSession]
) -> None:
    session = on_engines(policy="full")
    for text, (images, mode) in enumerate(STEPS):
        found = session.prefill(**qwen_engines.given(images, text))
        assert_close(found, qwen_engines.expected(images, text), qwen_engines.atol)
        assert report_of(session)["mode"] == mode
    given = qwen_engines.given([1, 0], 2)
    whole = qwen_engines.session(policy="full").generate(3, **given)
    assert session.generate(3, **given).tolist() == whole.tolist()


def test_engine_session_reuses_like_onnx_session(
    qwen_engines: Exported, on_engines: Callable[..., EngineSession]
) -> None:
    session, other = on_engines(), qwen_engines.session()
    for text, (images, mode) in enumerate(STEPS):
        given = qwen_engines.given(images, text)
        assert_close(session.prefill(**given), other.prefill(**given), qwen_engines.atol)
        for what in ("mode", "rows_per_layer", "token_layer_fraction", "encoder_hit"):
            assert report_of(session)[what] == report_of(other)[what]
        assert report_of(session)["mode"] == mode


def test_engine_session_text_only(qwen_engines: Exported, on_engines: Callable[..., EngineSession]) -> None:
    found = on_engines().prefill(**qwen_engines.given([], 3))
    assert_close(found, qwen_engines.expected([], 3), qwen_engines.atol)


def test_engine_session_recovers_after_unsupported_sizes(
    qwen_engines: Exported, on_engines: Callable[..., EngineSession]
) -> None:
    session, given = on_engines(policy="full"), qwen_engines.given([0], 0)
    long = {**given, "input_ids": torch.zeros(1, 9000, dtype=torch.int64)}
    long["position_ids"] = given["position_ids"][..., :1].expand(-1, -1, 9000)
    with pytest.raises(ExportError, match=r"'input_ids' of \w+ has shape \[1, 9000\]; the engine accepts"):
        session.prefill(**long)
    for text, mode in ((0, "cold"), (1, "warm")):
        session.prefill(**qwen_engines.given([0], text))
        assert report_of(session)["mode"] == mode


@pytest.mark.gpu
def test_engines_equal_unmodified_model(tmp_path: Path, qwen: Exported) -> None:
    pytest.importorskip("tensorrt", reason="it builds engines for the GPU that is there")
    report = vlcache_fx.export(
        qwen.model, qwen.inputs([0, 1]), tmp_path / "engines", "tensorrt", engine=EngineOptions("tensorrt")
    )
    assert report.refused == ()
    assert Manifest.load(tmp_path / "engines").engines.keys() >= {"prefill_cold", "prefill_warm", "decode"}
    session = EngineSession(tmp_path / "engines", policy="full", strict=True, min_span_tokens=4)
    steps = (([0], "cold"), ([0], "warm"), ([1, 0], "warm"), ([], "bypass"))
    for text, (images, mode) in enumerate(steps):
        found = session.prefill(**qwen.given(images, text))
        assert {value.device.type for value in found.values()} == {"cuda"}
        on_host = {name: value.cpu() for name, value in found.items()}
        assert_close(on_host, qwen.expected(images, text), atol=2e-3)  # products in TF32
        assert report_of(session)["mode"] == mode
    inputs = qwen.inputs([1, 0], 2)
    whole = qwen.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = session.generate(4, **qwen.given([1, 0], 2))
    assert answer.tolist() == whole[0, inputs["input_ids"].shape[1] :].tolist()

"""Exports shared by tests. Each takes seconds: one process writes it, and the others read it."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.deploy.engines import EngineOptions, build_engines
from vlcache_fx.policies.profile import Profile
from vlcache_fx.testing.families import tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm

from .helpers import Exported, tiny_shapes

LAYERS = 3
"""Kinds of plain torch models. Models of the transformers library have one less: each takes seconds."""

EXPORTS = frozenset(
    [
        "any_export",
        "half",
        "llava",
        "qwen",
        "qwen_engines",
        "tiny",
        "tiny_blended",
        "tiny_profiled",
    ]
)

Maker = Callable[..., Exported]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of exports as slow: the first test of an export waits for it."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and EXPORTS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Export a model once per test run, for all processes."""
    for package in ("onnx", "onnxscript", "pydantic"):
        pytest.importorskip(package, reason="exports need the extra onnx")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, kind: str, model: Any, **options: Any) -> Exported:
        from filelock import FileLock

        folder, done = root / f"export-{name}", root / f"export-{name}.json"
        found = Exported(kind, model, folder, {})
        with FileLock(root / f"export-{name}.lock"):
            if not done.exists():
                report = vlcache_fx.export(
                    model, found.inputs([0, 1] if kind != "tiny" else [0]), folder, **options
                )
                done.write_text(json.dumps(report.as_dict()), encoding="utf-8")
        return Exported(kind, model, folder, json.loads(done.read_text(encoding="utf-8")))

    return make


@pytest.fixture(scope="session")
def llava(exported_once: Maker) -> Exported:
    return exported_once("llava", "llava", tiny_llava(LAYERS - 1))


@pytest.fixture(scope="session")
def qwen(exported_once: Maker) -> Exported:
    return exported_once("qwen", "qwen", tiny_qwen2_5_vl(LAYERS - 1))


@pytest.fixture(scope="session")
def half(exported_once: Maker) -> Exported:
    """A model in float16 with an untraceable encoder: its control flow depends on a value."""
    model: Any = tiny_llava(1).to(torch.float16)
    encode = model.model.get_image_features

    def deciding(pixel_values: Tensor, **options: Any) -> Any:
        return encode(pixel_values=pixel_values if bool(pixel_values.any()) else None, **options)

    model.model.get_image_features = deciding
    return exported_once("half", "half", model)


@pytest.fixture(scope="session")
def tiny(exported_once: Maker) -> Exported:
    return exported_once("tiny", "tiny", tiny_vlm(num_layers=LAYERS))


@pytest.fixture(scope="session")
def tiny_blended(exported_once: Maker) -> Exported:
    """An export for a policy with different rows in every layer."""
    return exported_once(
        "blended", "tiny", tiny_vlm(num_layers=LAYERS), dynamic_shapes=tiny_shapes(), policy="cacheblend"
    )


@pytest.fixture(scope="session")
def tiny_profile(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile in which the first layer matters most."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    fingerprint = tiny.manifest.decoder.model_fingerprint
    Profile(fingerprint, "float32", (4.0, 1.0, 1.0), ((0.0, 1.0), (0.5, 0.1), (1.0, 0.0))).save(path)
    return path


@pytest.fixture(scope="session")
def tiny_profiled(exported_once: Maker, tiny_profile: Path) -> Exported:
    """An export with a profile, attention nodes, and engines if a package can build them."""
    engine = EngineOptions(package="tensorrt_rtx", compute_capabilities=("sm86",))
    package = importlib.util.find_spec("tensorrt_rtx")
    return exported_once(
        "profiled",
        "tiny",
        tiny_vlm(num_layers=LAYERS),
        dynamic_shapes=tiny_shapes(),
        profile=tiny_profile,
        budget=0.3,
        opset=23,
        format="onnx" if package is None else "tensorrt",
        engine=engine,
    )


@pytest.fixture(scope="session")
def qwen_engines(qwen: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export ``qwen`` with engines, built without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="it is what builds engines ahead of time")
    folder = qwen.copied(tmp_path_factory.mktemp("engines") / "exported")
    options = EngineOptions(package="tensorrt_rtx", compute_capabilities=("sm86",))
    build_engines(qwen.manifest, folder, options).save(folder)
    return Exported(qwen.kind, qwen.model, folder, qwen.report)


@pytest.fixture
def any_export(request: pytest.FixtureRequest) -> Exported:
    """The export named by the test's parameter."""
    found: Exported = request.getfixturevalue(request.param)
    return found

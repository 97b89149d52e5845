"""``vlcache_fx.export``: arguments, errors and side effects."""

from __future__ import annotations

import contextlib
import copy
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")

import torch
from torch import Tensor, nn

import vlcache_fx
from vlcache_fx.deploy import export as entry
from vlcache_fx.deploy import writer
from vlcache_fx.deploy.engines import EngineOptions
from vlcache_fx.deploy.manifest import MANIFEST, Manifest
from vlcache_fx.deploy.sessions import OnnxSession
from vlcache_fx.deploy.specs import GraphSpec
from vlcache_fx.errors import ExportError, OptionError, PolicyError, Reason, UnsupportedGraphError
from vlcache_fx.inserted_pass import InsertedPass
from vlcache_fx.passes import Pass, Program
from vlcache_fx.policies.profile import Profile
from vlcache_fx.testing.families import llava_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Exported, assert_close, bare_manifest, report_of, tiny_shapes

EXAMPLE = tiny_vlm_inputs(5, 4, [(20, 0)])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A path that does not exist, in a folder of its own."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "exported"


def export(target: Path, model: nn.Module | None = None, example: Any = None, **options: Any) -> Any:
    """Export ``model``, by default a tiny model."""
    if model is None:
        model, options = tiny_vlm(num_layers=1), {"dynamic_shapes": tiny_shapes(), **options}
    return vlcache_fx.export(model, EXAMPLE if example is None else example, target, **options)


def assert_no_files(target: Path) -> None:
    assert not target.exists()
    assert list(target.parent.iterdir()) == []


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the writing of graphs by that of one file; return the folders that were written to."""
    folders: list[Path] = []

    def write(model: nn.Module, example: Any, folder: Path, *_: Any) -> Manifest:
        folders.append(folder)
        assert not model.training
        (folder / "weights.bin").write_bytes(b"weights")
        return bare_manifest()

    monkeypatch.setattr(entry, "_write", write)
    return folders


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "openvino"}, "format='openvino' is not valid: it must be 'onnx' or 'tensorrt'"),
        ({"opset": 17}, "opset=17 is not valid: it must be an integer from 18 to 23"),
        ({"opset": 24}, "opset=24 is not valid"),
        ({"opset": True}, "opset=True is not valid"),
        ({"opset": "20"}, "opset='20' is not valid"),
        ({"opset": 22.0}, "opset=22.0 is not valid"),
        ({"lowering": "eager"}, "unknown option 'lowering' of export; .*: policy, budget, profile"),
        ({"budgte": 0.1}, "unknown option 'budgte' of export"),
        ({"budget": 1.5}, "budget=1.5 is not valid"),
        ({"policy": ""}, "policy='' is not valid"),
    ],
)
def test_export_bad_argument(target: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        export(target, **options)
    assert_no_files(target)


def test_export_unknown_policy(target: Path) -> None:
    with pytest.raises(PolicyError, match="no_such_policy"):
        export(target, policy="no_such_policy")
    assert_no_files(target)


@pytest.mark.parametrize("what", ["a missing file", "another model's"])
def test_export_mismatched_profile(target: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "profile.json"
    if what == "another model's":
        Profile("another model", "float32", (1.0,)).save(path)
    with pytest.raises(PolicyError, match=r"cannot read the profile|another model"):
        export(target, profile=path)
    assert_no_files(target)


def test_export_keeps_nonempty_directory(target: Path) -> None:
    target.mkdir()
    (target / "precious").write_text("data", encoding="utf-8")
    with pytest.raises(ExportError, match=f"{target} exists and is not an empty directory"):
        export(target)
    assert [path.name for path in target.iterdir()] == ["precious"]
    assert list(target.parent.iterdir()) == [target]


def test_export_keeps_file_at_the_target(target: Path) -> None:
    target.write_text("data", encoding="utf-8")
    with pytest.raises(ExportError, match=f"{target} exists and is not an empty directory"):
        export(target)
    assert target.read_text(encoding="utf-8") == "data"


def test_export_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=f"cannot write to {tmp_path / 'file'}: "):
        export(tmp_path / "file" / "exported")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "pydantic"])
def test_export_missing_package(target: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"^{package} is not installed: .*'vlcache_fx\[onnx\]'"):
        export(target)
    assert_no_files(target)


def test_export_missing_tensorrt_before_tracing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    no_model = nn.Identity()
    with pytest.raises(ExportError, match=r"tensorrt-rtx is not installed: .*'vlcache_fx\[tensorrt-rtx\]'"):
        export(target, no_model, format="tensorrt")
    with pytest.raises(ExportError, match=r"^tensorrt is not installed: .*'vlcache_fx\[tensorrt\]'"):
        export(target, no_model, format="tensorrt", engine=EngineOptions(package="tensorrt"))
    assert_no_files(target)


def test_extras_in_messages_exist() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = {"onnx", "onnxscript", "pydantic", "onnxruntime"}
    assert needed <= {requirement.partition(">")[0] for requirement in extras["onnx"]}
    for package in ("tensorrt", "tensorrt-rtx"):
        assert package in {requirement.partition(">")[0] for requirement in extras[package]}


def hidden(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs["attention_mask"].clone()
    mask[0, 0] = 0
    return {**inputs, "attention_mask": mask}


def twice(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, value]) for name, value in inputs.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, r"\['input_ids'\] must have the shape \[1, tokens\], not \[2, 45\]"),
        (hidden, r"\['attention_mask'\] hides tokens; exported graphs take no padding"),
        (lambda _: llava_inputs(9, 4, []), "hold no image or video"),
        (lambda inputs: {"pixel_values": inputs["pixel_values"]}, r"\['input_ids'\] must have the shape"),
    ],
    ids=["two prompts", "padding", "no image", "no tokens"],
)
def test_export_unsuitable_example(
    target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(target, tiny_llava(1), change(llava_inputs(5, 4, [0])))
    assert_no_files(target)


def test_export_batch_of_plain_torch_model(target: Path) -> None:
    shapes = {"input_ids": None, "pixel_values": None}
    with pytest.raises((ExportError, UnsupportedGraphError)):
        export(target, tiny_vlm(num_layers=1), twice(EXAMPLE), dynamic_shapes=shapes)
    assert_no_files(target)


@pytest.mark.parametrize(
    ("model", "example", "reason"),
    [
        (tiny_vlm(num_layers=1), {"input_ids": EXAMPLE["input_ids"]}, Reason.NO_MERGE),
        (tiny_vlm(num_layers=1, learned_positions=True), EXAMPLE, Reason.POSITION_IN_STREAM),
        (nn.Linear(3, 3), (torch.ones(1, 3),), Reason.NO_ATTENTION),
    ],
    ids=["no merge", "positions", "no attention"],
)
def test_export_unsupported_model(target: Path, model: nn.Module, example: Any, reason: Reason) -> None:
    with pytest.raises(UnsupportedGraphError) as refusal:
        export(target, model, example)
    assert refusal.value.reason is reason
    assert_no_files(target)


class Deciding(nn.Module):
    """Control flow depends on a value."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids if int(input_ids.sum()) else -input_ids


def test_export_untraceable_model(target: Path) -> None:
    with pytest.raises(ExportError, match=r"^torch cannot trace this Deciding: \w+: "):
        export(target, Deciding(), {"input_ids": EXAMPLE["input_ids"]})
    assert_no_files(target)


class Stopped(BaseException):
    """Raised in the middle of an export."""


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("is_there", [True, False], ids=["an empty directory", "no directory"])
def test_export_interrupted_leaves_no_files(
    target: Path, is_there: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def stop(self: Any, name: str, *_: Any) -> Any:
        folders.append(self._folder)
        raise error("in the middle")

    monkeypatch.setattr(writer.GraphWriter, "program", stop)
    if is_there:
        target.mkdir()
    with pytest.raises(error, match="in the middle"):
        export(target)
    assert folders[0].name.startswith(f".{target.name}-")
    assert folders[0].parent == target.parent
    assert list(target.parent.iterdir()) == ([target] if is_there else [])
    assert not is_there or list(target.iterdir()) == []


def test_export_failed_engine_leaves_no_files(
    target: Path, without_graphs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(manifest: Manifest, folder: Path, options: EngineOptions | None) -> Manifest:
        (folder / "prefill_cold.engine").write_bytes(b"half")
        raise ExportError("no such engine")

    monkeypatch.setattr(entry, "find_package", lambda name: None)
    monkeypatch.setattr(entry, "build_engines", fail)
    with pytest.raises(ExportError, match="no such engine"):
        export(target, format="tensorrt")
    assert without_graphs
    assert_no_files(target)


def test_failed_export_keeps_the_model(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llava(1)
    before = copy.deepcopy(model.state_dict())

    def stop(*_: Any) -> Any:
        raise Stopped

    monkeypatch.setattr(writer.GraphWriter, "program", stop)
    with pytest.raises(Stopped):
        export(target, model, llava_inputs(5, 4, [0]))
    assert_unchanged(model, before)


def assert_unchanged(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module.training for module in model.modules())
    assert "get_placeholder_mask" not in vars(getattr(model, "base_model", model))
    assert "forward" not in vars(model)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_export_keeps_the_model(llava: Exported, qwen: Exported, tiny: Exported) -> None:
    fresh = {"llava": tiny_llava(2), "qwen": tiny_qwen2_5_vl(2), "tiny": tiny_vlm(num_layers=3)}
    for exported in (llava, qwen, tiny):
        assert_unchanged(exported.model, fresh[exported.kind].state_dict())


@pytest.mark.parametrize("fails", [False, True])
def test_export_restores_training_mode(target: Path, without_graphs: list[Path], fails: bool) -> None:
    model = tiny_vlm(num_layers=1).train()
    model.encoder.eval()  # frozen
    before = {name: module.training for name, module in model.named_modules()}
    if fails:
        target.touch()
    with pytest.raises(ExportError) if fails else contextlib.nullcontext():
        export(target, model)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_export_creates_parents_and_readable_folder(tmp_path: Path, without_graphs: list[Path]) -> None:
    target = tmp_path / "some" / "where" / "exported"
    report = export(target)
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, "weights.bin"]
    assert list(target.parent.iterdir()) == [target]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert report.directory == str(target)
    assert report.files == {"weights.bin": 7}
    assert Manifest.load(target).files.keys() == {"weights.bin"}


@pytest.mark.parametrize("name", ["exported", "./exported", "."])
def test_export_into_empty_directory(
    tmp_path: Path, without_graphs: list[Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = tmp_path / name
    where.mkdir(exist_ok=True)
    export(Path(name))
    assert Manifest.load(where).files.keys() == {"weights.bin"}
    assert sorted(path.name for path in where.iterdir()) == [MANIFEST, "weights.bin"]


def test_export_directory_as_string(target: Path, without_graphs: list[Path]) -> None:
    vlcache_fx.export(tiny_vlm(num_layers=1), EXAMPLE, str(target))
    assert (target / MANIFEST).exists()


def test_export_reports_untraceable_encoder(half: Exported) -> None:
    (refused,) = half.report["refused"]
    assert refused["graph"] == "encoder"
    assert refused["reason"].startswith("torch cannot trace this")
    assert not (half.folder / "encoder.onnx").exists()
    assert half.manifest.encoders == ()
    with pytest.raises(ExportError, match="'pixel_values': this export has no image encoder"):
        OnnxSession(half.folder).prefill(**half.given([0]))


def test_session_without_encoder_needs_features(half: Exported) -> None:
    session = half.session(policy="full")
    (name,) = (name for name in session.manifest.inputs if name != "input_ids")
    for text, mode in ((0, "cold"), (1, "warm")):
        inputs = half.inputs([0], text)
        with torch.no_grad():
            (features,) = half.model.model.get_image_features(inputs.pop("pixel_values")).pooler_output
        assert_close(session.prefill(**inputs, **{name: features}), half.expected([0], text), half.atol)
        assert report_of(session)["mode"] == mode


def test_session_without_encoder_text_only(half: Exported) -> None:
    assert_close(half.session().prefill(**half.given([], 1)), half.expected([], 1), half.atol)


@dataclass(frozen=True)
class Seen(Pass):
    """Changes nothing; counts its runs."""

    name: ClassVar[str] = "seen"
    runs: list[str] = field(default_factory=list)

    def run(self, program: Program) -> bool:
        self.runs.append(str(program.facts is None))
        return False


def test_export_with_passes_has_keys_of_its_own(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session knows no passes: rows that they may have changed must not meet those of another export."""

    def save(self: Any, name: str, *_: Any) -> None:  # torch's converter takes seconds
        self._graphs[name] = GraphSpec(f"{name}.onnx", {}, {})
        (self._folder / f"{name}.onnx").touch()

    monkeypatch.setattr(writer.GraphWriter, "_save", save)
    before, steps = {"cleanup": "drop_noops", "cold": "restrict_rows", "warm": "restrict_rows"}, Seen()
    passes = tuple(InsertedPass(steps, pipeline, before=name) for pipeline, name in before.items())
    layouts = []
    for folder, options in ((target, {}), (target.with_name("other"), {"passes": passes})):
        export(folder, **options)
        layouts.append(Manifest.load(folder).decoder.layout)
    assert steps.runs == ["True", "False", "False"]
    assert layouts[1].startswith(f"{layouts[0]} ")

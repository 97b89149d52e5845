"""What the package requires, and which versions fit."""

from __future__ import annotations

import pytest

from vlcache_fx.doctor import packages
from vlcache_fx.doctor.check import Status
from vlcache_fx.doctor.requirements import Requirement, extras, of_extra, parse_requirement, requirements


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("torch>=2.11", Requirement("torch", ">=2.11", (), None)),
        ("numpy", Requirement("numpy", "", (), None)),
        ('ray[serve]<3,>=2.60; extra == "ray"', Requirement("ray", "<3,>=2.60", ("serve",), "ray")),
        ("pillow ; extra == 'demo'", Requirement("pillow", "", (), "demo")),
        ("a (>=1) ; python_version < '3.12' and extra == 'b'", Requirement("a", ">=1", (), "b")),
    ],
)
def test_parse_requirement(line: str, expected: Requirement) -> None:
    assert parse_requirement(line) == expected


@pytest.mark.parametrize(
    ("versions", "installed", "fits"),
    [
        ("", "0.1", True),
        (">=2.11", "2.13.0+cpu", True),
        (">=2.11", "2.9.1", False),
        ("==0.1.0", "0.1.0", True),
        ("==0.1.0", "0.1.1", False),
        (">=2.60,<3", "2.61", True),
        (">=2.60,<3", "3.0", False),
        ("!=1.5", "1.5", False),
        (">1,<=2", "2.0", True),
    ],
)
def test_versions_that_fit(versions: str, installed: str, fits: bool) -> None:
    assert Requirement("x", versions, (), None).fits(installed) is fits


def test_versions_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="cannot compare"):
        Requirement("x", "~=1.0", (), None).fits("1.0")


def test_every_requirement_of_this_package_can_be_checked() -> None:
    """So that no check of an extra raises."""
    found = requirements()
    assert {"torch", "typer"} <= {one.name for one in found if one.extra is None}
    for requirement in found:
        requirement.fits("1.0")
    for extra in extras():
        assert list(of_extra(extra, found))


def test_extras_of_this_package_are_followed() -> None:
    names = {one.name for one in of_extra("tensorrt", requirements())}
    assert {"tensorrt", "onnx", "onnxruntime"} <= names
    assert not any(name.startswith("vlcache") for name in names)


def test_check_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2; extra == 'here'", "no-such-package; extra == 'gone'", "torch>=99; extra == 'old'"]
    lines += ["torch; extra == 'half'", "no-such-package; extra == 'half'"]
    monkeypatch.setattr(packages, "requirements", lambda: tuple(map(parse_requirement, lines)))
    here, gone, old, half = (packages.check_extra(extra) for extra in ("here", "gone", "old", "half"))
    assert (here.status, here.advice) == (Status.OK, "")
    assert here.found.startswith("torch 2")
    assert (gone.status, gone.found) == (Status.OK, "not installed")
    assert gone.advice.startswith("pip install 'vlcache_fx[gone]'")
    assert (old.status, old.advice) == (Status.WARNING, "pip install 'vlcache_fx[old]'")
    assert "instead of torch>=99" in old.found
    assert half.found.startswith("not complete: no-such-package is missing; torch 2")


def test_check_package_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.check_package().status == Status.OK
    assert packages.check_torch().status == Status.OK
    lines = ["torch>=99", "no-such-package", "transformers>=99; extra == 'transformers'"]
    monkeypatch.setattr(packages, "requirements", lambda: tuple(map(parse_requirement, lines)))
    package, torch, transformers = (
        packages.check_package(),
        packages.check_torch(),
        packages.check_transformers(),
    )
    assert [check.status for check in (package, torch, transformers)] == [Status.FAILED] * 3
    assert "no-such-package is missing" in package.found
    assert torch.advice == "pip install 'torch>=99'"
    monkeypatch.setattr(Requirement, "installed", None)
    assert packages.check_transformers().status == Status.WARNING

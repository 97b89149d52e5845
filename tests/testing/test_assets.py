"""Locations, contents and licences of the models' files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from vlcache_fx.testing import assets
from vlcache_fx.testing.assets import PACKAGE, MissingAssetsError, find_assets

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples/models"
FILES = MODELS / PACKAGE


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Hide all assets: no distribution, no files next to the source, no checkout."""
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "lib/vlcache_fx/testing/assets.py"))
    monkeypatch.setattr(assets, "distribution", lambda name: Record(None))
    return tmp_path


class Record:
    """A distribution whose ``direct_url.json`` is ``text``."""

    def __init__(self, text: str | None) -> None:
        self.text = text

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.text


def test_find_assets_beside_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    monkeypatch.setattr(assets, "distribution", lambda name: Record(None))
    assert find_assets("reference_vlm") == FILES / "reference_vlm"


def test_find_assets_in_the_installed_distribution(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = nowhere / PACKAGE
    (package / "photo_vlm").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(nowhere)
    assert find_assets("photo_vlm") == package / "photo_vlm"


def test_find_assets_in_the_checkout_of_the_installation(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = nowhere / "a check out"
    (checkout / "examples/models" / PACKAGE / "photo_vlm").mkdir(parents=True)
    text = json.dumps({"url": checkout.as_uri(), "dir_info": {}})
    monkeypatch.setattr(assets, "distribution", lambda name: Record(text))
    assert find_assets("photo_vlm") == checkout / "examples/models" / PACKAGE / "photo_vlm"


@pytest.mark.parametrize("url", [None, "file:///nowhere/at/all", "https://example.org/a.whl"])
def test_find_assets_missing(nowhere: Path, monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    text = None if url is None else json.dumps({"url": url})
    monkeypatch.setattr(assets, "distribution", lambda name: Record(text))
    with pytest.raises(MissingAssetsError, match=r"pip install \./examples/models"):
        find_assets("reference_vlm")


def test_assets_are_small_and_no_pickles() -> None:
    paths = [path for path in FILES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) < 22e6
    assert not [path for path in paths if path.suffix in {".bin", ".pt", ".pkl"}]


def test_each_picture_has_a_licence() -> None:
    image = pytest.importorskip("PIL.Image")
    listed = json.loads((FILES / "photo_vlm/pictures.json").read_text(encoding="utf-8"))
    notice = (FILES / "NOTICE.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in notice if line.startswith("|")]
    licences = {
        cells[0].strip("`"): (int(cells[1]), cells[-1])
        for cells in rows
        if len(cells) == 5 and cells[1].isdigit()
    }
    for name, (count, licence) in licences.items():
        pictures = [one for one in listed["pictures"] if one["set"] == name]
        assert len(pictures) == count
        assert {one["licence"] for one in pictures} == {listed["sets"][name]["licence"]} == {licence}
    assert sum(count for count, _ in licences.values()) == len(listed["pictures"])
    with image.open(FILES / "photo_vlm/pictures.webp") as sheet:
        cells = sheet.width * sheet.height // 32**2
    assert len(listed["pictures"]) <= cells < len(listed["pictures"]) + sheet.width // 32


def test_each_file_has_a_line_in_the_notice() -> None:
    notice = (FILES / "NOTICE.md").read_text(encoding="utf-8")
    for path in FILES.glob("photo_vlm/*"):
        assert f"`photo_vlm/{path.name}`" in notice
    assert "`reference_vlm/*`" in notice
    assert "`hybrid_vlm/*`" in notice


LOAD = (
    "from vlcache_fx.testing import assets, reference_vlm\n"
    "assert '{site}' in assets.__file__, assets.__file__\n"
    "question = reference_vlm.make_questions(count=1)[0]\n"
    "model, processor = reference_vlm.load_model(), reference_vlm.load_processor()\n"
    "assert reference_vlm.answer_questions(model, processor, [question]) == [question.answer]\n"
    "print(assets.find_assets('reference_vlm'))"
)
FIND = "from vlcache_fx.testing import assets; print(assets.find_assets('reference_vlm'))"


@pytest.mark.slow
def test_models_load_after_plain_installations(tmp_path: Path) -> None:
    """From a checkout, with nothing else; then with ``vlcache_fx_models``."""
    pytest.importorskip("sklearn")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("vlcache_fx", "passes", "policies", "examples/models"):
        shutil.copytree(
            ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    (site,) = environment.glob("lib/*/site-packages")
    ours = [Path(path) for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(map(str, ours)) + "\n", encoding="utf-8")
    python = str(environment / "bin/python")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *command], capture_output=True, text=True, check=False, cwd=tmp_path)

    def pip(*command: str) -> None:
        plain = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
        done = run("-m", "pip", *command, *plain)
        assert done.returncode == 0, done.stdout + done.stderr

    load = LOAD.format(site=site)
    pip("install", "--ignore-installed", str(checkout))
    done = run("-c", load)
    assert done.stdout.strip() == str(checkout / "examples/models" / PACKAGE / "reference_vlm"), done.stderr
    pip("install", str(checkout / "examples/models"))
    done = run("-c", FIND)
    assert done.stdout.strip() == str(site / PACKAGE / "reference_vlm"), done.stderr

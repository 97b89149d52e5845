from pathlib import Path

import pytest

from vlcache_fx.bench.stress.folder_faults import FolderFaults, stored_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        path = tmp_path / "entries" / f"{number:02x}" / f"key-{number}.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes([number]) * 100)
    (tmp_path / "index.sqlite").write_bytes(b"index" * 100)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", FolderFaults(Path("/nowhere"), 0).faults)
def test_every_fault_changes_the_folder(folder: Path, fault: str) -> None:
    before, faults = contents(folder), FolderFaults(folder, 0)
    modes = {path: path.stat().st_mode for path in folder.rglob("*.safetensors")}
    assert faults.inject(fault) == fault
    if fault == "no permission":
        assert any(path.stat().st_mode != mode for path, mode in modes.items())
        faults.close()
        assert all(path.stat().st_mode & 0o600 for path in modes)
    else:
        assert contents(folder) != before
    assert stored_bytes(folder) <= 400


@pytest.mark.parametrize("fault", FolderFaults(Path("/nowhere"), 0).faults)
def test_faults_of_an_empty_folder(tmp_path: Path, fault: str) -> None:
    FolderFaults(tmp_path, 0).inject(fault)  # nothing is there: no error
    assert contents(tmp_path) == {}


def test_faults_in_place_can_be_left_out(folder: Path) -> None:
    assert not any("in place" in fault for fault in FolderFaults(folder, 0, in_place=False).faults)


def test_faults_depend_on_the_seed(folder: Path) -> None:
    first, second = (FolderFaults(folder, 7), FolderFaults(folder, 7))
    assert [first._draw.random() for _ in range(3)] == [second._draw.random() for _ in range(3)]


def test_stored_bytes(folder: Path) -> None:
    (folder / "damaged").mkdir()
    (folder / "damaged" / "x").write_bytes(b"123")
    assert stored_bytes(folder) == 403

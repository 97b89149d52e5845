"""The fixture for golden files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    # The copied conftest imports from `tests`, whose folder is not the current one.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_golden_files_are_compared_and_updated(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    test = tmp_path / "test_it.py"
    test.write_text("def test_it(golden):\n    golden('printed', 'one\\ntwo')\n")
    golden = tmp_path / "golden" / "printed.txt"

    missing = run(tmp_path)
    assert missing.returncode == 1
    assert "does not exist; run pytest --update-golden" in missing.stdout

    assert run(tmp_path, "--update-golden").returncode == 0
    assert golden.read_text() == "one\ntwo\n"
    assert run(tmp_path).returncode == 0

    golden.write_text("one\nthree\n")
    changed = run(tmp_path)
    assert changed.returncode == 1
    assert "- three" in changed.stdout
    assert golden.read_text() == "one\nthree\n"

"""The console script as a whole."""

import subprocess
import sys

import pytest

from .helpers import run

COMMANDS = ["version", "policies", "bench", "fidelity", "calibrate", "export", "store"]


def test_help_names_the_commands() -> None:
    output = run("--help")
    for name in COMMANDS:
        assert name in output


@pytest.mark.parametrize("arguments", [["--help"], ["version"], *([name, "--help"] for name in COMMANDS)])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom vlcache_fx.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

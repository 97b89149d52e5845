"""Build the distributions, and use the wheel as its users do: in an environment outside the checkout.

    python .ci/release_check.py [--output DIR]

Needs what ``make env`` installs. Prints what it found; exit status 1 if something must not be released.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from distributions import Built, ReleaseError, build_all, run

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ROOT / ".ci/installed.py"


def install(python: Path, *requirements: str | Path) -> None:
    """Install into an environment, with the versions of constraints.txt."""
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", *requirements)
    run(*pip, "check")


class Environment:
    """An environment, and a folder outside the checkout in which its programs run."""

    def __init__(self, work: Path) -> None:
        venv.create(work / "environment", with_pip=False, symlinks=True)
        self.bin = work / "environment/bin"
        self.folder = work / "elsewhere"
        self.folder.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.variables = {**kept, "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}

    def run(self, program: str, *arguments: str) -> str:
        """Run a program of the environment; return its standard output."""
        return run(self.bin / program, *arguments, cwd=self.folder, env=self.variables).strip()


def use(built: Built, work: Path) -> Iterator[str]:
    """Install the wheel and use it; yield a line for each thing that works."""
    environment = Environment(work)
    python = environment.bin / "python"
    install(python, built.wheel)
    printed = environment.run("vlcache", "--version")
    if printed != f"vlcache {built.version}":
        raise ReleaseError(f"vlcache --version prints {printed!r}")
    yield f"vlcache --version: {printed}"
    for script in ("installed.py", "own_model.py"):
        shutil.copy(INSTALLED if script == INSTALLED.name else ROOT / "examples" / script, environment.folder)
    yield environment.run("python", "installed.py", "entry_point")
    own_model = environment.run("python", "own_model.py").splitlines()
    if sum(": warm, hits [True]" in line for line in own_model) != 2:
        raise ReleaseError(f"examples/own_model.py reuses nothing: {own_model}")
    yield f"without transformers: {own_model[-1]}"

    # As docs/get-started.md says.
    install(python, f"{built.wheel}[transformers]", "scikit-learn", built.models)
    found = json.loads(environment.run("vlcache", "doctor", "--json"))
    yield f"vlcache doctor: {len(found['checks'])} checks, none failed; {found['checks'][-1]['found']}"
    shutil.copy(ROOT / "docs/get-started.md", environment.folder)
    yield environment.run("python", "installed.py", "get_started")


def main() -> None:
    """Check a release."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the wheels and the sdist, if all is well")
    output = parser.parse_args().output
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vlcache-release-") as folder:
        try:
            built = build_all(ROOT, Path(folder))
            for line in chain(built.found, use(built, Path(folder))):
                print(f"release: {line}", flush=True)
        except ReleaseError as error:
            sys.exit(f"release: {error}")
        if output is not None:
            shutil.copytree(built.wheel.parent, output, dirs_exist_ok=True)
    print(f"release: {built.version} can be released; checked in {time.monotonic() - begin_s:.0f} s")


if __name__ == "__main__":
    main()

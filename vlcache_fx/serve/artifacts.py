"""Programs that were compiled ahead of time: ``vlcache warm-up`` writes them, ``vlcache serve`` reads them.

The folder has Inductor's own cache, with the compiled kernels, and a manifest of what the kernels depend on.
A server with such a folder traces its models, finds every program in the cache, and compiles none::

    artifacts/
        artifacts.json      versions, device, threads, models
        inductor/           the cache

Kernels are machine code, and the cache has pickles: use only folders that you made yourself.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.environment import environment
from vlcache_fx.version import VERSION

MANIFEST, PROGRAMS = "artifacts.json", "inductor"
FORMAT = 1
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Manifest:
    """What artifacts were made with.

    Attributes:
        environment: what the kernels depend on, by name; all of it must be equal where they are used.
        num_threads: threads of torch, a constant in kernels for CPUs.
        models: the names that were served.
        num_programs: graphs that were compiled.
        format: version of the folder's layout.
    """

    environment: Mapping[str, str]
    num_threads: int
    models: tuple[str, ...] = ()
    num_programs: int = 0
    format: int = FORMAT

    @classmethod
    def here(cls, device: str, models: tuple[str, ...] = (), num_programs: int = 0) -> Manifest:
        """The manifest of artifacts that this process makes."""
        return cls(environment_of(device), torch.get_num_threads(), models, num_programs)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            OptionError: the folder has none, or one that cannot be read.
        """
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise OptionError(
                    f"the artifacts in {str(folder)!r} have format {found['format']!r}, not {FORMAT}: "
                    "make them again with vlcache warm-up"
                )
            return cls(
                {str(name): str(value) for name, value in found["environment"].items()},
                int(found["num_threads"]),
                tuple(map(str, found["models"])),
                int(found["num_programs"]),
            )
        except FileNotFoundError:
            raise OptionError(
                f"{str(folder)!r} has no {MANIFEST}: vlcache warm-up MODEL --output FOLDER makes artifacts"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"{str(path)!r} cannot be read: {error}") from error

    def write(self, folder: Path) -> None:
        """Write the manifest to a folder: last of all, so that a folder with one is complete."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, folder: Path, device: str) -> None:
        """Check that the artifacts were made in an environment like this one.

        Raises:
            OptionError: they were not; names each difference.
        """
        here = environment_of(device)
        names = sorted(here.keys() | self.environment.keys())
        differing = [
            f"{name} {self.environment.get(name)!r} (here {here.get(name)!r})"
            for name in names
            if here.get(name) != self.environment.get(name)
        ]
        if differing:
            raise OptionError(
                f"the artifacts in {str(folder)!r} were made with other versions or on another machine: "
                f"{', '.join(differing)}; make them here with vlcache warm-up"
            )


def environment_of(device: str) -> dict[str, str]:
    """What kernels for a device depend on, by name."""
    on_gpu = device.startswith("cuda")
    return {
        "vlcache_fx": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
    }


@contextmanager
def recording(folder: Path) -> Iterator[Path]:
    """Let Inductor's cache be in ``folder`` in the body; the caller writes the manifest.

    Raises:
        OptionError: the folder exists and is not empty, or cannot be made.
    """
    programs = folder / PROGRAMS
    try:
        if folder.exists() and any(folder.iterdir()):
            raise OptionError(f"the folder {str(folder)!r} is not empty: name a new one")
        programs.mkdir(parents=True)
    except OSError as error:
        raise OptionError(f"the folder {str(folder)!r} cannot be made: {error.strerror or error}") from error
    with _cache_in(programs.absolute()):
        yield folder


@contextmanager
def using(folder: Path, device: str) -> Iterator[Manifest]:
    """Let Inductor find the programs of ``folder`` in the body, in a private copy of its cache.

    Sets torch's number of threads to that of the artifacts: it is a constant in their kernels.

    Raises:
        OptionError: these are no artifacts, or they were made in another environment.
    """
    manifest = Manifest.read(folder)
    manifest.check(folder, device)
    num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="vlcache-artifacts-") as private:
        try:
            shutil.copytree(folder / PROGRAMS, private, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise OptionError(f"the artifacts in {str(folder)!r} cannot be copied: {error}") from error
        torch.set_num_threads(manifest.num_threads)
        try:
            with _cache_in(Path(private)):
                yield manifest
        finally:
            torch.set_num_threads(num_threads)


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    # A precompiled header would be looked for by preprocessing it: a call of the compiler in each process.
    config: Any = torch._inductor.config
    with environment({CACHE_VARIABLE: str(folder)}), config.patch(cpp_cache_precompile_headers=False):
        yield

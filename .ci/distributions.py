"""Builds the wheel and the sdist from a copy of the tree, and checks what is in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.metadata import Metadata

OUTSIDE = ("build/", "docs/", "examples/", "tests/")
"""Folders of the checkout that are in no distribution."""
IN_SDIST = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")


class ReleaseError(Exception):
    """A distribution must not be released."""


@dataclass(frozen=True)
class Built:
    """Distributions that passed the checks.

    Attributes:
        version: version of the package.
        wheel, models: the wheels of the package and of the test models.
        found: what was checked, in lines.
    """

    version: str
    wheel: Path
    models: Path
    found: tuple[str, ...]


def run(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command, in a folder and with variables if given; return its standard output.

    Raises:
        ReleaseError: it failed; the message has its output.
    """
    line = list(map(str, command))
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(line)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_tree(root: Path, target: Path) -> Path:
    """Copy the files that git knows or would add: what earlier builds left cannot get into new ones."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root)
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # not one that was removed and is still in the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def build(source: Path, target: Path, *kinds: str) -> list[Path]:
    """Build a project; without kinds an sdist, and a wheel from this sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", target, source)
    return sorted(target.iterdir())


def contents(archive: Path) -> dict[str, bytes]:
    """Return the files of a wheel or an sdist by name; those of an sdist without its folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    found = {}
    with tarfile.open(archive) as sdist:
        for member in sdist.getmembers():
            stream = sdist.extractfile(member)
            if stream is not None:
                found[member.name.partition("/")[2]] = stream.read()
    return found


def project_of(source: Path) -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))


def package_files(source: Path) -> dict[str, Path]:
    """Return the files that a wheel must have, by their names in it."""
    setuptools = project_of(source)["tool"]["setuptools"]
    files = {"vlcache_fx/py.typed": source / "vlcache_fx/py.typed"}
    for package in setuptools["packages"]:
        folders = {name for name in setuptools["package-dir"] if f"{package}.".startswith(f"{name}.")}
        root = max(folders, key=len)
        folder = source / setuptools["package-dir"][root] / package[len(root) + 1 :].replace(".", "/")
        for path in [*folder.glob("*.py"), *folder.glob("*.cpp")]:
            files[f"{package.replace('.', '/')}/{path.name}"] = path
    return files


def check_wheel(held: Mapping[str, bytes], source: Path) -> None:
    """Raise ``ReleaseError`` unless a wheel has the packages, unchanged, the licence, and nothing else."""
    expected = package_files(source)
    (info,) = {name.partition("/")[0] for name in held if ".dist-info/" in name}
    code = {name for name in held if not name.startswith(f"{info}/")}
    _raise_if("the wheel lacks", expected.keys() - code)
    _raise_if("the wheel should not have", code - expected.keys())
    _raise_if("changed in the wheel", {name for name in code if held[name] != expected[name].read_bytes()})
    if held.get(f"{info}/licenses/LICENSE") != (source / "LICENSE").read_bytes():
        raise ReleaseError("the wheel has no LICENSE")
    check_metadata(held[f"{info}/METADATA"], source)


def check_metadata(text: bytes, source: Path) -> None:
    """Raise ``ReleaseError`` unless metadata are valid and those of the project."""
    try:
        found = Metadata.from_email(text, validate=True)
    except ExceptionGroup as errors:
        raise ReleaseError(f"metadata: {'; '.join(map(str, errors.exceptions))}") from errors
    project, version = project_of(source)["project"], version_of(source)
    extras = {name.replace("_", "-") for name in project["optional-dependencies"]}
    pairs = {
        "version": (str(found.version), version),
        "licence": (str(found.license_expression), project["license"]),
        "Python": (str(found.requires_python), project["requires-python"]),
        "extras": (set(found.provides_extra or ()), extras),
        "type of the description": (found.description_content_type, "text/markdown"),
        "description": ((found.description or "").strip(), (source / "README.md").read_text("utf-8").strip()),
    }
    wrong = [f"{name}: {is_!r}, not {should!r}" for name, (is_, should) in pairs.items() if is_ != should]
    _raise_if("metadata", wrong)


def version_of(source: Path) -> str:
    """Return the version as the package's source has it."""
    text = (source / "vlcache_fx/version.py").read_text(encoding="utf-8")
    return text.partition('VERSION = "')[2].partition('"')[0]


def check_sdist(held: Mapping[str, bytes], source: Path) -> None:
    """Raise ``ReleaseError`` unless an sdist has what a wheel is built from, and no tests and examples."""
    needed = {str(path.relative_to(source)) for path in package_files(source).values()} | set(IN_SDIST)
    _raise_if("the sdist lacks", needed - held.keys())
    _raise_if("the sdist should not have", {name for name in held if name.startswith(OUTSIDE)})


def check_equal(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> None:
    """Raise ``ReleaseError`` unless two wheels have the same files."""
    _raise_if("in one of the wheels only", first.keys() ^ second.keys())
    _raise_if("differs between the wheels", {name for name in first if first[name] != second[name]})


def build_all(root: Path, work: Path) -> Built:
    """Build the distributions in ``work``, and check them.

    Raises:
        ReleaseError: a build failed, or a distribution is not as it should be.
    """
    source = copy_tree(root, work / "source")
    sdist, wheel = sorted(build(source, work / "dist"), key=lambda path: path.suffix == ".whl")
    (direct,) = build(source, work / "direct", "--wheel")
    held, archived = contents(wheel), contents(sdist)
    check_wheel(held, source)
    check_sdist(archived, source)
    check_equal(held, contents(direct))
    (models,) = build(source / "examples/models", work / "models", "--wheel")
    found = (
        f"{wheel.name}: {len(held)} files, {_size(wheel)}: all packages, the licence, valid metadata",
        f"{sdist.name}: {len(archived)} files, {_size(sdist)}; its wheel equals that of the checkout",
        f"{models.name}: {_size(models)}",
    )
    return Built(version_of(source), wheel, models, found)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"


def _raise_if(text: str, names: Any) -> None:
    if names:
        listed = sorted(names)
        more = f" and {len(listed) - 9} more" if len(listed) > 9 else ""
        raise ReleaseError(f"{text}: {', '.join(listed[:9])}{more}")

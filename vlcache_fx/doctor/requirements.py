"""What the installed package requires, and what of it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

PACKAGE = "vlcache_fx"
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^]]*)\])?\s*([^;]*)(?:;(.*))?")
EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")


@dataclass(frozen=True)
class Requirement:
    """A requirement of this package.

    Attributes:
        name: the required package.
        versions: valid versions, such as ``>=2.60,<3``; empty for any.
        extras: extras of the required package.
        extra: the extra of this package that requires it; None if it is always required.
    """

    name: str
    versions: str
    extras: tuple[str, ...]
    extra: str | None

    @property
    def installed(self) -> str | None:
        """The installed version; None if there is none."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return None

    def fits(self, installed: str) -> bool:
        """Return whether a version is a valid one."""
        return all(_fits(installed, clause) for clause in self.versions.split(",") if clause.strip())

    def __str__(self) -> str:
        return f"{self.name}{self.versions}"


def requirements() -> tuple[Requirement, ...]:
    """Return the requirements of the installed package.

    Raises:
        PackageNotFoundError: this package is not installed.
    """
    return tuple(parse_requirement(line) for line in requires(PACKAGE) or ())


def extras() -> tuple[str, ...]:
    """Return the names of the package's extras."""
    return tuple(metadata(PACKAGE).get_all("Provides-Extra") or ())


def parse_requirement(line: str) -> Requirement:
    """Parse a line such as ``ray[serve]<3,>=2.60; extra == "ray"``."""
    match = REQUIREMENT.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"not a requirement: {line!r}")
    name, own_extras, versions, marker = match.groups()
    found = EXTRA.search(marker or "")
    listed = tuple(extra.strip() for extra in (own_extras or "").split(",") if extra.strip())
    return Requirement(name, versions.strip().strip("()"), listed, None if found is None else found[1])


def of_extra(extra: str, all_of_them: tuple[Requirement, ...]) -> Iterator[Requirement]:
    """Yield what an extra requires; where it names an extra of this package, what that one requires."""
    for requirement in all_of_them:
        if requirement.extra != extra:
            continue
        if _normal(requirement.name) == _normal(PACKAGE):
            for other in requirement.extras:
                yield from of_extra(other, all_of_them)
        else:
            yield requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _fits(installed: str, clause: str) -> bool:
    # torch is always there; `packaging` need not be.
    from torch._vendor.packaging.version import Version

    match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([^\s*]+)\s*", clause)
    if match is None:
        raise ValueError(f"cannot compare versions with {clause!r}")
    found, bound = Version(Version(installed).public), Version(match[2])
    results = {
        ">=": found >= bound,
        "<=": found <= bound,
        "==": found == bound,
        "!=": found != bound,
        ">": found > bound,
        "<": found < bound,
    }
    return results[match[1]]

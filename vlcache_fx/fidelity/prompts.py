"""Pairs of prompts: the first records an item's donor, the second reuses it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

DATA_KEYS = {"images", "prompt", "answer"}


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt with its answer.

    Attributes:
        text: the prompt without its answer, with the processor's placeholder for every image.
        images: in the order of their placeholders.
        answer: the correct answer, used with teacher forcing.
    """

    text: str
    images: tuple[Image, ...]
    answer: str


@dataclass(frozen=True, eq=False)
class Case:
    """``donor`` is computed in full, then ``asked`` reuses its images.

    Attributes:
        family: kind of difficulty; results are reported per family.
        others: other prompts with the donor's images, for donors of several contexts.
    """

    family: str
    donor: Prompt
    asked: Prompt
    others: tuple[Prompt, ...] = ()


def read_cases(path: Path, family: str = "data") -> list[Case]:
    """Read cases from a file, one JSON object per line: ``images`` (paths), ``prompt``, ``answer``.

    Lines about the same images form cases: the first records the donors, each other line reuses them; the
    remaining ones are further contexts of donors. Paths are relative to the file.

    Raises:
        OptionError: the file cannot be read, a line is malformed, or no images recur.
    """
    from PIL import UnidentifiedImageError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the prompts {str(path)!r}: {error}") from error
    found: dict[tuple[str, ...], list[Prompt]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        names, data = _parse(line, f"{path}:{number}")
        same = found.setdefault(names, [])
        try:
            images = same[0].images if same else tuple(_open(path.parent / name) for name in names)
        except (OSError, UnidentifiedImageError) as error:
            raise OptionError(f"{path}:{number}: cannot read an image: {error}") from error
        same.append(Prompt(data["prompt"], images, data["answer"]))
    cases = [
        Case(family, donor, asked, tuple(other for other in rest if other is not asked))
        for donor, *rest in found.values()
        for asked in rest
    ]
    if not cases:
        raise OptionError(f"{path}: no two prompts have the same images: nothing can be reused")
    return cases


def _parse(line: str, location: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{location}: not JSON: {error}") from error
    if not isinstance(data, dict) or set(data) != DATA_KEYS:
        raise OptionError(f"{location}: expected an object with exactly {', '.join(sorted(DATA_KEYS))}")
    names = data["images"]
    listed = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not listed or not all(isinstance(data[key], str) and data[key] for key in ("prompt", "answer")):
        raise OptionError(
            f"{location}: images must be a list of paths, prompt and answer must be nonempty strings"
        )
    return tuple(names), data


def _open(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def batches(cases: Sequence[Case], size: int) -> list[list[Case]]:
    """Split cases into batches of one family each, in order."""
    if size < 1:
        raise OptionError(f"batch={size} is not valid: it must be at least 1")
    families: dict[str, list[Case]] = {}
    for case in cases:
        families.setdefault(case.family, []).append(case)
    return [own[at : at + size] for own in families.values() for at in range(0, len(own), size)]

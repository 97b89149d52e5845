"""Prompts from files."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.prompts import Case, Prompt, batches, read_cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def line(*images: str, **changes: Any) -> str:
    return json.dumps({"images": list(images), "prompt": "what is it ?", "answer": "a cat"} | changes)


def write(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_read_cases_groups_by_images(folder: Path) -> None:
    path = write(
        folder, line("a.png"), line("b.png"), "", line("a.png", prompt="and ?"), line("a.png", answer="no")
    )
    cases = read_cases(path)
    assert [(case.donor.text, case.asked.text) for case in cases] == [
        ("what is it ?", "and ?"),
        ("what is it ?", "what is it ?"),
    ]
    assert cases[0].asked.images is cases[0].donor.images
    assert [[other.answer for other in case.others] for case in cases] == [["no"], ["a cat"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"prompts\.jsonl:1: not JSON"),
        (["[]"], "expected an object with exactly answer, images, prompt"),
        ([line("a.png", more=1)], "exactly answer, images, prompt"),
        ([line("a.png", answer="")], "must be nonempty strings"),
        ([line()], "images must be a list of paths"),
        ([line("a.png"), line("c.png")], r"prompts\.jsonl:2: cannot read an image.*c\.png"),
        ([line("a.png"), line("b.png")], "no two prompts have the same images"),
    ],
)
def test_read_cases_bad_file(folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_cases(write(folder, *lines))


def test_read_cases_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read the prompts .*nowhere\.jsonl"):
        read_cases(tmp_path / "nowhere.jsonl")


def test_batches_of_one_family() -> None:
    prompt = Prompt("?", (), "!")
    cases = [Case(family, prompt, prompt) for family in "abab" + "b"]
    assert [[case.family for case in own] for own in batches(cases, 2)] == [["a", "a"], ["b", "b"], ["b"]]
    with pytest.raises(OptionError, match="batch=0 is not valid"):
        batches(cases, 0)

"""Stamps are classified by folder and caption, placed on boards, and counted."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

import numpy as np
from PIL import Image

from vlcache_fx.testing.photo_vlm.words import CLASSES

from .loading import load

STAMPS = {
    "animals/birds/owl": "An owl.",
    "animals/birds/cartoon/tux": "Tux, a bird.",
    "animals/mammals/deer/doe": "A doe.",
    "vehicles/auto/sedan": "A sedan car.",
    "vehicles/flight/747": "An airplane.",
    "vehicles/truckcar": "A truck behind a car.",
    "vehicles/tyre": "A tire.",
}


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    for index, (name, caption) in enumerate(STAMPS.items()):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (20, 10 + 30 * index), (200, 0, 0, 255)).save(path)
        path.with_suffix(".txt").write_text(f"{caption}\nde=etwas\n", encoding="utf-8")
    Image.new("RGBA", (9, 9)).save(tmp_path / "animals/birds/no_caption.png")
    return tmp_path


def test_main_asks_about_known_kinds(
    stamps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("ask_about_stamps")
    seen: list[Any] = []

    def say_bird(_model: Any, _processor: Any, questions: list[Any]) -> list[str]:
        seen.extend(questions)
        return ["bird"] * len(questions)

    monkeypatch.setattr(example, "load_model", lambda: None)
    monkeypatch.setattr(example, "load_processor", lambda: None)
    monkeypatch.setattr(example, "next_words", say_bird)
    counts = example.main(["--stamps", str(stamps)])
    # The bird without a caption counts by its folder; the drawing, the tire and the truck with a car do not.
    asked = {"bird": (2, 2), "deer": (0, 1), "car": (0, 1), "plane": (0, 1), "all": (2, 5)}
    assert counts == dict.fromkeys(CLASSES, (0, 0)) | asked
    assert "bird" in capsys.readouterr().out
    for question in seen:
        cell = question.text.split()[-1].rstrip("?")
        row, column = int(cell[1]) - 1, "ABCDEFGH".index(cell[0])
        assert CLASSES[question.boards[0][row, column]] == question.answer
        assert question.images[0].size == (256, 256)
        assert len(set(question.photo_ids[0].flatten().tolist())) == 4


def test_read_stamp_on_white(stamps: Path) -> None:
    example = load("ask_about_stamps")
    wide = example.read_stamp(stamps / "animals/birds/owl.png")  # 20 x 10 pixels
    assert wide.shape == (32, 32, 3)
    assert (wide[:7] == 255).all()
    assert (wide[9:23] == np.array([200, 0, 0])).all()


def test_find_stamps_too_few(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has 0 stamps of known kinds"):
        load("ask_about_stamps").main(["--stamps", str(tmp_path)])

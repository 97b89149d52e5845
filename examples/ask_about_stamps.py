"""Ask the photo VLM about pictures unlike its training data: captioned stamps of Tux Paint.

    python examples/ask_about_stamps.py --stamps /usr/share/tuxpaint/stamps

Debian's package tuxpaint-stamps-default contains them: cut-out photographs and drawings with captions in many
languages. They are GPL-2, so none is shipped here or used in training. Each stamp of a known kind fills one
cell of a 2 x 2 board, other stamps fill the rest, and the model is asked what that cell shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlcache_fx.testing.photo_vlm import Question, accuracy, load_model, load_processor, next_words
from vlcache_fx.testing.photo_vlm.pictures import PHOTO_PIXELS, ByteArray, board_image
from vlcache_fx.testing.photo_vlm.words import CLASSES, cell_name

NAMES: dict[str, tuple[str, ...]] = {
    "plane": ("airplane",),
    "car": ("car", "beetle"),
    "bird": ("birds",),
    "cat": ("cat", "cats"),
    "deer": ("deer",),
    "dog": ("dogs",),
    "frog": ("frog",),
    "horse": ("horse",),
    "ship": ("ship", "boat", "sailboat"),
    "truck": ("truck",),
}
"""Per kind, its folders and words of captions. The folder of cats contains lions and tigers, too."""

NOT_PHOTOS = {"cartoon", "toys", "symbols"}
GRID = 2


def kind_of(path: Path, caption: str) -> str | None:
    """Return the kind of a stamp from its relative path and English caption; None if it is unknown."""
    folders = set(path.parts[:-1])
    if folders & NOT_PHOTOS:
        return None
    words = folders | {word.strip(".,!").lower() for word in caption.split()}
    kinds = [kind for kind in CLASSES if words & set(NAMES[kind])]
    return kinds[0] if len(kinds) == 1 else None


def read_stamp(path: Path) -> ByteArray:
    """Read a stamp on a white square, resized like the photographs: ``[32, 32, 3]``."""
    with Image.open(path) as opened:
        stamp = opened.convert("RGBA")
    side = max(stamp.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
    size = (PHOTO_PIXELS, PHOTO_PIXELS)
    return np.asarray(square.convert("RGB").resize(size, Image.Resampling.BOX))


def find_stamps(folder: Path) -> list[tuple[str, ByteArray]]:
    """Return kinds and pictures of the stamps of known kinds under ``folder``.

    Raises:
        SystemExit: too few stamps for a board.
    """
    found = []
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").splitlines()[:1] if text.is_file() else []
        kind = kind_of(path.relative_to(folder), "".join(caption))
        if kind is not None:
            found.append((kind, read_stamp(path)))
    if len(found) < GRID**2:
        raise SystemExit(
            f"{folder} has {len(found)} stamps of known kinds (PNG files with captions); "
            f"at least {GRID**2} are needed"
        )
    return found


def ask_about(stamps: Sequence[tuple[str, ByteArray]], seed: int) -> list[Question]:
    """Ask one question about each stamp, on a board with three others."""
    rng = np.random.default_rng(seed)
    questions = []
    for index, (kind, _) in enumerate(stamps):
        others = rng.choice(np.delete(np.arange(len(stamps)), index), size=GRID**2 - 1, replace=False)
        cell = int(rng.integers(GRID**2))
        chosen = np.insert(others, cell, index).reshape(GRID, GRID)
        board = np.array([[stamps[stamp][1] for stamp in line] for line in chosen])
        questions.append(
            Question(
                family="cell",
                question_first=False,
                system_prompt="You are a helpful assistant.",
                text=f"What is in {cell_name(*divmod(cell, GRID))}?",
                images=(board_image(board),),
                answer=kind,
                boards=(np.array([[CLASSES.index(stamps[stamp][0]) for stamp in line] for line in chosen]),),
                photo_ids=(chosen.astype(np.int64),),
            )
        )
    return questions


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Ask and print; return ``(correct, asked)`` per kind, and for ``"all"``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stamps", type=Path, required=True, help="folder of PNG pictures with captions")
    parser.add_argument("--seed", type=int, default=0, help="seed of the boards")
    options = parser.parse_args(argv)
    questions = ask_about(find_stamps(options.stamps), options.seed)
    words = next_words(load_model(), load_processor(), questions)
    table, counts = Table("stamps", "correct", "of"), {}
    for kind in (*CLASSES, "all"):
        of_kind = [i for i, question in enumerate(questions) if kind in ("all", question.answer)]
        asked = [questions[i] for i in of_kind]
        right = round(accuracy([words[i] for i in of_kind], asked) * len(asked)) if asked else 0
        counts[kind] = (right, len(asked))
        table.add_row(kind, str(right), str(len(asked)))
    Console().print(table)
    return counts


if __name__ == "__main__":
    main()

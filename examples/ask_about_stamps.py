"""Ask the photo VLM about pictures unlike those that it was trained on: captioned stamps of Tux Paint.

    python examples/ask_about_stamps.py --stamps /usr/share/tuxpaint/stamps

Debian's package tuxpaint-stamps-default has them: cut-out photographs and drawings with captions in many
languages. They are GPL-2, so none is shipped here, and none was trained on. Each stamp of a known kind is put
into one cell of a board of 2 x 2, other stamps into the others, and the model is asked what that cell shows.
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
"""Per kind, folders and words of captions that say it. The folder of cats has lions and tigers, too."""

NOT_PHOTOS = {"cartoon", "toys", "symbols"}
GRID = 2


def kind_of(path: Path, caption: str) -> str | None:
    """The kind of a stamp ``path`` (relative to the folder of all) with its English ``caption``, or None."""
    folders = set(path.parts[:-1])
    if folders & NOT_PHOTOS:
        return None
    said = folders | {word.strip(".,!").lower() for word in caption.split()}
    kinds = [kind for kind in CLASSES if said & set(NAMES[kind])]
    return kinds[0] if len(kinds) == 1 else None


def read_stamp(path: Path) -> ByteArray:
    """A stamp on a white square, as small as the photographs are: ``[32, 32, 3]``."""
    with Image.open(path) as opened:
        stamp = opened.convert("RGBA")
    side = max(stamp.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
    size = (PHOTO_PIXELS, PHOTO_PIXELS)
    return np.asarray(square.convert("RGB").resize(size, Image.Resampling.BOX))


def find_stamps(folder: Path) -> list[tuple[str, ByteArray]]:
    """Kinds and pictures of the stamps under ``folder`` whose kind is known.

    Raises:
        SystemExit: there are too few to fill a board.
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
            f"{folder} has {len(found)} stamps of known kinds (PNG with a caption beside it); "
            f"at least {GRID**2} are needed"
        )
    return found


def ask_about(stamps: Sequence[tuple[str, ByteArray]], seed: int) -> list[Question]:
    """One question about each stamp, behind a board on which three others lie beside it."""
    rng = np.random.default_rng(seed)
    questions = []
    for index, (kind, _) in enumerate(stamps):
        others = rng.choice(np.delete(np.arange(len(stamps)), index), size=GRID**2 - 1, replace=False)
        place = int(rng.integers(GRID**2))
        chosen = np.insert(others, place, index).reshape(GRID, GRID)
        board = np.array([[stamps[one][1] for one in line] for line in chosen])
        questions.append(
            Question(
                family="cell",
                question_first=False,
                system_prompt="You are a helpful assistant.",
                text=f"What is in {cell_name(*divmod(place, GRID))}?",
                images=(board_image(board),),
                answer=kind,
                boards=(np.array([[CLASSES.index(stamps[one][0]) for one in line] for line in chosen]),),
                photo_ids=(chosen.astype(np.int64),),
            )
        )
    return questions


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Ask and print; returns per kind, and for ``"all"``, how many answers were right, and of how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stamps", type=Path, required=True, help="folder of PNG pictures with captions")
    parser.add_argument("--seed", type=int, default=0, help="of the boards")
    options = parser.parse_args(argv)
    questions = ask_about(find_stamps(options.stamps), options.seed)
    words = next_words(load_model(), load_processor(), questions)
    table, counts = Table("stamps", "right", "of"), {}
    for kind in (*CLASSES, "all"):
        of_kind = [i for i, one in enumerate(questions) if kind in ("all", one.answer)]
        asked = [questions[i] for i in of_kind]
        right = round(accuracy([words[i] for i in of_kind], asked) * len(asked)) if asked else 0
        counts[kind] = (right, len(asked))
        table.add_row(kind, str(right), str(len(asked)))
    Console().print(table)
    return counts


if __name__ == "__main__":
    main()

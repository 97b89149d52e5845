"""Takes the pictures of the page of ``vlcache explain``: ``python docs/figures/explain.py``.

The page shows measured times: take them on an idle machine. Needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from vlcache_fx.cli.explain import explain
from vlcache_fx.explaining.style import CSS

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
PAGE_SIZE, LAYER_SIZE = (1280, 1170), (1200, 815)
COLOURS = 128


def layer_of(page: str) -> str:
    """The page without all but the section of its layer.

    Raises:
        ValueError: there is none.
    """
    begin = page.index("<h2>Layer ")
    end = page.index("<h2>", begin + 1)
    style = f'<meta charset="utf-8"><style>{CSS}</style>'
    return f"<!DOCTYPE html>{style}<main>{page[begin:end]}</main>"


def picture_of(page: Path, size: tuple[int, int], output: Path, browser: str, *, is_dark: bool) -> None:
    """Write the top of a page as a picture of few colours."""
    scheme = 0 if is_dark else 1
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "page.png"
        width, height = size
        subprocess.run(
            [
                browser,
                *QUIET,
                f"--user-data-dir={folder}/profile",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--window-size={width},{height}",
                f"--screenshot={taken}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        with Image.open(taken) as picture:
            picture.convert("RGB").crop((0, 0, *size)).quantize(COLOURS).save(output, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    """Explain a question to the reference model, and take the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the pictures")
    parser.add_argument("--page", type=Path, help="a page that is there, instead of a new one")
    given = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: the pictures of the page need one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        page, layer = Path(folder) / "page.html", Path(folder) / "layer.html"
        if given.page is None:
            explain("reference", html=page)
        else:
            shutil.copy(given.page, page)
        layer.write_text(layer_of(page.read_text(encoding="utf-8")), encoding="utf-8")
        picture_of(page, PAGE_SIZE, given.output / "explain.png", browser, is_dark=False)
        picture_of(layer, LAYER_SIZE, given.output / "explain-layer.png", browser, is_dark=True)


if __name__ == "__main__":
    main()

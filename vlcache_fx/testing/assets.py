"""Finds the files of the models in ``vlcache_fx.testing``, which are not part of this package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vlcache_fx.errors import VlcacheError

PACKAGE = "vlcache_fx_models"
IN_CHECKOUT = Path("examples/models") / PACKAGE


class MissingAssetsError(VlcacheError, ImportError):
    """The files of a model are not installed."""


def find_assets(model: str) -> Path:
    """Return the folder of files of ``model``: ``"reference_vlm"``, ``"hybrid_vlm"`` or ``"photo_vlm"``.

    Searches, in order: the installed distribution ``vlcache_fx_models``; the checkout of this file; the
    checkout from which ``vlcache_fx`` was installed (PEP 610).

    Raises:
        MissingAssetsError: the files are in none of these.
    """
    for folder in _folders():
        if (folder / model).is_dir():
            return folder / model
    raise MissingAssetsError(
        f"the files of {model} are not installed; in a checkout of vlcache_fx: pip install ./examples/models"
    )


def _folders() -> Iterator[Path]:
    spec = find_spec(PACKAGE)
    if spec is not None:
        yield from map(Path, spec.submodule_search_locations or ())
    yield Path(__file__).resolve().parents[2] / IN_CHECKOUT
    source = _installed_from()
    if source is not None:
        yield source / IN_CHECKOUT


def _installed_from() -> Path | None:
    """Return the argument of ``pip install FOLDER``, or None."""
    try:
        record = distribution("vlcache_fx").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    url = urlsplit(json.loads(record)["url"]) if record else None
    return Path(url2pathname(url.path)) if url is not None and url.scheme == "file" else None

"""What models are loaded from."""

from __future__ import annotations

from pathlib import Path

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.models import NAMED, check_name


def check_sources(models: tuple[str, ...]) -> dict[str, str]:
    """The name of each model in requests, and what it is loaded from.

    Raises:
        OptionError: there is no such model, or two have one name.
    """
    found: dict[str, str] = {}
    for model in models:
        name, equals, folder = model.partition("=")
        if not equals:
            name, folder = model, model
        check_name(folder)
        if folder not in NAMED:
            if "@" in folder or "," in folder:
                raise OptionError(
                    f"the folder {folder!r} cannot be served: rename it to have no @ and no comma"
                )
            name = name if equals else Path(folder).resolve().name
        if not name or ":" in name:
            raise OptionError(
                f"the name {name!r} of a model is not valid: it must not be empty or contain ':'"
            )
        if name in found:
            raise OptionError(f"two models are named {name!r}: name them with NAME=FOLDER")
        found[name] = folder
    return found

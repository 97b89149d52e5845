"""What models are loaded from."""

from __future__ import annotations

from pathlib import Path

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.models import NAMED


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
        if folder not in NAMED:
            if not Path(folder).is_dir():
                named = ", ".join(NAMED)
                raise OptionError(
                    f"no model {folder!r}: it must be one of {named}, or a folder of a transformers model"
                )
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

"""Loads and compiles models by name or folder, with their prompts, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import vlcache_fx
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.prompts import Case, read_cases
from vlcache_fx.fidelity.questions import FAMILIES, make_cases
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.integrations.transformers_output import without_bars

NAMED: Mapping[str, str] = {
    "reference": "vlcache_fx.testing.reference_vlm",
    "photo": "vlcache_fx.testing.photo_vlm",
    "hybrid": "vlcache_fx.testing.hybrid_vlm",
}
"""Vision-language models with questions of their own."""

STUDIED: Mapping[str, str] = {**NAMED, "smollm2": "vlcache_fx.testing.smollm2"}
"""Those, and a model of text whose passages are items."""


def load_subject(model: str, positions: int | None, options: Mapping[str, Any]) -> Subject:
    """The model, compiled with ``options`` (``dynamic`` and on top of it), and its processor.

    Shows no bars of transformers: commands and studies have their own.

    Args:
        model: a name, or a folder.
        positions: maximum number of answer tokens; None for those of the model's own answers, or else 1.
        options: of ``vlcache_fx.compile``.

    Raises:
        OptionError: see ``load_model``.
    """
    with without_bars():
        loaded, processor = load_model(model, STUDIED)
    if positions is None:
        source = import_module(STUDIED[model]) if model in STUDIED else None
        positions = getattr(source, "ANSWER_TOKENS", 1)
    return Subject(model, vlcache_fx.compile(loaded, dynamic=True, **options), processor, positions)


def load_model(model: str, names: Mapping[str, str] = NAMED) -> tuple[Any, Any]:
    """The model as it is, and its processor; ``model`` is one of ``names``, or a folder.

    Raises:
        OptionError: there is no such name or folder, or its model cannot be loaded.
    """
    check_name(model, names)
    if model not in names:
        return _from_folder(model)
    source = import_module(names[model])
    return source.load_model(), source.load_processor()


def check_name(model: str, names: Collection[str] = tuple(NAMED)) -> None:
    """Raise OptionError if there is neither a model nor a folder of this name."""
    if model not in names and not Path(model).is_dir():
        raise OptionError(
            f"no model {model!r}: it must be one of {', '.join(names)}, or a folder of a transformers model"
        )


def _from_folder(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    load: Callable[..., Any] = AutoProcessor.from_pretrained
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(model, local_files_only=True)
        return loaded.train(False), load(model, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise OptionError(f"cannot load the model in {model!r}: {error}") from error


def load_cases(
    model: str,
    data: Path | None,
    families: tuple[str, ...],
    count: int,
    *,
    split: str,
    seed: int,
    contexts: int = 1,
) -> list[Case]:
    """Load cases from a file, or make ``count`` of each family of the model's questions.

    Each case has prompts for donors of up to ``contexts``; those of a file have as many as there are.

    Raises:
        OptionError: an unknown model or family, or neither a file nor questions of the model.
    """
    check_name(model, STUDIED)
    if data is not None:
        return read_cases(data)
    if model not in STUDIED:
        raise OptionError(f"{model!r} has no questions: pass prompts with --data")
    source: Any = import_module(STUDIED[model])
    try:
        return [
            case
            for family in families or FAMILIES
            for case in make_cases(source, family, count, split=split, seed=seed, contexts=contexts)
        ]
    except ValueError as error:  # more questions than a model has, for one
        raise OptionError(str(error)) from error

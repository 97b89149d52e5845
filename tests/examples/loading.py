"""Loads examples, which are scripts, by path."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlcache_fx.testing import reference_vlm

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """Load ``examples/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shorten(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Let examples load the first layers of the reference model alone: each takes seconds to trace."""
    model: Any = reference_vlm.load_model()
    model.model.language_model.layers = model.model.language_model.layers[:layers]
    model.config.text_config.num_hidden_layers = layers
    monkeypatch.setattr(reference_vlm, "load_model", lambda: copy.deepcopy(model))

"""The public names, and the cost of importing the package."""

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import vlcache_fx
from vlcache_fx import errors

PUBLIC = {
    "CopyError",
    "DamagedEntryError",
    "Engine",
    "EngineOptions",
    "EngineSession",
    "ExportError",
    "InsertedPass",
    "LoweringError",
    "NoCompilerError",
    "OnnxSession",
    "OptionError",
    "Options",
    "PassError",
    "PlanError",
    "PolicyError",
    "Reason",
    "SlotError",
    "StoreClosedError",
    "StoreError",
    "UnreadableWeightsError",
    "UnsupportedGraphError",
    "VlcacheError",
    "__version__",
    "compile",
    "compile_exported",
    "engine_for",
    "export",
    "gate",
    "mark_spans",
}


def test_all_public_names() -> None:
    # A removal or rename breaks users and belongs in the changelog.
    assert set(vlcache_fx.__all__) == PUBLIC == set(dir(vlcache_fx))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name: str) -> None:
    value = getattr(vlcache_fx, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_errors_are_public() -> None:
    own = {
        name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__
    }
    assert own <= PUBLIC


def test_other_names_are_not_public() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlcache_fx.nothing  # type: ignore[attr-defined]


def test_version_of_distribution() -> None:
    assert version("vlcache_fx") == vlcache_fx.__version__


@pytest.mark.parametrize(
    "statement",
    ["import vlcache_fx", "from vlcache_fx import Options, VlcacheError; Options.parse({'budget': 1})"],
)
def test_import_does_not_import_torch(statement: str) -> None:
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

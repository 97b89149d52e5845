"""``warm_up``, and a server with its artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.lowering.disk_cache import Compilations
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.serve.artifacts import Manifest
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.server import Server
from vlcache_fx.serve.warm_up import warm_up

from ..runtime.helpers import own_compiler_state
from .serving import running


def test_eager_programs_need_no_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples run all programs, also the one that fits donors, whatever ``exact_returns`` says."""
    built, runs = [], ProgramRunner.run
    monkeypatch.setattr(
        ProgramRunner, "run", lambda self, *given: built.append(self.name) or runs(self, *given)
    )
    engine = {"lowering": "eager", "donor_rank": 8, "exact_returns": 5}
    with own_compiler_state():
        manifest = warm_up(ServeOptions(("reference",), engine=engine, batch_size=1), tmp_path / "artifacts")
    assert {*built} == {"cold", "warm", "fitted"}
    assert manifest.num_programs == 0
    assert Manifest.read(tmp_path / "artifacts") == manifest


def test_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="cannot load the model"):
        warm_up(ServeOptions((str(tmp_path / "empty"),)), tmp_path / "artifacts")


def test_server_refuses_other_artifacts_before_it_loads(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="vlcache warm-up"):
        Server(ServeOptions(("reference",), port=0, artifacts=tmp_path))


@pytest.mark.thorough  # a process of its own finds a program in test_artifacts.py
def test_server_compiles_nothing(tmp_path: Path) -> None:
    options = ServeOptions(("reference",), port=0, batch_size=1)
    with own_compiler_state():
        manifest = warm_up(options, tmp_path / "artifacts")
    assert manifest.num_programs > 5
    with own_compiler_state():
        programs = Compilations()
        with running(ServeOptions(("reference",), port=0, batch_size=1, artifacts=tmp_path / "artifacts")):
            pass
        assert (programs.num_compiled, programs.num_found) == (0, manifest.num_programs)

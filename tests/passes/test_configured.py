"""Pipelines with the options ``passes`` and ``dump_graphs``, through ``vlcache_fx.compile``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import vlcache_fx
from vlcache_fx import InsertedPass, Options
from vlcache_fx.errors import OptionError
from vlcache_fx.passes import Pass, Program
from vlcache_fx.passes.configured import DUMP_VARIABLE, Pipelines, configured
from vlcache_fx.passes.standard import WARM
from vlcache_fx.spec.slots import Donor
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import with_api

FIRST, SECOND = tiny_vlm_inputs(5, 6, [(24, 0)]), tiny_vlm_inputs(3, 8, [(24, 0)], text_seed=1)


@dataclass(frozen=True)
class Scale(Pass):
    """Scales donors."""

    factor: float
    name: ClassVar[str] = "scale"
    requires: ClassVar[frozenset[str]] = frozenset({"hoisted"})

    def run(self, program: Program) -> bool:
        for slot, node in program.slots.items():
            if isinstance(slot, Donor):
                with program.graph.inserting_before(next(iter(node.users))):
                    scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, self.factor))
                node.replace_all_uses_with(
                    scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled
                )
        return True


def scaling(factor: float) -> list[InsertedPass]:
    return [InsertedPass(Scale(factor), "warm", after="hoist_lookups")]


def test_configured_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DUMP_VARIABLE, raising=False)
    assert configured(Options()) == Pipelines()


def test_configured_inserts_by_name() -> None:
    names = [step.name for step in configured(Options.parse({"passes": scaling(1.0)})).warm.passes]
    assert names[names.index("scale") - 1] == "hoist_lookups"
    assert len(names) == len(WARM.passes) + 1


@pytest.mark.parametrize(
    ("inserted", "message"),
    [
        (
            InsertedPass(Scale(1.0), "hot", after="trim_tail"),
            "'hot'; the pipelines are: cleanup, cold, warm, decode",
        ),
        (
            InsertedPass(Scale(1.0), "decode", before="trim_tail"),
            "'decode': no pass is named 'trim_tail'; "
            "the passes are: write_in_place, tag_segments, declare_inputs",
        ),
    ],
)
def test_compile_lists_the_valid_names(inserted: InsertedPass, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        vlcache_fx.compile(tiny_vlm(num_layers=1), passes=[inserted])


def test_compile_with_a_pass_of_the_user() -> None:
    """The pass changes reused rows, and its donors are separate from those of other passes."""
    store, off = MemoryStore(1 << 30), {}
    for name, passes in (("none", []), ("same", scaling(1.0)), ("zero", scaling(0.0)), ("again", [])):
        pair = with_api(tiny_vlm(num_layers=1), policy="none", store=store, passes=passes)
        first = pair.run(**FIRST)[1]["mode"]
        off[name], report = pair.run(**SECOND)
        assert report["mode"] == "warm"
        assert first == ("warm" if name == "again" else "cold")
    assert off["none"] == off["same"] == off["again"]
    assert abs(off["zero"] - off["none"]) > 1e-3


def test_compile_with_a_pass_in_wrong_order(caplog: pytest.LogCaptureFixture) -> None:
    """A wrong order is found when a graph is compiled; the model runs unmodified, with a reason."""
    inserted = [InsertedPass(Scale(1.0), "warm", before="hoist_lookups")]
    pair = with_api(tiny_vlm(num_layers=1), passes=inserted)
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        off, report = pair.run(**FIRST)
    assert (off, report["mode"]) == (0.0, "bypass")
    assert "'scale': requires hoisted" in caplog.text


def dumped(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.py"))


@pytest.mark.parametrize("how", ["option", "variable"])
def test_compile_dumps_graphs(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dump_graphs": tmp_path} if how == "option" else {}
    if how == "variable":
        monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    with_api(tiny_vlm(num_layers=1), **options).run(**FIRST)
    files = dumped(tmp_path)
    folders = {name.partition("/")[0] for name in files}
    assert {name.partition("_")[2] for name in folders} == {"cleanup", "cold", "warm"}
    (warm,) = (name for name in folders if name.endswith("_warm"))
    names = [name.partition("/")[2] for name in files if name.startswith(warm)]
    # The third pass, carry_states, finds no recurrent layer.
    assert names[:4] == ["00_before.py", "01_insert_lookups.py", "02_splice_rows.py", "04_record_donors.py"]
    before, after = ((tmp_path / warm / name).read_text(encoding="utf-8") for name in names[1:3])
    added = set(after.splitlines()) - set(before.splitlines())
    assert sum("torch.ops.vlcache.splice_rows" in line for line in added) == 2

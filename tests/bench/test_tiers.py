"""Times by tier of a tiny model: rows, tiers and a new process. Times are not checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlcache_fx.bench.new_process import Answers, Task
from vlcache_fx.bench.page_cache import drop_page_cache
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.tier_table import TierRow, TiersResult, cells, markdown, remarks, table
from vlcache_fx.bench.tiers import MOONCAKE, NEW_PROCESS, measure_tiers

from ..runtime.helpers import own_compiler_state


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[TiersResult, list[Task]]:
    asked: list[Task] = []

    def ask(task: Task) -> Answers:
        asked.append(task)
        return Answers([0.5, 0.25, 0.75], ["file"], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlcache_fx.bench.tiers.ask_new_process", ask)
        patch.setattr("vlcache_fx.testing.mooncake_cluster.missing", lambda: "needs a package")
        result = measure_tiers(
            find_preset("tiny"),
            120,
            2,
            tmp_path_factory.mktemp("tiers"),
            donor_dtypes=("int8",),
            dtype="float32",
            lowering="eager",
        )
    return result, asked


def test_every_tier_is_timed(measured: tuple[TiersResult, list[Task]]) -> None:
    result, _ = measured
    tiers = ["memory", "file, warm page cache", "file, cold page cache"]
    tiers += ["memory, int8 donors", "file, int8 donors"]
    expected = ["plain", "cold", "cold, from pixels", *tiers, "memory, from pixels", NEW_PROCESS]
    assert [row.name for row in result.rows] == expected
    assert {len(row.seconds) for row in result.rows[:-1]} == {2}
    assert result.missing == {MOONCAKE: "needs a package"}
    donors = {row.name: row.donor_bytes for row in result.rows}
    assert 0 < donors["memory, int8 donors"] < donors["memory"] == donors["file, warm page cache"]


def test_new_process_is_asked(measured: tuple[TiersResult, list[Task]]) -> None:
    result, (task,) = measured
    assert (task.images, task.dtype, task.options["lowering"]) == (3, "float32", "eager")
    assert task.options["store"].startswith("file:///")
    row = result.row(NEW_PROCESS)
    assert row is not None
    assert row.summary.median == 0.5


def test_result_as_data_and_tables(measured: tuple[TiersResult, list[Task]]) -> None:
    result, _ = measured
    assert json.loads(json.dumps(dataclasses.asdict(result)))["vision_tokens"] == 120
    assert table(result).row_count == len(list(cells(result))) == len(result.rows) + 1
    text = markdown(result)
    assert "| mooncake on loopback | missing | needs a package |" in text
    assert all(line in text for line in remarks(result))


def test_ratios() -> None:
    rows = [TierRow("plain", [8.0]), TierRow("cold", [6.0]), TierRow("memory", [1.0, 3.0])]
    rows.append(TierRow("file", [4.0], "memory", "cold"))
    made = dataclasses.replace(RESULT, rows=rows)
    assert made.ratio("file", "memory") == 2.0
    assert made.ratio("file", "nowhere") is None
    assert list(cells(made))[3] == ("file", "4,000 ms", "4,000 to 4,000", "2.00x", "1.50x", "2.00x")


RESULT = TiersResult(None, "tiny", "float32", None, 1, 2, [], {}, [])  # type: ignore[arg-type]


def test_drop_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert 0.0 <= drop_page_cache([path]) <= 1.0
    assert path.read_bytes() == bytes(1 << 20)
    assert drop_page_cache([]) == 0.0

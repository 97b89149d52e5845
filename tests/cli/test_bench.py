"""``vlcache bench``."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcache_fx.cli import app

from ..bench.quick import quick_rates, quick_rounds
from .helpers import run

QUICK = ("bench", "--preset", "tiny", "--lowering", "eager", "--no-compile-time", "--rounds", "1")


@pytest.fixture
def quick() -> Iterator[None]:
    with quick_rounds(), quick_rates():
        yield


@pytest.mark.usefixtures("quick")
def test_bench_tables_record_and_picture(tmp_path: Path) -> None:
    output = run(
        *QUICK,
        *("--vision-tokens", "24", "--dtype", "float32", "--device", "cpu", "--store-entries", "10"),
        *("--budget", "0.02", "--budget", "0.2", "--output-dir", str(tmp_path / "new")),
    )
    for text in ("Time to first token", "unmodified, torch.compile", "Steps of a warm call", "bench.png"):
        assert text in output
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "new" / "bench.json").read_text(encoding="utf-8"))
    assert record["model"] == "tiny"
    assert record["dtype"] == "float32"
    assert [one["entries"] for one in record["lookups"]] == [10]
    assert [one["vision_tokens"] for one in record["encoder"]] == [24]
    (measured,) = record["points"]
    lines = (tmp_path / "new" / "points.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [measured]
    point = measured["point"]
    warm = ["warm layer_aware 2 % memory://", "warm layer_aware 20 % memory://"]
    assert {"eager", "plain", "cold", *warm} <= set(point["seconds"])
    assert [run["report"]["mode"] for run in point["warm"].values()] == ["warm", "warm"]
    assert set(measured["bounds"]) == {"cold", *warm}
    assert measured["bounds"]["cold"]["seconds"] > measured["bounds"][warm[0]]["seconds"] > 0
    assert measured["hash"]["nbytes"] == 24 * 128 * 4


@pytest.mark.usefixtures("quick")
def test_bench_as_json(tmp_path: Path) -> None:
    """Stdout has the record that is written, and no table."""
    arguments = ("--vision-tokens", "24", "--dtype", "float32", "--device", "cpu", "--store-entries", "10")
    result = CliRunner().invoke(
        app, [*QUICK, *arguments, "--no-encoder", "--output-dir", str(tmp_path), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert "Time to first token" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "preset='huge' is not valid"),
        (("--dtype", "int3"), "dtype='int3' is not valid"),
        (("--device", "abacus"), "device='abacus' is not valid"),
        (("--config", "/nowhere.json"), "cannot be read"),
        (("--policy", "guess"), "guess"),
        (("--budget", "7"), "budget=7.0 is not valid"),
        (("--store", "tape://"), "store='tape://' is not valid"),
        (("--lowering", "magic"), "lowering='magic' is not valid"),
        (("--rounds", "0"), "rounds=0 must be positive"),
        (("--model-class", "Thing"), "needs config"),
        (("--layers", "0"), "layers=0 is not valid"),
        (("--text-before", "40"), "must differ"),
        (("--images", "0"), "images=0 is not valid"),
    ],
)
def test_bench_bad_arguments(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, [*QUICK, "--output-dir", str(tmp_path), *arguments])
    assert result.exit_code == 1
    assert "error: " in result.output
    assert message in result.output


def test_bench_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, [*QUICK])
    assert result.exit_code == 1
    assert "vlcache bench needs transformers, pillow, scikit-learn, scikit-image, matplotlib" in result.output

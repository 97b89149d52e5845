import json
from pathlib import Path

import pytest

from ..bench.quick import quick_rates, quick_rounds
from .loading import load


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of third parties; the test is about output
def test_demo_reuses_pictures_and_writes_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with quick_rounds(), quick_rates():  # tests/bench has measurements
        load("demo").main(["--tiny", "--questions", "1", "--families", "cell", "--output-dir", str(tmp_path)])
    record = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    (asked,) = record["answers"]
    assert [one["mode"] for one in asked] == ["cold", "warm", "warm"]
    assert [one["hit"] for one in asked] == [False, True, True]
    assert [one["encoder_hit"] for one in asked] == [False, True, True]
    assert all(0 < one["token_layer_fraction"] <= 0.05 for one in asked[1:])
    assert asked[0]["answer"] == asked[0]["full"]
    (score,) = record["scores"]
    assert (score["family"], score["cold"], score["warm"]) == ("cell", 1, 2)
    (measured,) = record["bench"]["points"]
    point = measured["point"]
    report = point["warm"]["warm"]["report"]
    assert set(point["seconds"]) == {"eager", "plain", "cold", "warm", "floor"}
    assert report["mode"] == "warm"
    assert 0 < report["token_layer_fraction"] <= 0.05
    assert point["floor_rows"]["floor"] == report["rows_per_layer"][0] < point["num_tokens"]
    assert report["spans"][0]["start"] == point["starts"][1] != point["starts"][0]
    assert point["cold_difference"] < 0.05
    printed = capsys.readouterr().out
    assert "cell" in printed
    assert "plain / warm" in printed

"""The example that starts a server and asks it; tests/serve/test_server.py lets it ask a server that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlcache_fx.testing.reference_vlm import make_questions

from .loading import load


@pytest.mark.slow
@pytest.mark.thorough
def test_it_starts_a_server(tmp_path: Path) -> None:
    record = tmp_path / "terminal.svg"
    answers = load("ask_the_server").main("--lowering", "eager", "--batch-size", "1", record=record)
    assert {answer.text for answer in answers} == {make_questions(count=1)[0].answer}
    assert [answer.cached_tokens > 0 for answer in answers] == [False, True, True]
    assert "serving" in record.read_text()


def test_a_server_that_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="the server ended"):
        load("ask_the_server").main("--lowering", "nothing")
    assert "nothing" in capsys.readouterr().out

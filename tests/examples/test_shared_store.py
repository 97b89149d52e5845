import pytest

from vlcache_fx.testing.mooncake_cluster import missing

from .loading import load


@pytest.mark.thorough
def test_the_second_worker_computes_no_prompt_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    if missing():
        pytest.skip(missing())
    answers = load("shared_store").main()
    assert [(answer.worker, answer.mode) for answer in answers] == [
        (0, "cold"),
        (0, "warm"),
        (1, "warm"),
        (1, "warm"),
    ]
    assert answers[2].tier == "mooncake"
    assert len({answer.text for answer in answers}) == 1
    assert "donor from" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("shared_store")
    monkeypatch.setattr(example, "missing", lambda: "needs libnuma.so.1")
    with pytest.raises(SystemExit, match=r"needs libnuma.so.1"):
        example.main()

"""All systems run the same step. Times are not checked."""

import pytest

from vlcache_fx.bench import decoding
from vlcache_fx.bench.decoding import EAGER, PLAIN, VLCACHE, Decoding, main


@pytest.mark.parametrize("room", [0, pytest.param(7, marks=pytest.mark.thorough)])
def test_main_times_every_system(
    room: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, found = decoding.measure_decoding, []

    def recording(*given: object) -> Decoding:
        found.append(measure(*given))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(decoding, "measure_decoding", recording)
    main("tiny", 120, 2, "eager", room)
    (result,) = found
    assert list(result.seconds) == [EAGER, PLAIN, VLCACHE]
    assert 0 < result.ratio.low <= result.ratio.median <= result.ratio.high
    assert result.num_tokens > 120
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed[:4]] == [*result.seconds, "torch.compile / vlcache"]
    cache = ", static cache with room for 7 more" if room else ""
    assert printed[4].startswith(f"one token after {result.num_tokens - 1}{cache}; tiny, bfloat16; ")

import pytest

from vlcache_fx.bench.report import first_line, milliseconds, system_name


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2345, "1,234 ms"), (0.0123, "12.3 ms"), (0.00005, "0.05 ms")]
)
def test_milliseconds_digits(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_system_name_labels() -> None:
    assert system_name("plain") == "unmodified, torch.compile"
    assert system_name("warm") == "vlcache, seen before (warm)"
    assert system_name("warm first_k 2 % memory://") == "vlcache, seen before (warm) first_k 2 % memory://"
    assert system_name("floor of 64 rows") == "floor: prefix hit, same rows of 64 rows"


def test_first_line_of_reason() -> None:
    assert first_line("no\nbecause") == "no"

"""Stop strings in text that arrives in parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.serve.stop_strings import StopStrings, cut_at_stop

TEXT = st.text("ab.", max_size=12)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3)


@given(parts=st.lists(TEXT, max_size=8), stops=STOPS)
def test_parts_equal_whole(parts: list[str], stops: list[str]) -> None:
    """However the text is cut into parts, what is passed on is the text before a stop string."""
    found = StopStrings(stops)
    passed = "".join(found.feed(part) for part in parts)
    is_found = found.is_found
    passed += found.finish()
    # A complete stop string ends the answer, even if a longer one that began earlier could still come.
    whole = "".join(parts)
    assert is_found == any(stop in whole for stop in stops)
    if not is_found:
        assert passed == whole
    else:
        assert whole.startswith(passed)
        assert not any(stop in passed for stop in stops)
        rest = whole[len(passed) :]
        assert any(rest.startswith(stop) for stop in stops)


def test_text_is_held_back_only_where_a_stop_string_may_begin() -> None:
    stops = StopStrings(["END"])
    assert stops.feed("an E") == "an "
    assert stops.feed("N") == ""
    assert stops.feed("t") == "ENt"
    assert stops.feed(" END more") == " "
    assert stops.feed("more") == ""
    assert stops.finish() == ""


def test_cut_at_stop() -> None:
    assert cut_at_stop("one two three", ["three", " two"]) == "one"
    assert cut_at_stop("one", []) == "one"
    assert cut_at_stop("one", ["x", ""]) == "one"

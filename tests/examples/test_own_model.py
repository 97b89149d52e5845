"""A model in plain torch is reused, with a merge in its graph and with marked spans."""

from .loading import load


def test_both_ways_are_reused() -> None:
    assert load("own_model").main() == [
        "new image: cold, hits [False], 76 of 76 rows",
        "same image, moved: warm, hits [True], 24 of 82 rows",
        "marked, new image: cold, hits [False], 76 of 76 rows",
        "marked, same image, moved: warm, hits [True], 24 of 82 rows",
    ]

"""A model in plain torch, with a merge in its graph and with marked spans."""

from .loading import load


def test_own_model_reuses_both_ways() -> None:
    assert load("own_model").main() == [
        "new image: cold, hits [False], 76 of 76 rows",
        "same image, moved: warm, hits [True], 24 of 82 rows",
        "marked, new image: cold, hits [False], 76 of 76 rows",
        "marked, same image, moved: warm, hits [True], 24 of 82 rows",
    ]

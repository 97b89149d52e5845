"""A model in plain torch is reused, with a merge in its graph and with marked spans."""

import importlib.util
from pathlib import Path


def test_both_ways_are_reused() -> None:
    path = Path(__file__).parents[2] / "examples/own_model.py"
    spec = importlib.util.spec_from_file_location("own_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == [
        "new image: cold, hits [False], 76 of 76 rows",
        "same image, moved: warm, hits [True], 24 of 82 rows",
        "marked, new image: cold, hits [False], 76 of 76 rows",
        "marked, same image, moved: warm, hits [True], 24 of 82 rows",
    ]

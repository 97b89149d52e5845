"""Errors of ``vlcache export``; ``tests/deploy/`` tests the exporter."""

from pathlib import Path

import pytest

from .helpers import failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no model 'nowhere': it must be one of reference, photo, hybrid, or a folder"),
        (
            ["reference", "--dtype", "int3"],
            "dtype 'int3' is not valid: it must be one of float32, float16, bfloat16",
        ),
        (["reference", "--data", "no.jsonl"], "cannot read the prompts 'no.jsonl'"),
    ],
)
def test_export_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    model, *options = arguments
    assert message in failure("export", model, str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()

"""Errors of ``vlcache fidelity``; ``tests/fidelity/test_reference.py`` runs it."""

import pytest

from .helpers import failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no model 'nowhere': it must be one of reference, photo, hybrid, smollm2, or a folder"),
        (["reference", "--policy", "best"], "unknown policy 'best'"),
        (["reference", "--budget", "2"], "budget=2.0 is not valid: it must be in [0, 1]"),
        (["reference", "--family", "two"], "family='two' is not valid"),
        (["reference", "--profile", "no.json"], "cannot read the profile 'no.json'"),
    ],
)
def test_fidelity_bad_arguments(arguments: list[str], message: str) -> None:
    assert message in failure("fidelity", *arguments)

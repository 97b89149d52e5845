"""The reference model under test, compiled once."""

import pytest

import vlcache_fx
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.testing import reference_vlm


@pytest.fixture(scope="session")
def subject() -> Subject:
    model = vlcache_fx.compile(reference_vlm.load_model(), lowering="eager", dynamic=True, strict=True)
    return Subject("reference", model, reference_vlm.load_processor(), positions=1)

from typing import Any

import pytest
import torch

from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.systems import Systems, Variant, outlives_process
from vlcache_fx.errors import OptionError, PolicyError
from vlcache_fx.policies.uniform import Uniform

TWO = (Variant("first_k", 0.25), Variant("uniform", 0.5))


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(find_preset("tiny"), torch.float32, torch.device("cpu"))


def test_one_compiled_model_serves_all_variants(model: Any) -> None:
    systems = Systems(model, "eager", TWO)
    systems.prepare_warm(TWO[0])
    first = systems.engine.store
    assert systems.engine.options.budget == 0.25
    systems.prepare_warm(TWO[1])
    assert systems.engine.options.budget == 0.5
    assert systems.engine.settings.current.policy == Uniform()
    assert systems.engine.store is first  # one store per URL
    systems.prepare_cold()
    assert systems.engine.store is not first
    systems.close()


def test_a_report_that_is_not_there_is_an_error(model: Any) -> None:
    systems = Systems(model, "eager", [Variant()])
    with pytest.raises(MeasurementError, match="without its engine"):
        systems.report()


def test_a_variant_that_cannot_be_is_refused(model: Any) -> None:
    with pytest.raises(PolicyError, match="nobody"):
        Systems(model, "eager", [Variant("nobody")])
    with pytest.raises(OptionError, match="budget"):
        Systems(model, "eager", [Variant(budget=2)])
    with pytest.raises(OptionError, match="store="):
        Systems(model, "eager", [Variant(store="ftp://")])


def test_labels_tell_variants_apart() -> None:
    assert TWO[0].label == "first_k 25 % memory://"


def test_only_stores_with_a_place_outlive_the_process() -> None:
    assert outlives_process("file:///donors")
    assert not outlives_process("memory://")
    assert not outlives_process("host://")

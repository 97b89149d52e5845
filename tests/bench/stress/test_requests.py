import itertools

import pytest

from vlcache_fx.bench.stress.requests import IMAGES, MODELS, SALTS, draw_calls, make_pool
from vlcache_fx.bench.stress.settings import FaultRates, StressSettings
from vlcache_fx.errors import OptionError


def test_pool_is_reproducible_and_images_recur() -> None:
    pool = make_pool(3)
    assert pool == make_pool(3) != make_pool(4)
    assert {prompt.model for prompt in pool} == set(MODELS)
    assert pool[: len(pool) // 2] == make_pool(3, MODELS[:1])
    shown = [image for prompt in pool for image in prompt.images]
    assert set(shown) == set(range(IMAGES))
    assert len(shown) > 4 * IMAGES


def test_calls_are_reproducible() -> None:
    pool = make_pool(0)
    drawn = [list(itertools.islice(draw_calls(pool, "a", 0.5, 0.1, 0.1), 300)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {call.salt for call in drawn[0]} == set(SALTS)
    assert {call.clears for call in drawn[0]} == {"", "all", "salt"}
    assert 100 < sum(call.policy == "full" for call in drawn[0]) < 200
    assert any(call.reopens for call in drawn[0])
    assert next(draw_calls(pool, "b", 0.5, 0.1, 0.1)) != drawn[0][0]


def test_settings_as_json() -> None:
    settings = StressSettings(("memory://",), models=("tiny",), rates=FaultRates(timeout=0.5))
    assert StressSettings.from_json(settings.as_json()) == settings


@pytest.mark.parametrize("bad", [{"stores": ()}, {"threads": 0}, {"seconds": 0}])
def test_bad_settings(bad: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(bad))):
        StressSettings(**{"stores": ("memory://",)} | bad)  # type: ignore[arg-type]

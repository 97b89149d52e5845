"""Settings of single requests, and salts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.request import check_api_key, combined_salt, read_settings, tenant_of

SALTS = st.text(max_size=5)


def read(value: Any, tenant: str = "", server_salt: str = "") -> Any:
    return read_settings(value, tenant=tenant, server_salt=server_salt)


def test_settings_reach_the_engine() -> None:
    engine = ServingEngine(Options(lowering="eager"))
    settings = read({"budget": 0.5, "policy": "uniform", "salt": "s"})
    with settings.using(engine):
        current = engine.settings.current
    assert (current.budget, current.policy.name) == (0.5, "uniform")
    assert current.salt == settings.salt != ""
    assert engine.settings.current.budget == engine.options.budget
    engine.close()


def test_no_settings_are_those_of_the_server() -> None:
    assert read(None) == read({}) == read({"budget": None, "bypass": False})
    assert read(None).salt is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "vlcache must be an object with budget, policy, bypass, salt"),
        ({"bugdet": 1}, "vlcache has no 'bugdet': it has budget"),
        ({"budget": 2}, "budget=2"),
        ({"budget": "much"}, "budget='much'"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"policy": ["uniform"]}, "policy"),
        ({"bypass": 1}, "bypass=1 is not valid: it must be true or false"),
        ({"salt": 7}, "salt=7"),
    ],
)
def test_bad_settings_are_refused(value: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(value)
    assert caught.value.status == 400
    assert message in caught.value.message


@given(st.tuples(SALTS, SALTS, SALTS), st.tuples(SALTS, SALTS, SALTS))
def test_salts_are_equal_only_for_equal_parts(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    one, other = combined_salt(*first), combined_salt(*second)
    if one is not None and other is not None:
        assert (one == other) == (first == second)
    assert (one is None) == (first[1:] == ("", ""))


def test_a_salt_cannot_be_that_of_another_tenant() -> None:
    victim = read(None, tenant=tenant_of("victim")).salt
    for own in (victim, tenant_of("victim"), "victim", ""):
        assert read({"salt": own}, tenant=tenant_of("thief")).salt != victim
        assert read({"salt": own}).salt != victim


def test_bypass_has_a_salt_of_its_own() -> None:
    settings = read({"bypass": True})
    assert settings.with_own_salt().salt != settings.with_own_salt().salt
    assert settings == read({"bypass": True})  # so that such requests run together


def test_api_keys() -> None:
    check_api_key("", ())
    check_api_key("b", ("a", "b"))
    for wrong in ("", "c", "ab", "a ", "\ud800"):
        with pytest.raises(RequestError) as caught:
            check_api_key(wrong, ("a", "b"))
        assert caught.value.status == 401
    assert tenant_of("") == ""
    assert "key" not in tenant_of("key")

"""Discovery of policies through entry points."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import Policy, get_policy, known_policies, registry, uniform
from vlcache_fx.policies.cacheblend import CacheBlend
from vlcache_fx.policies.uniform import Uniform
from vlcache_fx.testing.policy_contract import check_policy

ROOT = Path(__file__).parents[2]


def with_entries(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, registry.GROUP) for name, value in entries]
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in found if e.group == group])


def test_known_policies_match_files() -> None:
    files = {path.stem for path in (ROOT / "policies").glob("*.py")} - {
        "__init__",
        "base",
        "profile",
        "registry",
    }
    assert files == {n for n, e in known_policies().items() if e.module.startswith("vlcache_fx.")}


@pytest.mark.parametrize("name", sorted(known_policies()))
def test_get_policy_by_name(name: str) -> None:
    assert get_policy(name).name == name


def test_get_policy_returns_object() -> None:
    policy = Uniform()
    assert get_policy(policy) is policy


def test_get_policy_unknown_name() -> None:
    with pytest.raises(
        PolicyError, match=r"unknown policy 'unifrom'; known policies are: auto, cacheblend, .*uniform"
    ):
        get_policy("unifrom")


def test_known_policies_name_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entries(monkeypatch, ("mine", "a:A"), ("mine", "b:B"))
    with pytest.raises(PolicyError, match="two policies are named 'mine': a:A and b:B"):
        known_policies()


def test_known_policies_same_entry_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ("mine", "vlcache_fx.policies.uniform:Uniform")
    with_entries(monkeypatch, entry, entry)
    assert get_policy("mine") == Uniform()


@pytest.mark.parametrize("value", ["no_such_module:Policy", "json:NoSuchName", "math:pi"])
def test_get_policy_load_failure(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with_entries(monkeypatch, ("broken", value))
    with pytest.raises(PolicyError, match="policy 'broken'"):
        get_policy("broken")


def test_get_policy_of_other_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolicyError, match="not a policy"):
        get_policy(3)  # type: ignore[arg-type]
    with_entries(monkeypatch, ("mine", "builtins:dict"))
    with pytest.raises(PolicyError, match="not a subclass of Policy"):
        get_policy("mine")


@pytest.mark.parametrize("package", ["policies", "passes"])
def test_top_level_import_is_refused(package: str) -> None:
    command = [sys.executable, "-c", f"import {package}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"vlcache_fx.{package}" in done.stderr
    assert "ImportError" in done.stderr


@dataclass(frozen=True)
class Earlier(Uniform):
    """A policy of the earlier interface of several arguments."""

    name: ClassVar[str] = "earlier"

    def select(self, span_length: int, num_layers: int, profile: Any, budget: float) -> Any:  # type: ignore[override]
        return ()


@dataclass(frozen=True)
class EarlierProbing(CacheBlend):
    """A probing policy of the earlier interface."""

    def choose(self, deviation: Any, num_layers: int, profile: Any, budget: float) -> Any:  # type: ignore[override]
        return ()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Earlier(),
            r"policy 'earlier' \(.*Earlier\): select\(span_length.*select\(self, span\), with span.length",
        ),
        (EarlierProbing(), r"choose\(deviation.*choose\(self, span\), with span.deviation"),
    ],
)
def test_get_policy_earlier_interface(policy: Policy, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        get_policy(policy)
    with pytest.raises(AssertionError, match=message):
        check_policy(policy)


def test_get_policy_earlier_interface_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniform, "Uniform", Earlier)
    with_entries(monkeypatch, ("earlier", "vlcache_fx.policies.uniform:Uniform"))
    with pytest.raises(PolicyError, match="written for an earlier interface; select now takes one object"):
        get_policy("earlier")

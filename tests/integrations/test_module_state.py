"""The digest of a module's state changes with everything that affects its computation."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.integrations.module_state import ModuleState
from vlcache_fx.integrations.object_graph import SMALL_BYTES

FACTOR = 2
TABLE = {"scale": 1.0}


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR * TABLE["scale"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.norm(self.linear(x)) + self.offset)


class Config:
    def __init__(self) -> None:
        self.layer, self.names = -1, ["a", "b"]


class Owner(nn.Module):
    """Has an encoder, and a submodule that the encoder does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.language, self.config, self.lock = Block(), Config(), threading.Lock()
        self.last: Any = None
        self.table = torch.ones(3)

    def encode(self, x: Tensor) -> Tensor:
        with self.lock:
            for block in self.blocks:
                x = block(x)
        return x[self.config.layer] * self.table.sum()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.language(x)
        return self.encode(x)


def state(owner: Owner) -> ModuleState:
    return ModuleState(owner, owner.encode, weights=lambda: list(owner.parameters()))


def hook(factor: float) -> Callable[..., Any]:
    return lambda module, args, output: output * factor


def patched(self: Any, x: Tensor) -> Tensor:
    return x + 1


# Which weights there are, in which order and of which dtype, is said by their fingerprint.
CHANGES: dict[str, Callable[[Owner], Any]] = {
    "epsilon": lambda o: setattr(o.blocks[1].norm, "eps", 1e-2),
    "hook": lambda o: o.blocks[0].register_forward_hook(hook(2)),
    "another hook": lambda o: o.blocks[0].register_forward_hook(hook(3)),
    "pre-hook": lambda o: o.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "replaced forward": lambda o: setattr(o.blocks[0], "forward", functools.partial(patched, o.blocks[0])),
    "replaced module": lambda o: o.blocks.__setitem__(0, nn.Identity()),
    "one module more": lambda o: o.blocks.append(Block()),
    "configuration": lambda o: setattr(o.config, "layer", -2),
    "list in the configuration": lambda o: o.config.names.append("c"),
    "training": lambda o: o.train(False),
    "plain tensor": lambda o: o.table.mul_(2),
    "class": lambda o: setattr(o.blocks[0], "__class__", type("Other", (Block,), {"forward": patched})),
    "replaced method": lambda o: setattr(o, "encode", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_detects_changes(change: str) -> None:
    owner = Owner()
    known = state(owner)
    before = known.digest()
    assert before is not None
    assert known.digest() == before
    CHANGES[change](owner)
    roots = (owner, owner.encode)
    after = known.digest() if change != "replaced method" else ModuleState(*roots).digest()
    assert after not in (before, None)


def test_digest_distinguishes_changes() -> None:
    digests = []
    for change in CHANGES.values():
        owner = Owner()
        change(owner)
        digests.append(ModuleState(owner, owner.encode, weights=lambda o=owner: [*o.parameters()]).digest())
    assert len(set(digests)) == len(CHANGES)


@pytest.mark.parametrize("name", ["FACTOR", "scaled", "TABLE"])
def test_digest_includes_globals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    known = state(owner)
    before = known.digest()
    if name == "TABLE":
        monkeypatch.setitem(TABLE, "scale", 2.0)
    else:
        monkeypatch.setitem(globals(), name, {"FACTOR": 3, "scaled": lambda x: x}[name])
    assert known.digest() != before
    monkeypatch.undo()
    assert known.digest() == before


def test_digest_includes_class_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    known = state(owner)
    before = known.digest()
    monkeypatch.setattr(Block, "forward", patched)
    assert known.digest() != before


def test_digest_of_equal_modules() -> None:
    assert state(Owner()).digest() == state(Owner()).digest() is not None


def test_digest_excludes_unread_attributes() -> None:
    """Models store results in attributes, and decoders have hooks."""
    owner = Owner()
    known = state(owner)
    before = known.digest()
    owner.last = torch.ones(2)
    owner.language.register_forward_hook(hook(2))
    assert known.digest() == before


@pytest.mark.parametrize("value", [open, torch.ones(SMALL_BYTES)], ids=["a file", "a large tensor"])
def test_digest_of_unknown_state(value: Any) -> None:
    owner = Owner()
    if value is open:
        with open(__file__) as file:
            owner.config = file  # type: ignore[assignment]
            assert state(owner).digest() is None
    else:
        owner.table = value
        assert state(owner).digest() is None

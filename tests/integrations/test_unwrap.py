"""Wrappers, models that cannot be compiled, and copies of compiled models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vlcache_fx
from vlcache_fx.errors import CopyError, OptionError
from vlcache_fx.integrations.unwrap import unwrap_model
from vlcache_fx.testing.tiny_vlm import tiny_vlm


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def generate(self) -> None:
        pass

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class Wrapper(nn.Module):
    """A wrapper like DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Adapted(Wrapper):
    def get_base_model(self) -> nn.Module:
        return self.module.module if isinstance(self.module, Wrapper) else self.module

    def forward(self, x: Any = None, **kwargs: Any) -> Any:
        return self.module(x, **kwargs)


def test_unwrap_model_of_wrappers() -> None:
    model = Model()
    for wrapped in (model, Wrapper(model), Wrapper(Wrapper(model)), Adapted(Wrapper(model))):
        assert unwrap_model(wrapped) is model
    layers = Wrapper(nn.Linear(2, 2))
    assert unwrap_model(layers) is layers
    assert unwrap_model(nn.Sequential(model)) is not model


def in_place() -> nn.Module:
    model = Model()
    model.compile()
    return model


def forward_alone() -> nn.Module:
    model = Model()
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    return model


def scripted() -> nn.Module:
    scripted: nn.Module = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    return scripted


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (lambda: "hello", "'hello'"),
    "nothing": (lambda: None, "None"),
    "a function": (lambda: lambda x: x, "function"),
    "a method": (lambda: Model().forward, "method"),
    "a class": (lambda: Model, "Model"),
    "TorchScript": (scripted, "TorchScript"),
    "compiled": (lambda: torch.compile(Model()), "compiled by torch.compile already"),
    "compiled in place": (in_place, "compiled by model.compile"),
    "with a compiled forward": (forward_alone, "compiled by torch.compile already"),
    "compiled in a wrapper": (lambda: Wrapper(torch.compile(Model())), "compiled"),
    "compiled by us": (lambda: vlcache_fx.compile(Model()), "compiled already"),
    "compiled by us in a wrapper": (lambda: Wrapper(vlcache_fx.compile(Model())), "compiled already"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_unwrap_model_rejects_other_objects(make: Callable[[], Any], message: str) -> None:
    value = make()
    with pytest.raises(OptionError, match=message) as raised:
        vlcache_fx.compile(value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())]
)
def test_refuse_copies(copied: Callable[[Any], Any]) -> None:
    model = vlcache_fx.compile(tiny_vlm(num_layers=1), lowering="eager")
    for module in (model, Wrapper(model)):
        with pytest.raises(CopyError, match=r"is compiled .* before vlcache_fx.compile"):
            copied(module)
        if copied is copy.copy:
            break  # a shallow copy of a wrapper does not copy the model
    plain = tiny_vlm(num_layers=1)
    plain.load_state_dict(model.state_dict())
    copied(plain)

"""The listed tensors are a module's current tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vlcache_fx.integrations.module_tensors import ModuleTensors
from vlcache_fx.keys import WeightsFingerprint


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2))])
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.layers[0].weight  # tied
        self.missing = None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda _: None,
    "a parameter replaced": lambda model: setattr(model.layers[0], "weight", nn.Parameter(torch.zeros(3, 3))),
    "a parameter gone": lambda model: setattr(model.layers[0], "bias", None),
    "a buffer added": lambda model: model.layers[2].register_buffer("scale", torch.ones(1)),
    "a module replaced": lambda model: setattr(model, "head", nn.Linear(3, 4)),
    "a module replaced within": lambda model: model.layers[2].__setitem__(0, nn.Linear(1, 1)),
    "a module added": lambda model: model.layers[2].append(nn.Linear(2, 2)),
    "an adapter": lambda model: setattr(model.layers[0], "adapter", nn.Linear(3, 1)),
    "a module gone": lambda model: delattr(model, "layers"),
    "weights loaded by assignment": lambda model: model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_module_tensors_after_a_change(change: Callable[[Any], Any]) -> None:
    model = Model()
    tensors = ModuleTensors(model)
    for step in (lambda _: None, change, lambda _: None):
        step(model)
        want = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
        got = [id(tensor) for tensor in tensors()]
        assert len(got) == len(want)
        assert set(got) == set(want)
    assert [id(tensor) for tensor in tensors()] == got  # in the same order


class Opaque:
    def __init__(self) -> None:
        self.scales: dict[str, torch.Tensor] = {}


def hidden() -> Model:
    model = Model()
    model.state, model.table, model.parts = Opaque(), torch.ones(2), [{"scale": torch.ones(1)}]  # type: ignore[assignment]
    return model


def test_module_tensors_in_plain_attributes() -> None:
    model: Any = hidden()
    tensors = ModuleTensors(model)
    plain = len([*model.parameters(), *model.buffers()])
    assert len(tensors()) == plain + 2
    model.state.scales["a"] = torch.ones(3)
    model.layers[0].late = torch.ones(4)
    found = tensors()
    assert len(found) == plain + 4
    assert any(one is model.layers[0].late for one in found)
    model.table = torch.zeros(2)
    assert any(one is model.table for one in tensors())


class Kept:
    """An accelerate hook with offloaded weights."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights_map = weights


def test_module_tensors_of_accelerate_hooks() -> None:
    layer: Any = nn.Linear(2, 3)
    kept = {name: value.detach() for name, value in layer.named_parameters()}
    layer._hf_hook = Kept(kept)
    layer.to("meta")
    tensors = ModuleTensors(layer)
    assert [id(one) for one in tensors()] == [id(kept["weight"]), id(kept["bias"])]
    layer.weight = nn.Parameter(kept["weight"].clone())  # as during a call
    assert tensors()[0] is kept["weight"]


def test_module_tensors_of_packed_weights() -> None:
    class Holder(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            weight = torch.quantize_per_tensor(torch.ones(2, 3), scale, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(weight, torch.zeros(2))

    def fingerprint(holder: nn.Module) -> str:
        tensors = ModuleTensors(holder)
        assert [id(one) for one in tensors()] == [id(one) for one in tensors()]
        return WeightsFingerprint(tensors()).current(tensors())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch recommends another library
        prints = [fingerprint(Holder(scale)) for scale in (0.1, 0.1, 0.2)]
    assert prints[0] == prints[1] != prints[2]

"""The tensors of a module are those it has now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vlcache_fx.integrations.module_tensors import ModuleTensors


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
def test_every_change_is_seen(change: Callable[[Any], Any]) -> None:
    model = Model()
    tensors = ModuleTensors(model)
    for step in (lambda _: None, change, lambda _: None):
        step(model)
        want = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
        got = [id(tensor) for tensor in tensors()]
        assert len(got) == len(want)
        assert set(got) == set(want)
    assert [id(tensor) for tensor in tensors()] == got  # in the same order

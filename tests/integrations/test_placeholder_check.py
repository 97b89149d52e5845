"""The check that tokens and features agree in number: one graph for all numbers of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.utils.import_utils import torch_compilable_check

from vlcache_fx.integrations.transformers import hook_placeholder_check, hooked_placeholder_check
from vlcache_fx.testing.families import llava_inputs, tiny_llava

from ..runtime.helpers import own_compiler_state, with_api

TOKEN = 3


class Required(nn.Module):
    """As in LLaVA: the features are needed, and their number is formatted into a message."""

    def get_placeholder_mask(
        self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor
    ) -> Tensor:
        mask = (input_ids == TOKEN)[..., None].expand_as(inputs_embeds)
        count = image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(mask.sum() == image_features.numel(), f"{mask.sum()} tokens, {count} features")
        return mask


class OwnCheck(nn.Module):
    """A check that is not known."""

    def get_placeholder_mask(
        self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor
    ) -> Tensor:
        if image_features.shape[0] == 0:
            raise ValueError("no features")
        return input_ids == TOKEN


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([[1, *[TOKEN] * tokens, 2]]), torch.zeros(1, tokens + 2, 4)


def test_required_features() -> None:
    model: Any = Required()
    expected = model.get_placeholder_mask(*inputs(3), torch.zeros(1, 3, 4))
    assert hook_placeholder_check(model)
    for given in ({"image_features": torch.zeros(1, 3, 4)}, {"image_features": None}):
        assert torch.equal(model.get_placeholder_mask(*inputs(3), **given), expected)
    assert torch.equal(model.get_placeholder_mask(*inputs(3), torch.zeros(1, 3, 4)), expected)
    with pytest.raises(RuntimeError, match="do not agree in number"):
        model.get_placeholder_mask(*inputs(3), torch.zeros(1, 2, 4))


def test_unknown_checks_are_left_alone() -> None:
    model: Any = OwnCheck()
    assert not hook_placeholder_check(model)
    assert "get_placeholder_mask" not in vars(model)


def test_model_is_restored() -> None:
    model: Any = Required()
    with hooked_placeholder_check(model):
        assert "get_placeholder_mask" in vars(model)
    assert "get_placeholder_mask" not in vars(model)


def test_numbers_of_images_share_a_graph() -> None:
    with own_compiler_state():
        pair = with_api(tiny_llava(1), policy="full", min_span_tokens=2)
        graphs = []
        for count in (1, 2, 3, 4, 1):
            assert pair.run(**llava_inputs(4, 5, list(range(count))))[0] <= 1e-5
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[1:] == [graphs[1]] * 4

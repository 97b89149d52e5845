"""Inputs of one request, checked against the graphs' inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.deploy.inputs import decoder_inputs, num_tokens, with_a_row
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import GraphSpec, TensorSpec
from vlcache_fx.errors import ExportError
from vlcache_fx.spec.decoder import SpanSpec

from .helpers import bare_manifest, encoder

CPU = torch.device("cpu")
IDS = torch.arange(6).reshape(1, 6)


def manifest(*inputs: str, dtype: str = "float16") -> Manifest:
    """Manifest of prefill graphs with token ids, three rows of positions and features."""
    plain = bare_manifest()
    features = tuple(index for index, name in enumerate(inputs) if name == "image.features")
    forms = {
        "input_ids": TensorSpec("int64", (1, "tokens")),
        "position_ids": TensorSpec("int64", (3, 1, "tokens")),
        "image.features": TensorSpec(dtype, ("image_tokens", 8)),
    }
    graph = GraphSpec("", {name: form for name, form in forms.items() if name in inputs}, {})
    return dataclasses.replace(
        plain,
        graphs={
            "prefill_cold": graph,
            "encoder": GraphSpec("", {"pixel_values": TensorSpec(dtype, (1, 4))}, {}),
        },
        encoders=(encoder("encoder", "image"),),
        inputs=inputs,
        decoder=dataclasses.replace(plain.decoder, spans=SpanSpec(features, len(features))),
    )


def taken(of: Manifest, features: dict[str, Tensor] | None = None, **given: Any) -> list[Tensor]:
    return decoder_inputs(of, given, features or {}, CPU)


def test_decoder_inputs_order() -> None:
    features = {"image.features": torch.ones(2, 8, dtype=torch.float16)}
    of = manifest("image.features", "input_ids")
    first, second = taken(of, features, input_ids=IDS, pixel_values=torch.ones(1, 4))
    assert first is features["image.features"]
    assert torch.equal(second, IDS)
    assert num_tokens(of, [first, second]) == 6


def test_decoder_inputs_empty_features() -> None:
    ids, features = taken(manifest("input_ids", "image.features"), input_ids=IDS)
    assert torch.equal(ids, IDS)
    assert (features.shape, features.dtype) == ((0, 8), torch.float16)


def test_decoder_inputs_positions_of_text() -> None:
    _, positions, _ = taken(manifest("input_ids", "position_ids", "image.features"), input_ids=IDS)
    assert positions.tolist() == [[list(range(6))]] * 3


def test_decoder_inputs_keeps_positions() -> None:
    of, positions = manifest("input_ids", "position_ids"), torch.arange(18).reshape(3, 1, 6)
    assert torch.equal(taken(of, input_ids=IDS, position_ids=positions)[1], positions)


@pytest.mark.parametrize("by_the_request", [False, True])
def test_decoder_inputs_requires_positions_with_items(by_the_request: bool) -> None:
    of = manifest("input_ids", "position_ids", "image.features")
    features = {"image.features": torch.ones(2, 8, dtype=torch.float16)}
    with pytest.raises(ExportError, match="'position_ids' is missing; the request has: input_ids"):
        taken(of, {} if by_the_request else features, input_ids=IDS, **(features if by_the_request else {}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'input_ids' is missing; the request has: none"),
        ({"input_ids": [1, 2]}, "'input_ids' is missing"),
        ({"input_ids": IDS[0]}, r"'input_ids' has shape \[6\]; the graphs expect \[1, 'tokens'\]"),
        ({"input_ids": IDS.expand(2, 6)}, r"'input_ids' has shape \[2, 6\]"),
        ({"input_ids": IDS.float()}, "'input_ids' has dtype torch.float32; the graphs expect torch.int64"),
        (
            {"input_ids": IDS, "position_ids": IDS.expand(3, 1, 6), "image.features": torch.ones(2, 8)},
            "'image.features' has dtype torch.float32",
        ),
        ({"input_ids": IDS, "position_ids": IDS.expand(3, 1, 6)[..., :4]}, "position_ids"),
        ({"input_ids": IDS, "atention_mask": IDS}, "'atention_mask' is unknown; .*input_ids.*pixel_values"),
        ({"input_ids": IDS, "attention_mask": IDS > 0}, "attention_mask contains zeros"),
    ],
)
def test_decoder_inputs_bad_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        taken(manifest("input_ids", "position_ids", "image.features"), **given)


def test_decoder_inputs_mask_of_ones() -> None:
    given = {"attention_mask": torch.ones(1, 6), "mm_token_type_ids": IDS}
    assert torch.equal(taken(manifest("input_ids"), input_ids=IDS, **given)[0], IDS)


def test_with_a_row_empty_tensor() -> None:
    assert with_a_row(torch.ones(0, 2, dtype=torch.int32)).tolist() == [[0, 0]]
    rows = torch.ones(1, 2)
    assert with_a_row(rows) is rows


def test_num_tokens_without_tokens() -> None:
    of = manifest("image.features")
    with pytest.raises(ExportError, match="no input has a dimension of tokens"):
        num_tokens(of, [torch.ones(2, 8)])

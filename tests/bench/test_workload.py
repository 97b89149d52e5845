from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlcache_fx.bench.floor import PrefixHitBaseline
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.workload import RequestShape, has_grids, make_workload
from vlcache_fx.errors import OptionError
from vlcache_fx.runtime.requests.marked_spans import marked_spans
from vlcache_fx.testing.families import LLAVA_IMAGE_TOKENS, tiny_llava
from vlcache_fx.testing.prompts import IMAGE_TOKEN


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(find_preset("tiny"), torch.float32, torch.device("cpu"))


def test_make_workload_moves_the_image(model: Any) -> None:
    workload = make_workload(model, RequestShape(24, text_before=5, text_after=9))
    image_token = model.config.image_token_id
    assert workload.starts == (6, 10)
    for request, start in zip((workload.first, workload.second), workload.starts, strict=True):
        places = (request["input_ids"][0] == image_token).nonzero().flatten().tolist()
        assert places == list(range(start, start + 24))
        assert request["input_ids"].shape == (1, workload.num_tokens)
        assert request["position_ids"].shape == (3, 1, workload.num_tokens)
    assert workload.first["mm_encoder_outputs"]["image"] is workload.second["mm_encoder_outputs"]["image"]
    assert not torch.equal(workload.first["input_ids"], workload.second["input_ids"])
    assert workload.features.shape == (24, 128)
    assert len(workload.text_positions) == workload.num_tokens - 24


def test_make_workload_several_images_and_samples(model: Any) -> None:
    workload = make_workload(model, RequestShape(24, images=2, batch=2))
    assert workload.first["input_ids"].shape[0] == 2
    assert workload.vision_tokens == 48
    features = workload.first["mm_encoder_outputs"]["image"].pooler_output
    assert len(features) == 4
    assert not torch.equal(features[0], features[1])
    with torch.no_grad():
        assert model(**workload.second).logits.shape == (2, 1, 64)


def without_outputs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace ``forward`` by that of transformers 5.17, without encoder outputs."""
    whole = model.forward

    def forward(
        input_ids: Any = None, position_ids: Any = None, past_key_values: Any = None,
        inputs_embeds: Any = None, use_cache: Any = None, logits_to_keep: Any = 0,
    ) -> Any:  # fmt: skip
        return whole(
            input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, logits_to_keep=logits_to_keep,
        )  # fmt: skip

    monkeypatch.setattr(model, "forward", forward)


def test_make_workload_with_marked_embeddings(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = RequestShape(24, images=2, batch=2)
    usual = make_workload(model, shape)
    with torch.no_grad():
        expected = model(**usual.second).logits
    without_outputs(model, monkeypatch)
    workload = make_workload(model, shape)
    assert "input_ids" not in workload.second
    start = usual.starts[1]
    # Two images are separated by the end token of the first and the start token of the second.
    wanted = [(sample, start + place, 24) for sample in range(2) for place in (0, 26)]
    assert list(marked_spans(workload.second["inputs_embeds"])) == wanted
    assert (workload.starts, workload.text_positions) == (usual.starts, usual.text_positions)
    with torch.no_grad():
        assert torch.equal(model(**workload.second).logits, expected)
        floor = PrefixHitBaseline(model, workload, 5)
        floor.prepare()
        torch.testing.assert_close(floor.run().logits, expected)
        floor.check()


def test_make_workload_deepstack_without_encoder_outputs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without_outputs(model, monkeypatch)
    features = SimpleNamespace(pooler_output=[torch.zeros(24, 128)], deepstack_features=[])
    monkeypatch.setattr("vlcache_fx.bench.workload.encode", lambda *_: features)
    with pytest.raises(OptionError, match="does not accept encoder outputs, which its deepstack layers need"):
        make_workload(model, RequestShape(24))


def test_make_workload_without_grids() -> None:
    model = tiny_llava()
    workload = make_workload(model, RequestShape(1000, images=2, text_before=5, text_after=9))
    assert workload.shape.vision_tokens == LLAVA_IMAGE_TOKENS
    assert workload.starts == (5, 9)
    assert int((workload.second["input_ids"] == IMAGE_TOKEN).sum()) == 2 * LLAVA_IMAGE_TOKENS
    assert "position_ids" not in workload.second
    with torch.no_grad():
        model(**workload.second)


def encoder(method: Any) -> Any:
    return SimpleNamespace(base_model=SimpleNamespace(get_image_features=method))


def test_has_grids_unsupported_encoder() -> None:
    assert has_grids(encoder(lambda pixel_values, image_grid_thw: None))
    assert not has_grids(encoder(lambda pixel_values, strategy=None, **others: None))
    with pytest.raises(OptionError, match="pixel_values, input_ids"):
        has_grids(encoder(lambda pixel_values, input_ids: None))
    with pytest.raises(OptionError, match="no get_image_features"):
        has_grids(SimpleNamespace(base_model=None))


@pytest.mark.parametrize("name", ["vision_tokens", "images", "batch", "text_before", "text_after"])
def test_request_shape_zero(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}=0 is not valid"):
        RequestShape(**{"vision_tokens": 8, name: 0})


def test_request_shape_equal_texts() -> None:
    with pytest.raises(OptionError, match="both 7"):
        RequestShape(8, text_before=7, text_after=7)

"""Which models a server has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.cli.serving.utils import Modality

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.examples import picture_url
from vlcache_fx.serve.media import MediaLoader
from vlcache_fx.serve.models import ServedModels
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.prompt import build_inputs
from vlcache_fx.testing.reference_vlm.vocabulary import build_tokenizer

SIDE, PATCH = 56, 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with random weights, and its processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    tokenizer = build_tokenizer()
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token="<|image_pad|>",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def models(*names: str) -> ServedModels:
    return ServedModels(ServeOptions(names, engine={"lowering": "eager"}, device="cpu"))


def test_a_folder_is_served_under_its_name(folder: Path) -> None:
    served = models(str(folder))
    assert served.sources == {"tiny-llava": str(folder)}
    assert [entry["id"] for entry in served.get_gen_models()] == ["tiny-llava"]
    assert served.states() == {"tiny-llava": "loading"}
    model, processor = served.load("tiny-llava")
    assert served.states() == {"tiny-llava": "compiling"}
    assert served.load_model_and_processor("tiny-llava") == (model, processor)
    assert served.engines["tiny-llava"] is model.vlcache
    assert not model.training
    content = [
        {"type": "image_url", "image_url": {"url": picture_url((90, 70), 0)}},
        {"type": "text", "text": "what is it ?"},
    ]
    modality = served.get_model_modality(model, processor)
    media = MediaLoader(ServeOptions(("reference",)))
    inputs = build_inputs([{"role": "user", "content": content}], processor, modality, media)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == (SIDE // PATCH) ** 2
    served.is_now_ready("tiny-llava")
    assert served.is_ready
    served.shutdown()
    assert model.vlcache._closed


def test_names(folder: Path) -> None:
    served = models("reference", f"qwen={folder}", "digits=reference")
    assert served.sources == {"reference": "reference", "qwen": str(folder), "digits": "reference"}
    assert not served.is_ready
    for name in ("gpt-4", "", None, 3, str(folder)):
        with pytest.raises(RequestError, match="is not served here: reference, qwen, digits") as caught:
            served.check_name(name)
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(RequestError) as early:
        served.check_name("qwen")
    assert (early.value.status, early.value.retry_after_s) == (503, 5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("nothing",), "no model 'nothing'"),
        (("a=nothing",), "no model 'nothing'"),
        (("reference", "reference"), "two models are named 'reference'"),
        (("=reference",), "the name '' of a model is not valid"),
        (("a:b=reference",), "the name 'a:b' of a model is not valid"),
    ],
)
def test_bad_names(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        models(*names)


def test_models_that_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="cannot load the model in"):
        models(str(tmp_path / "empty")).load("empty")
    served = models(str(folder))
    served._load = lambda _: (SimpleNamespace(), SimpleNamespace(chat_template=None))  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="its processor has no chat template"):
        served.load("tiny-llava")


def test_modalities() -> None:
    assert ServedModels.get_model_modality(SimpleNamespace(), build_tokenizer()) is Modality.LLM
    assert ServedModels.get_model_modality(SimpleNamespace(), SimpleNamespace()) is Modality.VLM

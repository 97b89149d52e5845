"""Features depend on the encoder's weights; on the decoder's only if the encoder reads them."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import vlcache_fx
from vlcache_fx.integrations.encoder_weights import EncoderWeights, Reads
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.survey.families import build_family
from vlcache_fx.testing.survey.prompts import image_pixels

from ..runtime.helpers import own_compiler_state, with_api


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class Asking:
    """Encodes one image again and again, and says whether its features were stored."""

    def __init__(self, model: Any, pixels: dict[str, Any]) -> None:
        self.base, self._pixels = model.base_model, pixels
        self.engine = vlcache_fx.compile(model, lowering="eager").vlcache
        self._encode = type(self.base).get_image_features
        with torch.no_grad():  # the first call of some encoders installs hooks, which are part of keys
            self._encode(self.base, **pixels)

    def __call__(self) -> bool:
        """Encode; the features must be those of the unmodified encoder."""
        hits = self.engine.stats()["encoder"]["hits"]
        with torch.no_grad():
            found = self.base.get_image_features(**self._pixels).pooler_output
            expected = self._encode(self.base, **self._pixels).pooler_output
        pairs = zip(found, expected, strict=True) if isinstance(found, list | tuple) else [(found, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)
        return bool(self.engine.stats()["encoder"]["hits"] > hits)


def change(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5)


def decoder_weight(base: Any) -> torch.Tensor:
    weights = list(base.get_decoder().parameters())
    return weights[len(weights) // 2]


def encoder_weight(base: Any) -> torch.Tensor:
    inner = {id(weight) for weight in base.get_decoder().parameters()}
    others = (weight for weight in base.parameters() if id(weight) not in inner)
    return next(weight for weight in others if weight.any())  # of zeros, a multiple is the same


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "internvl"])
def test_features_survive_changes_of_the_decoder(family: str) -> None:
    built = build_family(family)
    ask = Asking(built.model, image_pixels(built, 0))
    assert [ask(), ask()] == [False, True]
    change(decoder_weight(ask.base))
    assert ask() is True
    change(encoder_weight(ask.base))
    assert [ask(), ask()] == [False, True]


def scaled_by(read: Callable[[Any], torch.Tensor]) -> Any:
    """A LLaVA whose encoder reads something of its decoder."""
    model = tiny_llava(1)
    kind = type(model.base_model)

    class Hostile(kind):  # type: ignore[misc, valid-type]
        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            output = super().get_image_features(*args, **kwargs)
            factor = read(self)
            output.pooler_output = tuple(item * factor for item in output.pooler_output)
            return output

    model.model.__class__ = Hostile
    return model


READS: dict[str, Callable[[Any], torch.Tensor]] = {
    "weight": lambda base: base.language_model.embed_tokens.weight.sum(),
    "data": lambda base: base.language_model.norm.weight.data[0],
    "by keyword": lambda base: F.linear(
        torch.ones(1, 64), weight=base.language_model.layers[0].mlp.up_proj.weight
    ).sum(),
    "number": lambda base: torch.tensor(base.language_model.norm.weight[0].item()),
    "array": lambda base: torch.from_numpy(base.language_model.norm.weight.detach().numpy()).sum(),
    "layer": lambda base: base.language_model.layers[0].mlp(torch.ones(1, 64)).sum(),
    "list": lambda base: torch.cat([torch.ones(64), base.language_model.norm.weight]).sum(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_features_of_an_encoder_that_reads_its_decoder(read: Callable[[Any], torch.Tensor]) -> None:
    ask = Asking(scaled_by(read), {"pixel_values": llava_inputs(1, 1, [0])["pixel_values"]})
    assert [ask(), ask()] == [False, True]
    for weight in (
        ask.base.language_model.embed_tokens.weight,
        ask.base.language_model.norm.weight,
        ask.base.language_model.layers[0].mlp.up_proj.weight,
    ):
        change(weight)
        assert [ask(), ask()] == [False, True]


def test_reads_notices_values_alone() -> None:
    watched, other = torch.ones(3), torch.ones(3)
    reads = Reads([watched])
    with reads:
        other + 1
        assert watched.dtype is torch.float32
        assert watched.is_floating_point()
        assert not reads.found
        torch.stack([other, watched])
    assert reads.found


def test_all_weights_count_where_reads_may_be_hidden() -> None:
    base = tiny_llava(1).base_model
    weights = EncoderWeights(base, base.get_image_features)
    assert weights.current().unread
    handle = base.language_model.layers[0].register_forward_pre_hook(lambda module, args: None)
    assert not weights.current().unread
    handle.remove()
    assert weights.current().unread
    base.get_decoder = types.MethodType(lambda self: self, base)
    assert not weights.current().unread


def test_shared_weights_count() -> None:
    base = tiny_llava(1).base_model
    base.multi_modal_projector.shared = base.language_model.embed_tokens.weight
    found = EncoderWeights(base, base.get_image_features).current()
    shared = base.language_model.embed_tokens.weight
    assert any(weight is shared for weight in found.weights)
    assert all(weight is not shared for weight in found.unread)


def test_runs_that_fail_under_a_watch_run_again() -> None:
    base = tiny_llava(1).base_model
    weights = EncoderWeights(base, base.get_image_features)

    def call() -> int:
        if torch._C._len_torch_function_stack():
            raise NotImplementedError
        return 3

    assert weights.run(call, weights.current()) == (3, False)
    assert not weights.current().unread


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(tiny_llava, llava_inputs(4, 5, [0])), (tiny_qwen2_5_vl, qwen_inputs(4, 5, [(8, 8, 0)]))],
    ids=["llava", "qwen"],
)
def test_donors_follow_both(model: Callable[[int], Any], inputs: dict[str, Any]) -> None:
    pair = with_api(model(1), policy="full", min_span_tokens=4)
    base = pair.model.base_model

    def ask() -> tuple[Any, Any]:
        with torch.no_grad():
            pair.model(**inputs)
        return pair.report["encoder_hit"], pair.report["mode"]

    ask()  # LLaVA's encoder installs hooks in its first call, which are part of its keys
    pair.engine.clear()
    assert [ask(), ask()] == [(False, "cold"), (True, "warm")]
    change(decoder_weight(base))
    assert [ask(), ask()] == [(True, "cold"), (True, "warm")]
    change(encoder_weight(base))
    assert [ask(), ask()] == [(False, "cold"), (True, "warm")]

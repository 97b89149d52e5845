"""Items of audio: an encoder fills their tokens like those of images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlcache_fx
from vlcache_fx.testing.prompts import noise, seeded
from vlcache_fx.testing.survey.families import build_family
from vlcache_fx.testing.survey.prompts import image_prompt
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import distance, own_compiler_state, with_api

transformers = pytest.importorskip("transformers")

AUDIO, MELS, FRAMES, TOKENS = 6, 8, 80, 20
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def voxtral() -> Any:
    """A small model of speech and text."""
    config = transformers.VoxtralConfig(
        audio_config=SIZES | {"num_mel_bins": MELS, "max_source_positions": FRAMES // 2},
        text_config=SIZES | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1,
                             "eos_token_id": 2, "pad_token_id": 0},
        audio_token_id=AUDIO,
    )  # fmt: skip
    with seeded(0):
        return transformers.VoxtralForConditionalGeneration(config).eval()


def speech(before: int, after: int, *sounds: int, text: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(text)

    def words(count: int) -> Tensor:
        return torch.randint(8, 64, (1, count), generator=drawn)

    parts = [words(before)]
    for _ in sounds:
        parts += [torch.full((1, TOKENS), AUDIO), words(2)]
    ids = torch.cat([*parts, words(after)], 1)
    features = torch.cat([noise(seed, 1, MELS, FRAMES) for seed in sounds])
    return {"input_ids": ids, "input_features": features, "attention_mask": torch.ones_like(ids)}


@pytest.mark.works("Inputs", "audio")
def test_sounds_are_reused() -> None:
    with own_compiler_state():
        pair = with_api(voxtral(), policy="full", min_span_tokens=2, strict=True)
        for sounds in ((1,), (2, 3)):  # the encoder runs in the graph, for all sounds of a prompt at once
            for before, is_known in ((5, False), (9, True)):
                off, report = pair.run(**speech(before, 6, *sounds, text=before))
                assert off <= 1e-6
                assert report["encoder_hit"] is is_known
                found = [(span["length"], span["hit"]) for span in report["spans"]]
                assert found == [(TOKENS, is_known)] * len(sounds)


def test_encoder_that_cannot_be_traced() -> None:
    """Splits by values of a tensor: the encoder runs before the graph, and is cached."""
    with own_compiler_state():
        family = build_family("qwen2_5_omni_thinker")
        model = vlcache_fx.compile(
            copy.deepcopy(family.model), lowering="eager", dynamic=True, policy="full", min_span_tokens=2
        )
        config = family.model.config

        def given(before: int, after: int, image: int, text: int) -> dict[str, Any]:
            prompt = dict(image_prompt(family, before, after, image=image, text=text))
            sound = torch.full((1, 16), config.audio_token_id)
            prompt["input_ids"] = torch.cat([prompt["input_ids"], sound, torch.tensor([[9, 10, 11]])], 1)
            return prompt | {
                "attention_mask": torch.ones_like(prompt["input_ids"]),
                "input_features": noise(50, 1, config.audio_config.num_mel_bins, 64),
                "feature_attention_mask": torch.ones(1, 64, dtype=torch.long),
            }

        found = []
        for call in (given(5, 7, 1, 0), given(4, 6, 2, 1)):
            with torch.no_grad():
                want, got = (
                    each.generate(**call, max_new_tokens=3, do_sample=False) for each in (family.model, model)
                )
            assert torch.equal(got, want)
            found.append([span["hit"] for span in model.vlcache.last_report["spans"]])
        assert found == [[False, False], [False, True]]
        assert model.vlcache.refusals == []


class Splitting(nn.Module):
    """A model that Dynamo cannot trace with captured scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = tiny_vlm()

    def forward(self, input_ids: Tensor, pixel_values: Tensor, lengths: Tensor) -> Tensor:
        parts = pixel_values.split(lengths[lengths > 0].tolist())
        result: Tensor = self.vlm(input_ids, torch.cat(parts))
        return result


def test_model_that_cannot_be_traced_runs_unmodified() -> None:
    call = tiny_vlm_inputs(3, 4, [(20, 0)]) | {"lengths": torch.tensor([8, 12])}
    with own_compiler_state():
        pair = with_api(Splitting())
        got, want = pair.both(**call)
        assert distance(got, want) == 0.0
        assert (pair.report["mode"], pair.report["reason_code"]) == ("bypass", "data_dependent")
        assert "Dynamo cannot trace the model" in pair.report["reason"]
        strict = with_api(Splitting(), strict=True)
        with pytest.raises(vlcache_fx.UnsupportedGraphError, match="data_dependent"), torch.no_grad():
            strict.model(**call)

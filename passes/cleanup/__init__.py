"""Lossless clean-up before analysis: graphs of different tracers and models come out alike."""

from vlcache_fx.passes.cleanup.added_merges import AddedMerges
from vlcache_fx.passes.cleanup.anchor_sizes import AnchorSizes
from vlcache_fx.passes.cleanup.canonical_names import CanonicalNames
from vlcache_fx.passes.cleanup.canonicalise_convolutions import CanonicaliseConvolutions
from vlcache_fx.passes.cleanup.canonicalise_flex import CanonicaliseFlex
from vlcache_fx.passes.cleanup.dense_deepstack import DenseDeepstack
from vlcache_fx.passes.cleanup.drop_empty_cats import DropEmptyCats
from vlcache_fx.passes.cleanup.drop_merge_checks import DropMergeChecks
from vlcache_fx.passes.cleanup.drop_noops import DropNoops
from vlcache_fx.passes.cleanup.fold_repeated_heads import FoldRepeatedHeads
from vlcache_fx.passes.cleanup.fuse_attention import FuseAttention
from vlcache_fx.passes.cleanup.invert_permutations import InvertPermutations
from vlcache_fx.passes.cleanup.merge_sums import MergeSums
from vlcache_fx.passes.cleanup.written_merges import WrittenMerges

__all__ = [
    "AddedMerges",
    "AnchorSizes",
    "CanonicalNames",
    "CanonicaliseConvolutions",
    "CanonicaliseFlex",
    "DenseDeepstack",
    "DropEmptyCats",
    "DropMergeChecks",
    "DropNoops",
    "FoldRepeatedHeads",
    "FuseAttention",
    "InvertPermutations",
    "MergeSums",
    "WrittenMerges",
]

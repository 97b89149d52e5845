"""From a decoder's graph to the cold program, which records donors, or the warm one, which reads them."""

from vlcache_fx.passes.rewrite.carry_states import CarryStates
from vlcache_fx.passes.rewrite.fit_donors import FitDonors
from vlcache_fx.passes.rewrite.gather_cross_layer_values import GatherCrossLayerValues
from vlcache_fx.passes.rewrite.hoist_lookups import HoistLookups
from vlcache_fx.passes.rewrite.insert_lookups import InsertLookups
from vlcache_fx.passes.rewrite.kv_only_rows import KvOnlyRows
from vlcache_fx.passes.rewrite.record_donors import RecordDonors
from vlcache_fx.passes.rewrite.record_states import RecordStates
from vlcache_fx.passes.rewrite.restrict_masks import RestrictMasks
from vlcache_fx.passes.rewrite.restrict_merge import RestrictMerge
from vlcache_fx.passes.rewrite.restrict_rows import RestrictRows
from vlcache_fx.passes.rewrite.splice_rows import SpliceRows
from vlcache_fx.passes.rewrite.trim_tail import TrimTail
from vlcache_fx.passes.rewrite.unpack_donors import UnpackDonors
from vlcache_fx.passes.rewrite.use_row_positions import UseRowPositions
from vlcache_fx.passes.rewrite.write_in_place import WriteInPlace

__all__ = [
    "CarryStates",
    "FitDonors",
    "GatherCrossLayerValues",
    "HoistLookups",
    "InsertLookups",
    "KvOnlyRows",
    "RecordDonors",
    "RecordStates",
    "RestrictMasks",
    "RestrictMerge",
    "RestrictRows",
    "SpliceRows",
    "TrimTail",
    "UnpackDonors",
    "UseRowPositions",
    "WriteInPlace",
]

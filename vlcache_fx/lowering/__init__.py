"""Lowerings: takes the graph of a program; returns a callable of its inputs. The compiler imports them."""

from vlcache_fx.lowering.base import Decompositions, Lowering
from vlcache_fx.lowering.cache import CompileCache, CompileStats
from vlcache_fx.lowering.cuda_graphs import CudaGraphs
from vlcache_fx.lowering.eager import EagerLowering
from vlcache_fx.lowering.inductor import InductorLowering
from vlcache_fx.lowering.tensorrt import TensorRtLowering
from vlcache_fx.runtime.programs.lowered import Lowered, PendingTensor

__all__ = [
    "CompileCache",
    "CompileStats",
    "CudaGraphs",
    "Decompositions",
    "EagerLowering",
    "InductorLowering",
    "Lowered",
    "Lowering",
    "PendingTensor",
    "TensorRtLowering",
]

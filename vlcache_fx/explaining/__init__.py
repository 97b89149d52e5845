"""Explanations of one call: its tokens, rows, stages, graphs, donors and misses, as text, JSON or a page."""

from vlcache_fx.explaining.explanation import Explanation
from vlcache_fx.explaining.prediction import Prediction, Predictions
from vlcache_fx.explaining.tokens import TokenClass

__all__ = ["Explanation", "Prediction", "Predictions", "TokenClass"]

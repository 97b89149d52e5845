"""Packages of ``examples/`` can be imported. Last in the path: ``vlcache_fx`` is what is installed."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)

"""Packages of ``examples/`` can be imported; last in the path, so that the installed ``vlcache_fx`` counts."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)

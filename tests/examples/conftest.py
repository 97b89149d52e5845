"""Makes packages of ``examples/`` importable, last in the path: ``vlcache_fx`` is the installed package."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)

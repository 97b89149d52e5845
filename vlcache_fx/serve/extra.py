"""Checks that the packages of the extra ``serve`` are installed."""

from __future__ import annotations

from importlib.util import find_spec

from vlcache_fx.errors import OptionError

PACKAGES = ("fastapi", "openai", "prometheus_client", "pydantic", "transformers", "uvicorn")


def require_serve() -> None:
    """Check that a server can run.

    Raises:
        OptionError: a package is not installed; names it and the extra.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise OptionError(f"serving needs {', '.join(missing)}: pip install 'vlcache_fx[serve]'")

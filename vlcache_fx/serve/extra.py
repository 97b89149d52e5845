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


def require_ray() -> None:
    """Check that replicas can run.

    Raises:
        OptionError: Ray Serve is not installed; names the extra.
    """
    require_serve()
    # Ray Serve needs both; neither comes with `pip install ray` alone.
    missing = [name for name in ("ray", "grpc", "opencensus") if find_spec(name) is None]
    if missing:
        raise OptionError(f"replicas need {', '.join(missing)}: pip install 'vlcache_fx[ray]'")

"""Options of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.extra import require_serve
from vlcache_fx.serve.options import ServeOptions


def test_defaults_are_valid() -> None:
    options = ServeOptions(("reference",), engine={"salt": "s", "budget": 0.1})
    assert options.key_salt == "s"
    assert options.host == "127.0.0.1"
    require_serve()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": ()}, "no model is named"),
        ({"port": 70000}, "port=70000"),
        ({"batch_size": 0}, "batch_size=0 is not valid: it must be a positive integer"),
        ({"batch_size": True}, "batch_size=True"),
        ({"max_images": -1}, "max_images=-1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
        ({"batch_wait_ms": -1.0}, "batch_wait_ms=-1.0 is not valid: it must be a number >= 0"),
        ({"shutdown_timeout_s": float("nan")}, "shutdown_timeout_s=nan"),
        ({"media_hosts": ("http://a/b",)}, "media host 'http://a/b'"),
        ({"media_hosts": ("*",)}, "media host '*'"),
        ({"media_folders": (Path("/nowhere"),)}, "media folder '/nowhere'"),
        ({"api_keys": ("", "b")}, "an API key is not valid"),
        ({"engine": {"budget": 3}}, "budget=3"),
        ({"engine": {"badget": 0.1}}, "did you mean 'budget'"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        ServeOptions(**{"models": ("reference",), **given})
    assert message in str(caught.value)


def test_keys_are_not_shown() -> None:
    assert "hush" not in repr(ServeOptions(("reference",), api_keys=("hush",)))

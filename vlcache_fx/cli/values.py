"""Values of options, as people write them."""

from __future__ import annotations

from vlcache_fx.errors import OptionError


def bytes_of(option: str, text: str, hint: str = "") -> int:
    """Return a number of bytes, such as ``1GiB``, from an option.

    Args:
        option: its name, such as ``--to``.
        text: its value.
        hint: ends the message of the error.

    Raises:
        OptionError: another form, or not positive.
    """
    from vlcache_fx.store.url import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise OptionError(f"{option}: {error}{hint}") from error

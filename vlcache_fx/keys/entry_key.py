"""Keys of entries: ``kind-salt-model-digest``.

The digest covers everything on which an entry depends. Kind, salt and model stand in front of it as short
tags, so that a store can list and drop what belongs to one tenant or one model without reading entries.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vlcache_fx.keys.digest import Part, content_digest

KEY_VERSION = 1
"""Version of keys and of what they cover. Part of every key: entries of other versions are not found."""

KINDS = ("donor", "exact", "text", "features")
"""Kinds of entries: rows of a media item, its exact rows in the latest context, rows of text, features."""

TAG_LENGTH = 16
"""Hexadecimal digits of a tag."""

NO_PARTS: Mapping[str, str] = MappingProxyType({})


class EntryKey(str):
    """Key of an entry.

    Attributes:
        parts: digests of what the key covers, by name, such as ``content`` and ``weights``; used to explain
            misses. Empty for keys of text, which cover a chain of blocks.
    """

    parts: Mapping[str, str] = NO_PARTS

    @classmethod
    def of(cls, text: str, parts: Mapping[str, str] = NO_PARTS) -> EntryKey:
        """Return a key with its parts."""
        key = cls(text)
        key.parts = dict(parts)
        return key


def parts_of(key: str) -> Mapping[str, str]:
    """Return the parts of a key; empty for a plain string."""
    return key.parts if isinstance(key, EntryKey) else NO_PARTS


@dataclass(frozen=True)
class KeyScope:
    """Makes the keys of one tenant and one model.

    Attributes:
        salt: the option ``key_salt``.
        model: fingerprint of the model's weights, hexadecimal digits.
    """

    salt: str
    model: str

    @functools.cached_property
    def _tags(self) -> str:
        return f"{salt_tag(self.salt)}-{model_tag(self.model)}"

    def with_digest(self, kind: str, digest: str) -> EntryKey:
        """Return the key of a digest that covers everything, salt and model included."""
        return EntryKey(f"{kind}-{self._tags}-{digest}")

    def key(self, kind: str, parts: Mapping[str, Part]) -> EntryKey:
        """Return the key that covers ``parts`` by name, the salt, the model and ``KEY_VERSION``.

        Raises:
            StoreError: a part cannot be part of a key.
        """
        digests = {name: content_digest([part]) for name, part in parts.items()}
        covered = {"format": str(KEY_VERSION), "salt": salt_tag(self.salt), "model": self.model, **digests}
        whole = content_digest([kind, self.salt, *map(tuple, covered.items())])
        return EntryKey.of(f"{kind}-{self._tags}-{whole}", covered)


def salt_tag(salt: str) -> str:
    """Return the tag of a salt in keys."""
    return content_digest(["salt", salt])[:TAG_LENGTH]


def model_tag(model: str) -> str:
    """Return the tag of a model's fingerprint in keys."""
    return (
        model[:TAG_LENGTH] if re.fullmatch(r"[0-9a-f]{64}", model) else content_digest([model])[:TAG_LENGTH]
    )


@dataclass(frozen=True)
class Selection:
    """Selects entries by key: those that match everything given.

    Attributes:
        salt: the salt of a tenant (the option ``key_salt``).
        model: a fingerprint of weights, as in reports.
        key: a key.
    """

    salt: str | None = None
    model: str | None = None
    key: str | None = None

    @functools.cached_property
    def pattern(self) -> str:
        """Regular expression that matches the keys of all selected entries, and no other key."""
        if self.key is not None and re.fullmatch(self._tags, self.key):
            return re.escape(self.key)
        return r"(?!)" if self.key is not None else self._tags

    @functools.cached_property
    def _tags(self) -> str:
        tags = [None if self.salt is None else salt_tag(self.salt)]
        tags.append(None if self.model is None else model_tag(self.model))
        salt, model = (rf"[0-9a-f]{{{TAG_LENGTH}}}" if tag is None else tag for tag in tags)
        return rf"[a-z]+-{salt}-{model}-[0-9a-f]{{64}}"

    def matches(self, key: str) -> bool:
        """Return whether a key is selected."""
        return re.fullmatch(self.pattern, key) is not None

"""Settings of single requests: ``extra_body={"vlcache": {...}}``, and the salt of a tenant."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError, PolicyError
from vlcache_fx.options import Options
from vlcache_fx.policies.registry import get_policy
from vlcache_fx.serve.errors import RequestError, bad_request

if TYPE_CHECKING:
    from vlcache_fx.policies.base import Policy
    from vlcache_fx.runtime.engine import ServingEngine

FIELD = "vlcache"
NAMES = ("budget", "policy", "bypass", "salt")


@dataclass(frozen=True)
class RequestSettings:
    """How one request reuses donors. Requests with equal settings may run together.

    Attributes:
        budget: as the option; None for that of the server.
        policy: likewise.
        salt: as the option; it includes the tenant's. None for that of the server.
        bypass: reuse nothing, and leave nothing behind.
    """

    budget: float | None = None
    policy: Policy | None = None
    salt: str | None = None
    bypass: bool = False

    def using(self, engine: ServingEngine) -> AbstractContextManager[None]:
        """Use these settings for calls of this context."""
        return engine.using(policy=self.policy, budget=self.budget, salt=self.salt)

    def with_own_salt(self) -> RequestSettings:
        """The same with a salt that no other request has or can guess: for ``bypass``."""
        return RequestSettings(self.budget, self.policy, f"bypass-{secrets.token_hex(16)}", True)


def read_settings(value: Any, *, tenant: str, server_salt: str) -> RequestSettings:
    """Read the field ``vlcache`` of a request.

    Args:
        value: its value; None without one.
        tenant: the tenant's salt; empty without tenants.
        server_salt: the salt of the server's option.

    Raises:
        RequestError: a name or a value is not valid; the message says what is.
    """
    given = {} if value is None else value
    if not isinstance(given, Mapping):
        raise bad_request(f"vlcache must be an object with {', '.join(NAMES)}", FIELD)
    unknown = [str(name) for name in given if name not in NAMES]
    if unknown:
        raise bad_request(f"vlcache has no {unknown[0]!r}: it has {', '.join(NAMES)}", FIELD)
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(given.get("bypass", False), bool):
        raise bad_request(f"bypass={given['bypass']!r} is not valid: it must be true or false", FIELD)
    try:
        Options.parse({name: given[name] for name in ("budget", "policy", "salt") if name in given})
        policy = _policy_named(given["policy"]) if "policy" in given else None
    except (OptionError, PolicyError) as error:
        raise bad_request(str(error), FIELD) from None
    own = str(given.get("salt", ""))
    salt = combined_salt(server_salt, tenant, own)
    return RequestSettings(given.get("budget"), policy, salt, given.get("bypass", False))


@lru_cache(maxsize=64)
def _policy_named(name: str) -> Policy:
    """The policy; remembered, because to look it up reads the metadata of all installed packages."""
    return get_policy(name)


def combined_salt(server_salt: str, tenant: str, own: str) -> str | None:
    """One salt of three parts; different parts give different salts. None if only the server's is left.

    Each part is in the digest with its bounds: a request cannot choose a salt that is another tenant's.
    """
    if not tenant and not own:
        return None
    return "serve-" + hashlib.sha256(json.dumps([server_salt, tenant, own]).encode()).hexdigest()


def tenant_of(api_key: str) -> str:
    """The tenant of an API key: a digest, so that the key itself goes nowhere."""
    return hashlib.sha256(f"vlcache tenant {api_key}".encode()).hexdigest() if api_key else ""


def check_api_key(api_key: str, valid: Sequence[str]) -> None:
    """Check the key of a request, in a time that does not depend on it.

    Raises:
        RequestError: keys are needed and this is none of them.
    """
    digest = hashlib.sha256(api_key.encode("utf-8", "replace")).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in valid]
    if valid and not any(matches):
        raise RequestError(
            401,
            "the API key is missing or not valid: send 'Authorization: Bearer KEY'",
            code="invalid_api_key",
        )

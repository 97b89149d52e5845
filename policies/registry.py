"""Look up policies by name in the entry-point group ``vlcache_fx.policies``.

The metadata of the installed packages is the registry; this module has no state.
"""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies.base import Policy, ProbingPolicy

GROUP = "vlcache_fx.policies"


def known_policies() -> dict[str, EntryPoint]:
    """Return the registered policies by name, sorted, without importing them.

    Raises:
        PolicyError: two different policies have the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        other = found.setdefault(entry.name, entry)
        # The same value twice is no conflict: a distribution may be found twice (an editable install and its
        # build).
        if other.value != entry.value:
            raise PolicyError(f"two policies are named {entry.name!r}: {other.value} and {entry.value}")
    return found


def get_policy(name_or_object: str | Policy) -> Policy:
    """Return the policy of a name, with default parameters; a policy object is returned itself.

    Raises:
        PolicyError: the name is unknown (the message lists the known names), the object is not a policy, or
            the policy was written for an earlier interface.
    """
    if isinstance(name_or_object, Policy):
        return _current(name_or_object)
    if not isinstance(name_or_object, str):
        raise PolicyError(
            f"{name_or_object!r} is not a policy: expected a name or an object of a Policy subclass"
        )
    known = known_policies()
    if name_or_object not in known:
        names = ", ".join(known) or "none (is the package installed?)"
        raise PolicyError(f"unknown policy {name_or_object!r}; known policies are: {names}")
    entry = known[name_or_object]
    try:
        policy = entry.load()()
    except PolicyError:
        raise
    except Exception as error:  # third-party code can raise any error; name the policy
        raise PolicyError(f"policy {entry.name!r} ({entry.value}) could not be loaded: {error!r}") from error
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy {entry.name!r} ({entry.value}) is not a subclass of Policy")
    return _current(policy)


def interface_error(policy: Policy) -> str | None:
    """Return the error message for a policy of the earlier interface of several arguments, else None."""
    expected = {"select": "length"}
    if isinstance(policy, ProbingPolicy):
        expected["choose"] = "deviation"
    for method, first in expected.items():
        try:
            signature = inspect.signature(getattr(policy, method))
        except (TypeError, ValueError):  # no signature: a wrong interface fails when called
            continue
        try:
            signature.bind(None)
        except TypeError:
            kind = type(policy)
            return (
                f"policy {policy.name!r} ({kind.__module__}.{kind.__qualname__}): {method}{signature} was "
                f"written for an earlier interface; {method} now takes one object, {method}(self, span), "
                f"with span.{first}, span.num_layers, span.profile, span.budget and more "
                "(see vlcache_fx.policies.base)"
            )
    return None


def _current(policy: Policy) -> Policy:
    error = interface_error(policy)
    if error is not None:
        raise PolicyError(error)
    return policy

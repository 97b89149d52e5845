"""What calls are planned with: the options', or another for some calls of one thread."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile

log = logging.getLogger("vlcache_fx")


@dataclass(frozen=True)
class CallSettings:
    """What a call is planned with."""

    policy: Policy
    budget: float
    profile: Profile | None


class ThreadSettings:
    """The settings of each thread.

    Attributes:
        default: where a thread has none of its own.
    """

    def __init__(self, default: CallSettings) -> None:
        self.default = default
        self._thread = threading.local()
        self._misfit: str | None = None

    @property
    def current(self) -> CallSettings:
        """What this thread's next call is planned with."""
        own: CallSettings | None = getattr(self._thread, "settings", None)
        return own or self.default

    @contextmanager
    def using(self, settings: CallSettings) -> Iterator[None]:
        """Calls that this thread makes in the body are planned with ``settings``."""
        outer = getattr(self._thread, "settings", None)
        self._thread.settings = settings
        try:
            yield
        finally:
            self._thread.settings = outer

    def profile_for(self, model_fingerprint: str, dtype: str, *, strict: bool) -> Profile | None:
        """The profile where it is this model's; otherwise policies do without one, and the log says so once.

        Args:
            model_fingerprint: of the decoder's weights now; empty where no span asked for it.
            dtype: of the keys and values.
            strict: raise instead of doing without.

        Raises:
            PolicyError: with ``strict``, a profile of another model, dtype or version.
        """
        profile = self.current.profile
        if profile is None or not model_fingerprint:
            return None
        misfit = profile.misfits(model_fingerprint, dtype)
        if misfit is None:
            return profile
        if strict:
            raise PolicyError(misfit)
        if misfit != self._misfit:
            self._misfit = misfit
            log.warning("goes on without a profile: %s", misfit)
        return None

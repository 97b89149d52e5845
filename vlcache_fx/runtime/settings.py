"""Policy, budget and profile of calls: those of the options, or others for calls of one thread."""

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
    """Settings with which a call is planned."""

    policy: Policy
    budget: float
    profile: Profile | None


class ThreadSettings:
    """The settings of each thread.

    Attributes:
        default: settings of threads without settings of their own.
    """

    def __init__(self, default: CallSettings) -> None:
        self.default = default
        self._thread = threading.local()
        self._misfit: str | None = None

    @property
    def current(self) -> CallSettings:
        """The settings of this thread's next call."""
        own: CallSettings | None = getattr(self._thread, "settings", None)
        return own or self.default

    @contextmanager
    def using(self, settings: CallSettings) -> Iterator[None]:
        """Use ``settings`` for calls that this thread makes in the body."""
        outer = getattr(self._thread, "settings", None)
        self._thread.settings = settings
        try:
            yield
        finally:
            self._thread.settings = outer

    def profile_for(self, model_fingerprint: str, dtype: str, *, strict: bool) -> Profile | None:
        """Return the profile if it fits the model; else log a warning once and return None.

        Args:
            model_fingerprint: fingerprint of the decoder's weights; empty without spans.
            dtype: dtype of keys and values.
            strict: raise instead.

        Raises:
            PolicyError: with ``strict``, the profile is of another model, dtype or version.
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
            log.warning("vlcache: continuing without a profile: %s", misfit)
        return None

"""Policy, budget, profile and salt of calls: those of the options, or others for the calls of a context."""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile
from vlcache_fx.runtime.context_value import ContextValue

log = logging.getLogger("vlcache_fx")


@dataclass(frozen=True)
class CallSettings:
    """Settings of a call; each as in ``Options``, the profile loaded."""

    policy: Policy
    budget: float
    profile: Profile | None
    salt: str = ""


class ContextSettings:
    """The settings of each context: of a thread or a task of asyncio.

    Attributes:
        default: settings of contexts without settings of their own.
    """

    def __init__(self, default: CallSettings) -> None:
        self.default = default
        self._own: ContextValue[CallSettings] = ContextValue()
        self._misfit: str | None = None

    @property
    def current(self) -> CallSettings:
        """The settings of this context's next call."""
        return self._own.get() or self.default

    def using(self, settings: CallSettings) -> AbstractContextManager[None]:
        """Use ``settings`` for calls that this context makes in the body."""
        return self._own.using(settings)

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

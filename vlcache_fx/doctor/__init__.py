"""Checks of an installation: what is there, whether it works, and what to do about it."""

from vlcache_fx.doctor.all_checks import checklist
from vlcache_fx.doctor.check import Check, Status

__all__ = ["Check", "Status", "checklist"]

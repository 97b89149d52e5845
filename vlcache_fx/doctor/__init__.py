"""Checks of an installation: what is there, whether it works, and what to do about it."""

from vlcache_fx.doctor.check import Check, Status
from vlcache_fx.doctor.checklist import checklist

__all__ = ["Check", "Status", "checklist"]

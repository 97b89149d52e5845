"""Policies: from facts about a reused span to the rows that each layer recomputes. Independent of graphs.

One policy per file; the file's name is the registered name. Other packages add policies with an entry point
in the group ``vlcache_fx.policies``.
"""

# The folder is at the top of the repository, so an interpreter started there could import ``policies``, and
# every class would exist twice.
if __name__ != "vlcache_fx.policies":
    raise ImportError("import vlcache_fx.policies, not policies")

from vlcache_fx.policies.base import Deviation, Policy, ProbedSpan, ProbingPolicy, SpanContext
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy, known_policies

__all__ = [
    "Deviation",
    "Policy",
    "ProbedSpan",
    "ProbingPolicy",
    "Profile",
    "SpanContext",
    "get_policy",
    "known_policies",
]

"""Layer-importance policies: which rows of a reused span every layer recomputes.

One policy per file, the file's name is the registered name. Others are added by packages that declare an
entry point in the group ``vlcache_fx.policies``.
"""

# The folder lies at the top of the repository, so an interpreter started there could import it as `policies`,
# and every class would exist twice. Refuse.
if __name__ != "vlcache_fx.policies":
    raise ImportError("import vlcache_fx.policies, not policies")

from vlcache_fx.policies.base import Deviation, Policy, ProbingPolicy
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy, known_policies

__all__ = ["Deviation", "Policy", "ProbingPolicy", "Profile", "get_policy", "known_policies"]

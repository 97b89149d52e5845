"""A pass of the user in a standard pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlcache_fx.errors import OptionError

if TYPE_CHECKING:
    from vlcache_fx.passes.base import Pass


@dataclass(frozen=True)
class InsertedPass:
    """A user's pass and its position in a standard pipeline (see ``vlcache_fx.passes.standard``).

    Attributes:
        step: a ``vlcache_fx.passes.Pass`` object. Its ``fingerprint`` becomes part of the keys of donors.
        pipeline: name of the pipeline: ``"cleanup"``, ``"cold"``, ``"warm"`` or ``"decode"``.
        before, after: name of the pass before or after which ``step`` runs; exactly one of the two.

    Raises:
        OptionError: ``step`` is not a pass object, or not exactly one of ``before`` and ``after`` is given.
    """

    step: Pass
    pipeline: str
    before: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.step, type) or not callable(getattr(self.step, "run", None)):
            raise OptionError(f"option passes: {self.step!r} is not a pass object, an instance of Pass")
        if (self.before is None) == (self.after is None):
            raise OptionError(
                f"option passes: {self.step.name!r} needs either before= or after= with the name of a pass"
            )

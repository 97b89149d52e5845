"""The standard pipelines as options change them: with passes of the user, and with dumps of graphs."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vlcache_fx.errors import OptionError, PassError
from vlcache_fx.options import InsertedPass, Options
from vlcache_fx.passes.pipeline import Pipeline
from vlcache_fx.passes.standard import CLEANUP, COLD, DECODE_STEP, WARM

DUMP_VARIABLE = "VLCACHE_DUMP_GRAPHS"
"""The environment variable that stands for the option ``dump_graphs``."""


@dataclass(frozen=True)
class Pipelines:
    """What graphs go through.

    Attributes:
        cleanup: every graph, before analysis.
        cold, warm: the two programs of a decoder's prefill.
        decode: a decoding step.
    """

    cleanup: Pipeline = CLEANUP
    cold: Pipeline = COLD
    warm: Pipeline = WARM
    decode: Pipeline = DECODE_STEP

    def inserting(self, one: InsertedPass) -> "Pipelines":
        """With a pass of the user.

        Raises:
            OptionError: there is no such pipeline, or no such pass in it; lists the names.
        """
        names = [field.name for field in fields(self)]
        if one.pipeline not in names:
            raise OptionError(
                f"option passes: no pipeline is named {one.pipeline!r}; there are {', '.join(names)}"
            )
        pipeline: Pipeline = getattr(self, one.pipeline)
        try:
            changed = pipeline.inserting(one.step, before=one.before, after=one.after)
        except PassError as error:
            raise OptionError(f"option passes, pipeline {one.pipeline!r}: {error.detail}") from error
        return replace(self, **{one.pipeline: changed})


def configured(options: Options) -> Pipelines:
    """The pipelines for these options.

    Raises:
        OptionError: see ``Pipelines.inserting``.
    """
    pipelines = Pipelines()
    for one in options.passes:
        pipelines = pipelines.inserting(one)
    folder = options.dump_graphs or os.environ.get(DUMP_VARIABLE)
    if not folder:
        return pipelines
    return Pipelines(
        *(replace(getattr(pipelines, field.name), dump=Path(folder)) for field in fields(pipelines))
    )

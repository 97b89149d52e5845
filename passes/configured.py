"""The standard pipelines with the changes of the options ``passes`` and ``dump_graphs``."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vlcache_fx.errors import OptionError, PassError
from vlcache_fx.inserted_pass import InsertedPass
from vlcache_fx.options import Options
from vlcache_fx.passes.pipeline import Pipeline
from vlcache_fx.passes.standard import CLEANUP, COLD, DECODE_STEP, WARM

DUMP_VARIABLE = "VLCACHE_DUMP_GRAPHS"
"""Environment variable with the folder of dumps, for when the option ``dump_graphs`` is None."""


@dataclass(frozen=True)
class Pipelines:
    """The pipelines of a compilation.

    Attributes:
        cleanup: pipeline of every graph, before analysis.
        cold, warm: pipelines of the two programs of a prefill.
        decode: pipeline of a decoding step.
    """

    cleanup: Pipeline = CLEANUP
    cold: Pipeline = COLD
    warm: Pipeline = WARM
    decode: Pipeline = DECODE_STEP

    def inserting(self, insertion: InsertedPass) -> "Pipelines":
        """Return pipelines with a user's pass.

        Raises:
            OptionError: there is no such pipeline, or no such pass in it; lists the valid names.
        """
        names = [field.name for field in fields(self)]
        name = insertion.pipeline
        if name not in names:
            raise OptionError(
                f"option passes: no pipeline is named {name!r}; the pipelines are: {', '.join(names)}"
            )
        pipeline: Pipeline = getattr(self, name)
        try:
            changed = pipeline.inserting(insertion.step, before=insertion.before, after=insertion.after)
        except PassError as error:
            raise OptionError(f"option passes, pipeline {name!r}: {error.detail}") from error
        return replace(self, **{name: changed})


def configured(options: Options) -> Pipelines:
    """Return the pipelines for ``options``.

    Raises:
        OptionError: see ``Pipelines.inserting``.
    """
    pipelines = Pipelines()
    for insertion in options.passes:
        pipelines = pipelines.inserting(insertion)
    folder = options.dump_graphs or os.environ.get(DUMP_VARIABLE)
    if not folder:
        return pipelines
    return Pipelines(
        *(replace(getattr(pipelines, field.name), dump=Path(folder)) for field in fields(pipelines))
    )

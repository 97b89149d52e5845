"""Log the graph before and after each pass of a pipeline, in three places.

- A folder (the option ``dump_graphs`` or the environment variable ``VLCACHE_DUMP_GRAPHS``): one subfolder per
  program, with one file for each pass that changed the graph. ``diff`` two consecutive files.
- Torch's logs: ``TORCH_LOGS="+vlcache_fx.passes"``, with the time of each pass.
- Torch's structured trace (``TORCH_TRACE``), for ``tlparse``.
"""

import itertools
import logging
from pathlib import Path

from torch._logging._internal import trace_structured
from torch.fx import GraphModule
from torch.fx._utils import lazy_format_graph_code

from vlcache_fx.errors import OptionError

_log = logging.getLogger(__name__)


class GraphLog:
    """Log of the graphs of one run of a pipeline.

    Args:
        pipeline: name of the pipeline.
        root: folder for dumps, or None.

    Raises:
        OptionError: ``root`` is not writable.
    """

    def __init__(self, pipeline: str, root: Path | None) -> None:
        self._pipeline = pipeline
        try:
            self._folder = None if root is None else _new_folder(root, pipeline)
        except OSError as error:
            raise OptionError(f"option dump_graphs: cannot write to {root}: {error}") from error

    def show(self, number: int, step: str, module: GraphModule) -> None:
        """Log the graph after pass ``step``, number ``number`` from 1; number 0 is the original graph."""
        name = f"{number:02}_{step}"
        title = f"vlcache_{self._pipeline}_{name}"

        def text() -> str:
            return module.print_readable(print_output=False)

        _log.debug("%s", lazy_format_graph_code(title, module))
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": title, "encoding": "string"},
            payload_fn=text,
            expect_trace_id=False,
        )
        if self._folder is not None:
            (self._folder / f"{name}.py").write_text(text(), encoding="utf-8")


def _new_folder(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(len(list(root.iterdir()))):
        folder = root / f"{number:04}_{name}"
        try:
            folder.mkdir()
        except FileExistsError:  # created by another process
            continue
        return folder
    raise AssertionError("unreachable")

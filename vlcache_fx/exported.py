"""Reuse for programs that ``torch.export`` made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from vlcache_fx.backend import rewrite
from vlcache_fx.capture import InputKind, capture_exported
from vlcache_fx.capture.exported import bound_tensors, given_places
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.report import Report


def compile_exported(program: ExportedProgram, **options: Any) -> "ExportedDecoder":
    """Run an exported language model with reuse: one export with a dynamic length serves all prompts.

    Args:
        program: of a model that merges encoder features into its token embeddings, or that takes embeddings
            in which spans are marked (``mark_spans``). Its parameters and buffers stay its own.
        **options: see ``Options``; ``dynamic`` says nothing here.

    Raises:
        OptionError: an option is unknown or has a bad value.
        UnsupportedGraphError: with ``strict``, a program that cannot be rewritten.
    """
    return ExportedDecoder(program, Engine(Options.parse(options)))


class ExportedDecoder:
    """An exported program with reuse; called as the exported module was.

    Attributes:
        vlcache: the engine: reports, statistics, other settings.
    """

    def __init__(self, program: ExportedProgram, engine: Engine) -> None:
        self.vlcache = engine
        self._in_spec, self._out_spec = program.call_spec.in_spec, program.call_spec.out_spec
        self._module, self._places = program.module(), given_places(program)
        self._bound = bound_tensors(program)
        self._refusal: UnsupportedGraphError | None = None
        try:
            captured = capture_exported(program)
            self._forms = [node.meta["val"] for node in captured.placeholders]
            self._run = rewrite(captured, engine, self._unmodified)
        except UnsupportedGraphError as refusal:
            self._refusal = refusal
            engine.refuse(refusal)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program's results. Arguments that it does not cover raise its own error."""
        given = self._flat(args, kwargs)
        ...

"""Cache of structures compiled with Inductor, each once for all sizes.

A structure is compiled with symbolic sizes of at least 2. The compiler may assume further conditions on
sizes; they are collected from the shape environment and checked at every call. Where a condition fails, or a
size is 0 or 1, which compilers specialise, another *variant* is compiled for sizes like those of the call.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from vlcache_fx.compiling import compiling, missing_tool
from vlcache_fx.errors import LoweringError
from vlcache_fx.ir.sizes import hint
from vlcache_fx.lowering.base import Decompositions
from vlcache_fx.lowering.disk_cache import Compilations
from vlcache_fx.lowering.expressions import compile_expressions
from vlcache_fx.lowering.fingerprint import Structure
from vlcache_fx.lowering.variant import CONFIG_PATCHES, Runner, Variant, compile_variant

__all__ = ["CompileCache", "CompileStats", "CompiledStructure"]

_log = logging.getLogger(__name__)


@dataclass
class CompileStats:
    """Statistics of a cache.

    Attributes:
        compilations: ``(segment, seconds)`` of every compilation, variants included.
        hits: number of segments whose structure was compiled before.
        loaded: number of compilations whose code came from torch's cache on disk.
        variants: number of compilations for sizes that broke a condition of an earlier one.
        conditions: per compiled segment, the conditions on sizes that its code assumes, besides "at least 2".
    """

    compilations: list[tuple[str, float]] = field(default_factory=list)
    hits: int = 0
    loaded: int = 0
    variants: int = 0
    conditions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Total time of the compilations."""
        return sum(seconds for _, seconds in self.compilations)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of compilations, of those that were loaded, and of hits."""
        return len(self.compilations), self.loaded, self.hits

    def since(self, before: tuple[int, int, int]) -> str:
        """Return in words what was compiled since ``counts`` was ``before``; empty if no segment was."""
        compiled, loaded, hits = (now - then for now, then in zip(self.counts, before, strict=True))
        if not compiled + hits:
            return ""
        words = [f"{compiled - loaded} of {compiled + hits} segments compiled"]
        words += [f"{loaded} loaded from disk"] if loaded else []
        return ", ".join(words)


class CompileCache:
    """Compiled structures, shared by all programs of one backend. Thread-safe.

    Args:
        options: ``options`` of ``torch._inductor.standalone_compile``, such as
            ``{"config_patches": {"max_autotune": True}}``.
        max_variants: limit of variants per structure; further sizes run uncompiled.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, *, max_variants: int = 8) -> None:
        given = dict(options or {})
        self.options = {**given, "config_patches": {**CONFIG_PATCHES, **given.get("config_patches", {})}}
        self.max_variants = max_variants
        self.stats = CompileStats()
        self._compiled: dict[str, CompiledStructure] = {}
        self._warned: set[str] = set()

    def get(
        self, structure: Structure, name: str, decompositions: Decompositions | None = None
    ) -> "CompiledStructure":
        """Return the compiled structure; it is compiled at most once.

        Args:
            structure: its key must cover the decompositions and everything else that code depends on.
            name: name in logs and statistics.
            decompositions: operators to replace by ATen before compilation.
        """
        with compiling():
            found = self._compiled.get(structure.key)
            if found is None:
                found = CompiledStructure(self, structure, name, decompositions or {})
                self._compiled[structure.key] = found
            else:
                self.stats.hits += 1
            return found

    def warn_once(self, text: str) -> None:
        """Log a warning the first time."""
        if text not in self._warned:
            self._warned.add(text)
            _log.warning("%s", text)

    def clear(self) -> None:
        """Drop all compiled structures; lowered programs keep theirs."""
        with compiling():
            self._compiled.clear()


class CompiledStructure:
    """A structure and its variants: a function from a list of arguments to a sequence of outputs."""

    def __init__(
        self, cache: CompileCache, structure: Structure, name: str, decompositions: Decompositions
    ) -> None:
        self.cache, self.structure, self.name, self.decompositions = cache, structure, name, decompositions
        self._read = compile_expressions(structure.symbols, structure.sources, "a")
        examples = {symbol: hint(index) for index, symbol in enumerate(structure.symbols)}
        try:
            first = self._compile(examples)
        except Exception as error:
            if examples == structure.examples or missing_tool(error) is not None:
                raise
            first = self._compile(structure.examples)
        self._variants: tuple[Variant, ...] = (first,)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        sizes = self._read(args)
        for variant in self._variants:
            if variant.holds(sizes):
                args[:0] = sizes
                return variant.run(args)
        run = self._variant(sizes)
        args[:0] = sizes
        return run(args)

    def _variant(self, found: tuple[int, ...]) -> Runner:
        with compiling():
            for variant in self._variants:  # another thread may have compiled it
                if variant.holds(found):
                    return variant.run
            sizes = dict(zip(self.structure.symbols, found, strict=True))
            if len(self._variants) >= self.cache.max_variants:
                _log.warning("vlcache: %s has too many variants, running uncompiled for %s", self.name, sizes)
                return self._uncompiled(len(found))
            _log.info("vlcache: compiling another variant of %s for the sizes %s", self.name, sizes)
            try:
                made = self._compile(sizes)
            except Exception as error:
                missing = missing_tool(error)
                if missing is not None:  # earlier variants came from torch's cache on disk
                    self.cache.warn_once(f"vlcache: running some sizes uncompiled: {missing}")
                    return self._uncompiled(len(found))
                raise LoweringError(f"segment {self.name!r}, sizes {sizes}: {error}") from error
            self.cache.stats.variants += 1
            self._variants = (*self._variants, made)
            return made.run

    def _uncompiled(self, num_sizes: int) -> Runner:
        module = self.structure.module
        return lambda values: module(*values[num_sizes:])

    def _compile(self, examples: Mapping[sympy.Symbol, int]) -> Variant:
        start, programs = time.perf_counter(), Compilations()
        _log.debug("vlcache: compiling %s", self.name)
        made = compile_variant(self.structure, examples, self.decompositions, self.cache.options)
        stats, elapsed_s = self.cache.stats, time.perf_counter() - start
        is_loaded = bool(programs.num_found)
        stats.loaded += is_loaded
        _log.debug("vlcache: %s %s in %.1f s", "loaded" if is_loaded else "compiled", self.name, elapsed_s)
        stats.compilations.append((self.name, elapsed_s))
        stats.conditions.setdefault(self.name, []).extend(map(str, made.conditions))
        return made

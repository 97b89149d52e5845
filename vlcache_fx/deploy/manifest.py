"""``manifest.json``: what an exported folder holds, and how one request is wired through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import blake3

from vlcache_fx.deploy.folder_checks import check_manifest
from vlcache_fx.deploy.specs import (
    EncoderGraph,
    EngineSpec,
    FileSpec,
    GraphSpec,
    ProgramGraph,
    PrologueGraphs,
)
from vlcache_fx.errors import ExportError
from vlcache_fx.spec.decoder import DecoderSpec

MANIFEST = "manifest.json"
FORMAT = 3


@dataclass(frozen=True)
class Manifest:
    """Everything about an exported folder.

    Attributes:
        format: version of this description.
        library_version: of vlcache_fx that wrote it.
        model: class of the model.
        dtype: of its donors.
        opset: of the graphs.
        policy, budget: that the layer groups were made for; sessions take them as defaults.
        profile_fingerprint: of the profile that was used, if any.
        graphs: by name.
        cold, warm: the two prefill programs.
        encoders: tried in order.
        inputs: of the prefill graphs, by name, in the order of the decoder's indices.
        prologue: the graphs that run before the decoder.
        decoder: facts for the runtime.
        decode: name of the graph of one decoding step; None where there is none.
        engines: by name of the graph.
        wiring: the steps of one request, in words.
        report: which nodes became lookups, what is restricted, what was hoisted, what was not exported.
        files: everything else in the folder.
        digest: BLAKE3 of all of the above.
    """

    format: int
    library_version: str
    model: str
    dtype: str
    opset: int
    policy: str
    budget: float
    profile_fingerprint: str | None
    graphs: dict[str, GraphSpec]
    cold: ProgramGraph
    warm: ProgramGraph
    encoders: tuple[EncoderGraph, ...]
    inputs: tuple[str, ...]
    prologue: PrologueGraphs
    decoder: DecoderSpec
    decode: str | None
    engines: dict[str, EngineSpec]
    wiring: tuple[str, ...]
    report: dict[str, Any]
    files: dict[str, FileSpec]
    digest: str = ""

    def save(self, directory: Path) -> Manifest:
        """Write it, with the digests of the folder's files; returns what was written."""
        files = {path.name: file_spec(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
        plain = replace(self, files=files, digest="")
        whole = replace(plain, digest=blake3.blake3(_adapter().dump_json(plain)).hexdigest())
        (directory / MANIFEST).write_bytes(_adapter().dump_json(whole, indent=2) + b"\n")
        return whole

    @staticmethod
    def load(directory: str | Path, *, verify: Literal["files", "sizes"] = "files") -> Manifest:
        """Read and check a folder.

        Args:
            directory: what ``export`` wrote.
            verify: whether the bytes of all files are read and compared, or their sizes alone.

        Raises:
            ExportError: no such folder or manifest, one of another format, names of files outside of the
                folder or sizes that cannot be, or files and manifest that are not those that were written.
        """
        adapter = _adapter()  # says so where pydantic is missing
        from pydantic import ValidationError

        path = Path(directory) / MANIFEST
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExportError(
                f"{directory} is no exported folder: {path.name} cannot be read ({error})"
            ) from error
        try:
            manifest: Manifest = adapter.validate_json(content, extra="forbid")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ExportError(f"{path} is no manifest of this version: {place}: {first['msg']}") from error
        if manifest.format != FORMAT:
            raise ExportError(
                f"{path} has format {manifest.format}; this version reads {FORMAT}: export again"
            )
        expected = blake3.blake3(adapter.dump_json(replace(manifest, digest=""))).hexdigest()
        if manifest.digest != expected:
            raise ExportError(f"{path} was changed after it was written (its digest does not fit)")
        check_manifest(manifest, path.parent)
        for name, spec in manifest.files.items():
            _check_file(path.parent / name, spec, verify)
        return manifest


def _check_file(path: Path, spec: FileSpec, verify: str) -> None:
    if not path.is_file():
        raise ExportError(f"{path} is missing: the manifest lists it")
    if path.stat().st_size != spec.size_bytes or (verify == "files" and file_spec(path) != spec):
        raise ExportError(f"{path} is not the file that was exported: its content does not fit the manifest")


def file_spec(path: Path) -> FileSpec:
    """Size and digest of a file."""
    return FileSpec(path.stat().st_size, blake3.blake3().update_mmap(path).hexdigest())


def _adapter() -> Any:
    try:
        from pydantic import TypeAdapter
    except ImportError as error:
        raise missing("pydantic", "onnx") from error
    return TypeAdapter(Manifest)


def missing(package: str, extra: str) -> ExportError:
    """The error for a package that is not installed."""
    return ExportError(f"{package} is not installed; pip install 'vlcache_fx[{extra}]' brings it")

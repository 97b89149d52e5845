"""``manifest.json``: the contents of an exported folder, and the steps of a request."""

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
    """Description of an exported folder.

    Attributes:
        format: version of the manifest's format.
        library_version: version of vlcache_fx that wrote it.
        model: class of the model.
        dtype: dtype of donors.
        opset: ONNX opset of the graphs.
        policy, budget: basis of the layer groups, and defaults of sessions.
        profile_fingerprint: fingerprint of the profile's model; None without a profile.
        graphs: name -> graph.
        cold, warm: the two prefill programs.
        encoders: the first match encodes an item.
        inputs: names of the prefill graphs' inputs; the decoder's indices refer to them.
        prologue: the graphs that run before the decoder.
        decoder: the decoder's spec.
        decode: name of the graph of a decoding step; None if there is none.
        engines: name of a graph -> its engine.
        wiring: the steps of a request, in words.
        report: see ``ExportReport``.
        files: name -> size and digest of every other file.
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
        """Write the manifest with the digests of the folder's files; return it."""
        files = {path.name: file_spec(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
        plain = replace(self, files=files, digest="")
        signed = replace(plain, digest=blake3.blake3(_adapter().dump_json(plain)).hexdigest())
        (directory / MANIFEST).write_bytes(_adapter().dump_json(signed, indent=2) + b"\n")
        return signed

    @staticmethod
    def load(directory: str | Path, *, verify: Literal["files", "sizes"] = "files") -> Manifest:
        """Read and check a folder.

        Args:
            directory: a folder that ``export`` wrote.
            verify: compare the content of all files, or only their sizes.

        Raises:
            ExportError: the folder or manifest is missing, has another format, contains bad names or sizes,
                or changed after the export.
        """
        adapter = _adapter()  # first: raises a clear error without pydantic
        from pydantic import ValidationError

        path = Path(directory) / MANIFEST
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ExportError(
                f"{directory} is not an exported folder: cannot read {path.name} ({error})"
            ) from error
        try:
            manifest: Manifest = adapter.validate_json(content, extra="forbid")
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise ExportError(f"{path} is not a valid manifest: {field}: {first['msg']}") from error
        if manifest.format != FORMAT:
            raise ExportError(
                f"{path} has format {manifest.format}; this version reads {FORMAT}: export again"
            )
        expected = blake3.blake3(adapter.dump_json(replace(manifest, digest=""))).hexdigest()
        if manifest.digest != expected:
            raise ExportError(f"{path} was changed after the export: its digest does not match")
        check_manifest(manifest, path.parent)
        for name, spec in manifest.files.items():
            _check_file(path.parent / name, spec, verify)
        return manifest


def _check_file(path: Path, spec: FileSpec, verify: str) -> None:
    if not path.is_file():
        raise ExportError(f"{path} is missing, but the manifest lists it")
    if path.stat().st_size != spec.size_bytes or (verify == "files" and file_spec(path) != spec):
        raise ExportError(f"{path} was changed after the export: its content does not match the manifest")


def file_spec(path: Path) -> FileSpec:
    """Return size and digest of a file."""
    return FileSpec(path.stat().st_size, blake3.blake3().update_mmap(path).hexdigest())


def _adapter() -> Any:
    try:
        from pydantic import TypeAdapter
    except ImportError as error:
        raise missing("pydantic", "onnx") from error
    return TypeAdapter(Manifest)


def missing(package: str, extra: str) -> ExportError:
    """Create the error for a package that is not installed."""
    return ExportError(f"{package} is not installed: pip install 'vlcache_fx[{extra}]'")

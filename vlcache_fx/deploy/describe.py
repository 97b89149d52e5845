"""Report of an export, and the steps that connect its graphs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import ProgramGraph
from vlcache_fx.ir.refusal import source_line, without_folders
from vlcache_fx.passes import Program
from vlcache_fx.spec.slots import Donor


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
        directory: the exported folder.
        size_bytes: total size of its files.
        files: name -> bytes.
        lookups: per donor slot, the graph node whose rows it contains and the node's source line.
        restricted: per layer, the number of nodes that run on the chosen rows, on rows that only need keys
            and values, and on all tokens.
        hoisted: inputs of the warm graph that replace lookups and plans.
        refused: graphs that could not be exported, with reasons.
        engines: name -> bytes and seconds of the build.
    """

    directory: str
    size_bytes: int
    files: dict[str, int]
    lookups: tuple[dict[str, Any], ...]
    restricted: tuple[dict[str, int], ...]
    hoisted: tuple[str, ...]
    refused: tuple[dict[str, str], ...]
    engines: dict[str, dict[str, float]]

    @classmethod
    def of(cls, manifest: Manifest, directory: Path) -> ExportReport:
        """Create the report of a manifest."""
        files = {name: spec.size_bytes for name, spec in manifest.files.items()}
        return cls(
            directory=str(directory),
            size_bytes=sum(files.values()),
            files=files,
            lookups=tuple(manifest.report["lookups"]),
            restricted=tuple(manifest.report["restricted"]),
            hoisted=tuple(manifest.report["hoisted"]),
            refused=tuple(manifest.report["refused"]),
            engines={
                name: {"size_bytes": files[engine.file], "build_seconds": engine.build_seconds}
                for name, engine in manifest.engines.items()
            },
        )

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)


def describe(
    facts: DecoderFacts, warm: Program, spec: ProgramGraph, refused: list[dict[str, str]]
) -> dict[str, Any]:
    """Return the manifest's ``report``."""
    segments = Counter(node.meta.get("segment") for node in warm.graph.nodes)
    restricted = []
    for index, layer in enumerate(facts.layers):
        restricted.append(
            {
                "layer": index,
                "query_rows": len(layer.q_part),
                "key_value_rows": len(layer.kv_part),
                "all_tokens": len(layer.full_part),
                "in_warm_graph": segments[f"layer.{index}"],
            }
        )
    data = len(spec.inputs) - len(spec.program.slots)
    return {
        "lookups": [
            {
                "slot": str(frontier.slot),
                "layer": frontier.layer,
                "node": frontier.node.name,
                "source_line": without_folders(source_line(frontier.node)),
                "input": str(Donor(frontier.slot)),
            }
            for frontier in facts.frontiers
        ],
        "restricted": restricted,
        "hoisted": list(dict.fromkeys(name for name in spec.inputs[data:] if name is not None)),
        "refused": [{name: without_folders(text) for name, text in graph.items()} for graph in refused],
    }


def wiring(has_decode: bool) -> tuple[str, ...]:
    """Describe the steps of one request."""
    steps = [
        "encoder: run it for each item with new pixels; store its outputs under the pixels' digest. "
        "The outputs of all items, concatenated, are inputs of the prefill graphs under the same names.",
        "spans: returns the tokens that the items fill. A donor's key is the digest of its feature rows, the "
        "values of decoder.leaves at its tokens (positions relative to the first token), the masks of its "
        "tokens, decoder.model_fingerprint, decoder.computation, decoder.layout, and a salt.",
        "prefill_cold: for a prompt without donors. recorded.<layer>.k and .v, cut to an item's tokens, are "
        "its donor. rows.tail and results select the tokens that need logits.",
        "prefill_warm: rows.<group> are the tokens that the layers of a group compute, sorted: text, new "
        "items, and the policy's rows. donor.<layer>.k and .v are the donor rows of all reused items in "
        "order. source.<group> has, per token, v >= 0 for row v of the donors or -1 - j for computed row j. "
        "keep.<a>.<b> are the indices of the rows of group b among those of group a.",
        "Both prefill graphs return logits and, for all tokens, the keys and values for decoding. Never "
        "store what prefill_warm records, unless it reused nothing but an identical prefix.",
    ]
    if has_decode:
        steps.append(
            "decode: one token, its position, past.<layer>.key and .value (present.* of the previous step)."
        )
    return tuple(steps)

"""What an export did, and how its graphs are wired."""

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
    """What was exported.

    Attributes:
        directory: where it lies.
        size_bytes: of all files.
        files: name -> bytes.
        lookups: per donor slot, the graph node whose rows it holds and where that comes from.
        restricted: per layer, how many nodes run on the chosen rows, on rows that need keys and values alone,
            and on all tokens.
        hoisted: inputs of the warm graph that lookups and plans became.
        refused: graphs that could not be exported, and why.
        engines: name -> bytes and seconds.
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
        """Of a manifest."""
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
        """JSON-serialisable form."""
        return asdict(self)


def describe(
    facts: DecoderFacts, warm: Program, spec: ProgramGraph, refused: list[dict[str, str]]
) -> dict[str, Any]:
    """The part of a manifest that says what became of the graph."""
    places = Counter(node.meta.get("segment") for node in warm.graph.nodes)
    restricted = []
    for index, layer in enumerate(facts.layers):
        restricted.append(
            {
                "layer": index,
                "query_rows": len(layer.q_part),
                "key_value_rows": len(layer.kv_part),
                "all_tokens": len(layer.full_part),
                "in_warm_graph": places[f"layer.{index}"],
            }
        )
    data = len(spec.inputs) - len(spec.program.slots)
    return {
        "lookups": [
            {
                "slot": str(one.slot),
                "layer": one.layer,
                "node": one.node.name,
                "source_line": without_folders(source_line(one.node)),
                "input": str(Donor(one.slot)),
            }
            for one in facts.frontiers
        ],
        "restricted": restricted,
        "hoisted": list(dict.fromkeys(name for name in spec.inputs[data:] if name is not None)),
        "refused": [{name: without_folders(text) for name, text in one.items()} for one in refused],
    }


def wiring(has_decode: bool) -> tuple[str, ...]:
    """The steps of one request."""
    steps = [
        "encoder: run it for each item whose pixels are new; keep what it gives under the pixels' digest. "
        "Its outputs, items one behind the other, are inputs of the prefill graphs under the same names.",
        "spans: tells which tokens the items fill. The key of a donor is the digest of its feature rows, of "
        "what decoder.leaves are at its tokens (positions relative to the first one), of what masks let them "
        "see, of decoder.model_fingerprint, decoder.computation and decoder.layout, and of a salt.",
        "prefill_cold: for a prompt none of whose items has a donor. recorded.<layer>.k and .v, cut to an "
        "item's tokens, are its donor. rows.tail and results say which tokens logits are needed for.",
        "prefill_warm: rows.<group> are the tokens that the layers of a group compute, sorted: text, new "
        "items, and what the policy chose. donor.<layer>.k and .v are the stored rows of all known items in "
        "order. source.<group> has, per token, v >= 0 for row v of the donors or -1 - j for computed row j. "
        "keep.<a>.<b> are the places of the rows of group b among those of group a.",
        "Both prefill graphs give logits and, for all tokens, the keys and values that decoding goes on "
        "with. What prefill_warm records is never stored, unless all it reused was an identical prefix.",
    ]
    if has_decode:
        steps.append(
            "decode: one token, its position and past.<layer>.key and .value (present.* of the step before)."
        )
    return tuple(steps)

"""Spec of an exported decoder: inputs by name, weights inside the graph and in fingerprints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from vlcache_fx.compiler.builders.decoder import Decoder, describe_decoder
from vlcache_fx.deploy.trace import ExportInput
from vlcache_fx.ir.refusal import without_folders
from vlcache_fx.runtime.donors.recent_keys import Fingerprints
from vlcache_fx.spec.slots import StoredSlot


def describe_export(
    found: ExportInput, recorded: Sequence[StoredSlot], groups: tuple[int, ...], passes: str = ""
) -> Decoder:
    """Describe the decoder by its named inputs, without weights.

    Args:
        found: the traced model.
        recorded: donor slots that its programs record.
        groups: number of layers in each group of consecutive layers that compute the same rows.
        passes: fingerprint of the user's passes. Sessions do not know these, so the layout, which is part of
            keys, has it.
    """
    named = [
        node for node, name in zip(found.decoder.placeholders, found.inputs, strict=True) if name is not None
    ]
    decoder = describe_decoder(found.decoder, found.facts, recorded, groups, named)
    spec, weights = decoder.spec, _fingerprint(found, decoder.computation.weights)
    sites = tuple(
        # An exported prefill starts with an empty cache: key i belongs to token i.
        replace(site, source_line=without_folders(site.source_line), key_moves=())
        for site in spec.masks.sites
    )
    return replace(
        decoder,
        spec=replace(
            spec,
            host_inputs=(),
            tail_varies=False,
            has_past=False,
            layout=" ".join(filter(None, (spec.layout, weights, passes))),
            model_fingerprint=_fingerprint(found, found.facts.weights),
            masks=replace(spec.masks, sites=sites),
        ),
    )


def _fingerprint(found: ExportInput, weights: Sequence[Node]) -> str:
    index = {node: number for number, node in enumerate(found.decoder.placeholders)}
    return Fingerprints().of([found.weights[index[node]][1] for node in weights])

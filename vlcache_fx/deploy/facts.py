"""The runtime's facts of a decoder, in the manifest and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.decoder.computation import computation_of
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import DecoderSpec, LeafSpec, MaskSpec, RowSpec
from vlcache_fx.deploy.trace import ExportInput
from vlcache_fx.ir.refusal import without_folders
from vlcache_fx.plan.selection import RowSelection
from vlcache_fx.policies.base import Policy, ProbingPolicy, SpanContext
from vlcache_fx.policies.profile import Profile
from vlcache_fx.runtime.donors.recent_keys import Fingerprints
from vlcache_fx.runtime.donors.tables import RowForm
from vlcache_fx.runtime.form import DecoderForm
from vlcache_fx.runtime.requests.blocks import PrefixReader
from vlcache_fx.runtime.requests.input_values import LeafForm, Leaves
from vlcache_fx.runtime.requests.masks import MaskCheck, MaskSite
from vlcache_fx.runtime.requests.spans import Identifier
from vlcache_fx.spec.slots import StoredSlot

PROBED_LENGTHS = (64, 400, 2048, 8192)
"""Span lengths at which the policy is asked which layers have the same rows."""


def layer_groups(policy: Policy, num_layers: int, profile: Profile | None, budget: float) -> tuple[int, ...]:
    """Number of layers in each run of layers for which the policy chooses the same rows, at any length.

    A policy that looks at the request may choose anything: each of its layers is a group.
    """
    if isinstance(policy, ProbingPolicy):
        return (1,) * num_layers
    chosen = [
        policy.select(SpanContext(length=length, num_layers=num_layers, budget=budget, profile=profile))
        for length in PROBED_LENGTHS
    ]
    is_new = [
        layer > 0 and any(not torch.equal(rows[layer - 1], rows[layer]) for rows in chosen)
        for layer in range(num_layers)
    ]
    numbers = torch.tensor(is_new).cumsum(0).tolist()
    return tuple(len(list(members)) for _, members in groupby(numbers))


def decoder_spec(
    found: ExportInput,
    form: DecoderForm,
    fingerprint: str,
    spans: Sequence[str],
    masks: Sequence[str],
    leaves: Sequence[str],
) -> DecoderSpec:
    """The facts with indices among the named inputs: weights are none of them.

    Args:
        found: what is exported.
        form: of its decoder.
        fingerprint: of the layers' weights.
        spans, masks, leaves: outputs of the graphs of these names.
    """
    place = {index: number for number, index in enumerate(i for i, name in enumerate(found.inputs) if name)}

    def places(indices: Any) -> tuple[int, ...]:
        return tuple(place[index] for index in sorted(indices))

    check, identifier = MaskCheck.of(found.decoder, found.facts), form.identifier
    computation = computation_of(found.decoder, found.facts)
    index = {node: number for number, node in enumerate(found.decoder.placeholders)}
    others = Fingerprints().of([found.weights[number][1] for number in form.other_weights])
    return DecoderSpec(
        inputs=tuple(name for name in found.inputs if name),
        num_layers=form.num_layers,
        layer_groups=form.groups,
        num_outputs=form.num_outputs,
        tail=None if form.tail is None else form.tail.moved(place).bounds,
        rows={
            str(slot): RowSpec(row.dim, str(row.dtype).removeprefix("torch."), row.sizes)
            for slot, row in form.rows.items()
        },
        layout=f"{form.layout} {others}",
        computation=form.computation,
        model_fingerprint=fingerprint,
        features=tuple(place[index] for index in identifier.features),
        num_merges=identifier.num_merges,
        width=identifier.width,
        embeddings=None if identifier.embeddings is None else place[identifier.embeddings],
        leaves=tuple(
            LeafSpec(
                place[index[leaf.node]] if leaf.node in index else None,
                leaf.token_dim,
                leaf.is_index,
                leaf.is_beside,
                leaf_form.group,
            )
            for leaf, leaf_form in zip(computation.leaves, form.leaves.forms, strict=True)
        ),
        mask_sites=tuple(
            MaskSpec(site.node, without_folders(site.source_line), site.has_mask, site.rule)
            for site in check.sites
        ),
        mask_inputs=places(check.inputs),
        site_of_layer=check.site_of_layer,
        every_layer_has_a_mask=check.every_layer_has_one,
        spans=tuple(spans),
        masks=tuple(masks),
        leaf_outputs=tuple(leaves),
    )


def made_leaves(found: ExportInput) -> list[Node]:
    """The values that keys hold and that are no inputs: the graph ``leaves`` gives them."""
    inputs = set(found.decoder.placeholders)
    leaves = computation_of(found.decoder, found.facts).leaves
    return [leaf.node for leaf in leaves if leaf.node not in inputs]


def decoder_form(
    manifest: Manifest,
    spans: Callable[..., Sequence[Tensor]],
    leaves: Callable[..., Sequence[Tensor]],
    device: torch.device,
) -> DecoderForm:
    """The facts as the runtime takes them.

    Args:
        manifest: of the export.
        spans: from the named inputs to the masks of merges.
        leaves: from the named inputs to the outputs of the graph ``leaves``.
        device: where the inputs are.
    """
    spec = manifest.decoder
    forms = tuple(
        LeafForm(leaf.token_dim, None, leaf.is_index, leaf.is_beside, leaf.group) for leaf in spec.leaves
    )

    def read(args: Sequence[Any]) -> list[Any]:
        made = iter(leaves(*args))
        return [next(made) if leaf.input is None else args[leaf.input] for leaf in spec.leaves]

    return DecoderForm(
        num_layers=spec.num_layers,
        num_outputs=spec.num_outputs,
        num_results=spec.num_outputs,
        writes=(),
        data=tuple(range(len(spec.inputs))),
        tells=(),
        device=device,
        tail=None if spec.tail is None else RowSelection(spec.tail),
        rows={
            StoredSlot.parse(name): RowForm(row.dim, getattr(torch, row.dtype), row.sizes)
            for name, row in spec.rows.items()
        },
        layout=spec.layout,
        computation=spec.computation,
        weights=(),
        model_fingerprint=spec.model_fingerprint,
        identifier=Identifier(
            masks=spans,
            features=spec.features,
            num_merges=spec.num_merges,
            embeddings=spec.embeddings,
            width=spec.width,
        ),
        leaves=Leaves(forms, read),
        prefixes=PrefixReader(spec.embeddings),
        groups=spec.layer_groups,
    )


def mask_check(manifest: Manifest, masks: Callable[..., Sequence[Tensor]]) -> MaskCheck:
    """What is looked at in every call; ``masks`` takes the named inputs."""
    spec = manifest.decoder
    return MaskCheck(
        [MaskSite(site.node, site.source_line, site.has_mask, site.rule) for site in spec.mask_sites],
        [_own_keys] * len(spec.mask_sites),
        masks,
        spec.mask_inputs,
        every_layer_has_one=spec.every_layer_has_a_mask,
        site_of_layer=spec.site_of_layer,
    )


def _own_keys(args: Sequence[Any], num_tokens: int) -> Tensor:  # noqa: ARG001 (a form that others need)
    """Exported prefills begin with an empty cache: key i is that of token i."""
    return torch.arange(num_tokens)

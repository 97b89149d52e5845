"""Plans of a request: which rows each layer recomputes in each prompt."""

from vlcache_fx.errors import PlanError, PolicyError
from vlcache_fx.plan.build import RowChooser, build_plan
from vlcache_fx.plan.jumps import Record, records_of
from vlcache_fx.plan.types import Plan
from vlcache_fx.policies.base import Policy, ProbingPolicy
from vlcache_fx.runtime.donors.donor_dtype import length_of
from vlcache_fx.runtime.programs.probe import first_chooser
from vlcache_fx.runtime.requests.blocks import BLOCK_TOKENS
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.decoder import DecoderSpec


class Planner:
    """Plans requests with the policy, budget and profile in force.

    Args:
        spec: spec of the decoder's graph.
        engine: the settings, and what counts failures.
    """

    def __init__(self, spec: DecoderSpec, engine: ServingState) -> None:
        self._spec, self._engine = spec, engine

    def plans(self, request: Request, chooser: RowChooser | None = None) -> list[Plan] | None:
        """Return a plan per sample; None if planning fails (raised in strict mode).

        The policy chooses rows by default, or the rows of its probe.
        """
        strict = self._engine.options.strict
        settings = self._engine.settings.current
        chooser = chooser or first_chooser(settings.policy, self._spec.rows)
        plans: list[Plan] = []
        first_donor = first_map = 0
        first_tail = int(len(request.samples) > 1)  # zeros stand first, see ``state_tables``
        with request.clock.measure("plan"):
            try:
                self._check_groups(settings.policy)
                profile = self._engine.settings.profile_for(
                    request.model_fingerprint, self._spec.dtype, strict=strict
                )
                rank = self._engine.options.donor_rank
                if profile is not None and profile.curves_by_contexts and profile.donor_rank != rank:
                    profile = profile.for_contexts(1)  # those of several were measured on other donors
                for sample in request.samples:
                    plans.append(
                        build_plan(
                            num_tokens=request.num_tokens,
                            spans=sample.spans,
                            num_layers=self._spec.num_layers,
                            policy=chooser,
                            profile=profile,
                            budget=settings.budget,
                            output_rows=request.positions,
                            strict=strict,
                            prefix=sample.prefix,
                            # A recurrent layer may read padding, where the model does not hide it.
                            padding=sample.padding if request.donors and not self._spec.states else None,
                            first_donor=first_donor,
                            first_map=first_map,
                            first_tail=first_tail,
                            groups=self._spec.layer_groups,
                            records=self._records(request, sample) if self._spec.states else None,
                        )
                    )
                    first_donor += sum(length_of(entry) for entry in sample.donors)
                    hits = [span for span in sample.spans if span.hit and span.start >= sample.prefix]
                    first_map += bool(sample.prefix) + sum(len(span.cuts) - 1 for span in hits)
                    first_tail += bool(sample.prefix) + len(hits)
            except (PlanError, PolicyError) as error:
                if strict:
                    raise
                self._engine.plan_failed(error)
                return None
        return plans

    def _records(self, request: Request, sample: Sample) -> list[Record]:
        """Return the records to record; none where rows are approximate, or depend on earlier calls."""
        if not request.spans or not request.ignores_past or not sample.reuse_is_exact:
            return []
        reused = {span.start for span in sample.spans}
        media = [(item.start, item.length, item.start in reused) for item in sample.media_spans]
        records = records_of(request.num_tokens, media, self._engine.settings.current.budget, BLOCK_TOKENS)
        return [
            Record(max(record.start, sample.prefix), record.end)
            for record in records
            if record.end > sample.prefix
        ]

    def _check_groups(self, policy: Policy) -> None:
        if isinstance(policy, ProbingPolicy) and self._spec.states:
            raise PlanError(
                f"policy {policy.name!r} picks scattered rows; recurrent layers need the first ones"
            )
        if isinstance(policy, ProbingPolicy) and any(count > 1 for count in self._spec.layer_groups):
            raise PlanError(
                f"policy {policy.name!r} needs rows of its own in every layer; these programs share rows in "
                f"groups of {list(self._spec.layer_groups)} layers: make them with this policy"
            )

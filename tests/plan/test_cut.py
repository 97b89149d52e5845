"""A cut plan is unchanged up to the cut and executable after it."""

import pytest
import torch

from vlcache_fx.plan import Span, build_plan
from vlcache_fx.plan.cut import cut_after
from vlcache_fx.policies.full import Full


@pytest.mark.parametrize("outputs", [None, torch.tensor([11]), torch.arange(4, 12)])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_cut_after_keeps_earlier_layers(layer: int, outputs: torch.Tensor | None) -> None:
    plan = build_plan(
        num_tokens=12,
        spans=[Span(0, 2, 6, "key", True)],
        num_layers=5,
        policy=Full(),
        budget=0.0,
        output_rows=outputs,
    )
    cut = cut_after(plan, layer, outputs)
    assert cut.rows[: layer + 1] == plan.rows[: layer + 1]
    assert cut.source[: layer + 1] == plan.source[: layer + 1]
    few = [10, 11] if outputs is None or len(outputs) == 1 else list(range(4, 12))
    assert [rows.tolist() for rows in cut.rows[layer + 1 :]] == [few] * (5 - layer)
    assert cut.rows_per_layer == (*[12] * (layer + 1), *[len(few)] * (5 - layer))
    for before, keep, after in zip(cut.rows[:-1], cut.keep, cut.rows[1:], strict=True):
        assert torch.equal(before[keep], after)
    for rows, source in zip(cut.rows, cut.source, strict=True):
        assert torch.equal(rows[-1 - source[rows]], rows)
        assert (source[source >= 0] < 6).all()  # rows of the donor table

"""Refinement is measured on donors of as many contexts as it says."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # third-party ones; here the output matters
def test_donors_of_more_contexts_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples/refine_donors.py"
    spec = importlib.util.spec_from_file_location("refine_donors", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.main(["--pictures", "1", "--families", "count"])
    assert [(row.contexts, row.prompts) for row in rows] == [(1, 3), (2, 3), (4, 3)]
    assert all(0 < row.mean_kl < 0.1 for row in rows)
    assert len({row.mean_kl for row in rows}) == 3  # other donors, other logits
    assert capsys.readouterr().out.count(" | ") == 4 * 6

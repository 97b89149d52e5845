import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # third-party ones; here the output matters
def test_the_second_time_the_picture_is_reused() -> None:
    path = Path(__file__).parents[2] / "examples/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, second = module.main(lowering="eager", dynamic=True)
    assert first.startswith("cold: ")
    assert second.startswith("warm: ")

import pytest

from .loading import load


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of third parties; the test is about output
def test_quickstart_reuses_the_picture() -> None:
    first, second = load("quickstart").main(lowering="eager", dynamic=True)
    assert first.startswith("cold: ")
    assert second.startswith("warm: ")

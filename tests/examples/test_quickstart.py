import pytest

from .loading import load


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # third-party ones; here the output matters
def test_the_second_time_the_picture_is_reused() -> None:
    first, second = load("quickstart").main(lowering="eager", dynamic=True)
    assert first.startswith("cold: ")
    assert second.startswith("warm: ")

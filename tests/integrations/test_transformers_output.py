"""Progress bars of transformers."""

import pytest

from vlcache_fx.integrations.transformers_output import without_bars

logging = pytest.importorskip("transformers.utils.logging")


@pytest.mark.parametrize("is_shown", [True, False])
def test_bars_are_as_before(is_shown: bool) -> None:
    (logging.enable_progress_bar if is_shown else logging.disable_progress_bar)()
    with without_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() is is_shown
    logging.enable_progress_bar()

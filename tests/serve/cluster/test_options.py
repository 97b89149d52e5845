"""Options of clusters."""

from __future__ import annotations

from typing import Any

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.cluster.options import ClusterOptions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 0}, "replicas=0 is not valid: it must be an integer >= 1"),
        ({"replicas": True}, "replicas=True"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas=2 is not valid: it must be an integer >= 3"),
        ({"replicas": 1, "threads": 0}, "threads=0"),
        ({"replicas": 1, "imbalance": -1}, "imbalance=-1 is not valid: it must be an integer >= 0"),
        ({"replicas": 1, "cpus_per_replica": float("nan")}, "cpus_per_replica=nan"),
        ({"replicas": 1, "gpus_per_replica": -0.5}, "gpus_per_replica=-0.5"),
    ],
)
def test_bad_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ClusterOptions(**given)


def test_most_replicas() -> None:
    assert ClusterOptions(2).most_replicas == 2
    assert ClusterOptions(2, 5).most_replicas == 5

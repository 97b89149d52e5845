"""Two replicas that share donors through a Mooncake Store on the loopback address."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from openai import OpenAI

from vlcache_fx.testing.mooncake_cluster import MooncakeCluster, missing

from .clusters import running
from .test_cluster import QUESTIONS, ask

pytest.importorskip("ray.serve", reason="needs the extra ray: pip install 'vlcache_fx[ray]'")

pytestmark = [pytest.mark.slow, pytest.mark.thorough]  # folders are tested in test_cluster.py


def test_what_one_replica_computed_serves_the_other(tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    (tmp_path / "master").mkdir()
    with MooncakeCluster(tmp_path / "master", lease_ms=200) as shared:
        url = shared.url(f"buffer=64MiB&secret_file={tmp_path}/secret&transfer_ms=10000&timeout_ms=5000")
        stores = ("--store", "memory://", "--store", url)
        with (
            running(tmp_path, "--replicas", "2", *stores) as cluster,
            OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=120) as client,
        ):
            first = {index: ask(client, QUESTIONS[index]) for index in range(3)}
            assert [cached for _, _, cached in first.values()] == [0, 0, 0]
            gone = first[0][1]
            os.kill(cluster.pids[gone], signal.SIGKILL)
            for index, (answer, replica, _) in first.items():
                again, place, cached = ask(client, QUESTIONS[index])
                assert (again, place != gone, cached > 0) == (answer, True, True), (index, replica, place)
            assert cluster.stop() == 0

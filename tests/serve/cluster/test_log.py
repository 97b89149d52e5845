"""The log of replicas, without Ray: what their processes are given, and what they do with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vlcache_fx.log_output import apply_log_variable
from vlcache_fx.serve.cluster.application import replica_actor_options
from vlcache_fx.serve.cluster.options import ClusterOptions
from vlcache_fx.serve.cluster.replica import _show_log

LOG = logging.getLogger("vlcache_fx")


@contextmanager
def new_process(level: str | None = None, *, is_configured: bool = False) -> Iterator[None]:
    """Logging as in a process that has not configured it, but for its root logger with ``is_configured``.

    In the body of tests alone: pytest adds its own handlers before and takes them away after.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOG, "handlers", [])
        patch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()] if is_configured else [])
        patch.delenv("VLCACHE_LOG", raising=False)
        if level is not None:
            patch.setenv("VLCACHE_LOG", level)
        before = LOG.level
        LOG.setLevel(logging.NOTSET)
        apply_log_variable.cache_clear()
        yield
        LOG.setLevel(before)
        apply_log_variable.cache_clear()


def test_replicas_get_the_variable_of_this_process() -> None:
    cluster = ClusterOptions(2, cpus_per_replica=3)
    with new_process():
        assert replica_actor_options(cluster, 0.5) == {"num_cpus": 3, "num_gpus": 0.5}
    with new_process("debug"):
        found = replica_actor_options(cluster, 0.5)
    assert found["runtime_env"] == {"env_vars": {"VLCACHE_LOG": "debug"}}


@pytest.mark.parametrize(
    ("variable", "level"), [(None, logging.INFO), ("debug", logging.DEBUG), ("warning", logging.WARNING)]
)
def test_replicas_log_from_the_level_of_the_variable(variable: str | None, level: int) -> None:
    with new_process(variable):
        _show_log()
        assert (LOG.level, len(LOG.handlers)) == (level, 1)
        _show_log()  # a second replica in the process
        found = len(LOG.handlers)
    assert found == 1


def test_no_message_is_shown_twice() -> None:
    """Where the process has configured logging, the log goes there."""
    with new_process("debug", is_configured=True):
        _show_log()
        found = LOG.level, list(LOG.handlers)
    assert found == (logging.NOTSET, [])

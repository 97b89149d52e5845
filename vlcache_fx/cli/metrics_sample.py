"""A sample of a server's metrics: fetched, parsed, and compared with an earlier one."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vlcache_fx.errors import OptionError

if TYPE_CHECKING:
    from prometheus_client import Metric

TIMEOUT_S = 10.0
BASES = ("", "/", "/v1", "/v1/")
"""Paths of a server's own URL; its metrics are beside them."""

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """All numbers of one scrape.

    Attributes:
        taken_s: when it was taken, in seconds of a clock that never goes back.
        series: by name, labels and value of each series, in the order of the text.
    """

    taken_s: float
    series: Mapping[str, Sequence[tuple[Labels, float]]]

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of a metric's series that have these labels; None if there is no such metric."""
        if name not in self.series:
            return None
        return sum(value for own, value in self.series[name] if labels.items() <= own.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of a metric's series for each value of a label."""
        found: dict[str, float] = {}
        for labels, value in self.series.get(name, ()):
            key = labels.get(label, "")
            found[key] = found.get(key, 0.0) + value
        return found

    def buckets(self, name: str) -> tuple[tuple[float, float], ...]:
        """Return upper bounds and counts of a histogram, cumulative, over all of its series."""
        counts = self.by(f"{name}_bucket", "le")
        return tuple(sorted((float(bound), count) for bound, count in counts.items()))


def metrics_url(url: str) -> str:
    """Return the URL of a server's metrics, given it, or the URL of the server.

    Raises:
        OptionError: it is no URL of HTTP.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise OptionError(f"url={url!r} is not valid: it must be like http://127.0.0.1:8000/metrics")
    return parts._replace(path="/metrics").geturl() if parts.path in BASES else full


def fetch(url: str, timeout_s: float = TIMEOUT_S) -> str:
    """Return the text at a URL.

    Raises:
        OptionError: it cannot be fetched.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:  # noqa: S310 (see metrics_url)
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"status {error.code}"
    except urllib.error.URLError as error:
        reason = str(error.reason)
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        reason = str(error) or type(error).__name__
    raise OptionError(f"cannot read metrics from {url}: {' '.join(reason.split())}")


def parse_sample(text: str, taken_s: float) -> Sample:
    """Parse metrics in the text format of Prometheus.

    Raises:
        OptionError: the parser is not installed, or the text is not that of a server of this package.
    """
    parse = _parser()
    series: dict[str, list[tuple[Labels, float]]] = {}
    try:
        for family in parse(text):
            for sample in family.samples:
                series.setdefault(sample.name, []).append((sample.labels, sample.value))
    except (ValueError, KeyError, IndexError) as error:
        raise OptionError(f"this is no text of Prometheus: {error}") from error
    if not any(name.startswith("vlcache_") for name in series):
        raise OptionError("there are no metrics of vlcache_fx: is this the address of vlcache serve?")
    return Sample(taken_s, series)


def _parser() -> Callable[[str], Iterable[Metric]]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise OptionError("vlcache top needs prometheus_client: pip install 'vlcache_fx[metrics]'") from error
    return text_string_to_metric_families


def increase(now: float | None, before: float | None) -> float | None:
    """Return by how much a counter rose; after a restart of the server, what it has counted since."""
    if now is None or before is None:
        return now
    return now - before if now >= before else now


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Return a quantile of a histogram, as ``histogram_quantile`` of Prometheus estimates it.

    Args:
        buckets: upper bounds and cumulative counts, sorted; the last bound is infinite.
        share: in [0, 1].

    Returns:
        linear between the bounds of its bucket; the largest finite bound if it lies beyond; None if the
        histogram is empty.
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = share * buckets[-1][1]
    for (lower, below), (upper, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= rank and count > below:
            return (
                lower if upper == float("inf") else lower + (upper - lower) * (rank - below) / (count - below)
            )
    return buckets[-1][0]


def new_in_buckets(
    now: Sequence[tuple[float, float]], before: Sequence[tuple[float, float]]
) -> tuple[tuple[float, float], ...]:
    """Return the histogram of what came between two samples; all of it after a restart of the server."""
    earlier = dict(before)
    if any(count < earlier.get(bound, 0.0) for bound, count in now):
        return tuple(now)
    return tuple((bound, count - earlier.get(bound, 0.0)) for bound, count in now)

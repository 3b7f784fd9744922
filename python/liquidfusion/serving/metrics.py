"""What ``/metrics`` tells, in Prometheus' text form."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
_WINDOW = 60.0
"""Seconds over which the rate of finished requests is measured."""


class Metrics:
    """Counters of one server; figures of the engine and of kept conversations are asked for when they are read.

    Parameters
    ----------
    gauges : callable
        Name → (help, value) of figures that go up and down.
    counters : callable
        Name → (help, value) of figures that only grow.
    """

    def __init__(
        self,
        gauges: Callable[[], dict[str, tuple[str, float]]] = dict,
        counters: Callable[[], dict[str, tuple[str, float]]] = dict,
    ) -> None:
        self._gauges, self._counters = gauges, counters
        self._finished: deque[float] = deque(maxlen=10_000)
        self._began = time.monotonic()
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"liquidfusion_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"liquidfusion_{name}", text, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests answered, by endpoint and HTTP status.", ("endpoint", "status"))
        self.conversations = counter(
            "conversations", "Requests that had a kept conversation's beginning, by what came of it.", ("outcome",)
        )
        self.first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS)
        self.between = histogram("time_per_token_seconds", "Between two tokens of one answer.", _PER_TOKEN)
        self.whole = histogram("request_seconds", "From a request's arrival to its last token.", _SECONDS)

    def finished(self, seconds: float) -> None:
        """Count an answer that was given to its end."""
        self.whole.observe(seconds)
        self._finished.append(time.monotonic())

    def rate(self) -> float:
        """Answers per second, over the last minute."""
        now = time.monotonic()
        recent = sum(1 for moment in self._finished if moment > now - _WINDOW)
        return recent / max(1.0, min(_WINDOW, now - self._began))

    def retry_after(self, waiting: int) -> int:
        """Seconds, 1 to 60, in which half of those who wait will have had their turn."""
        rate = self.rate()
        return 60 if not rate else min(60, max(1, round(waiting / rate / 2)))

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks a collector for."""
        for name, (text, value) in self._gauges().items():
            yield _family(GaugeMetricFamily, name, text, value)
        for name, (text, value) in self._counters().items():
            yield _family(CounterMetricFamily, name, text, value)

    def page(self) -> bytes:
        """The text of ``/metrics``."""
        return generate_latest(self.registry)


def _family(kind: Any, name: str, text: str, value: float) -> Metric:
    family: Metric = kind(f"liquidfusion_{name}", text, value=value)
    return family

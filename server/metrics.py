"""What /metrics tells Prometheus: counts, sizes and times, nothing of any text."""

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from server.service import Service

if TYPE_CHECKING:
    from server.answers import Answer

FIRST_TOKEN = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # seconds
WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Load(Collector):
    """What the service itself counts."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for each time that somebody reads the metrics."""
        service, stats = self.service, self.service.computer.scheduler.stats
        running = min(service.load, service.rows)
        yield GaugeMetricFamily("brisk_requests_running", "Requests that have a row", running)
        yield GaugeMetricFamily("brisk_requests_waiting", "Requests that wait for one", service.load - running)
        yield CounterMetricFamily("brisk_requests_cancelled", "Requests whose clients left", service.cancelled)
        yield CounterMetricFamily("brisk_prompt_tokens", "Tokens of prompts", stats.prompt_tokens)
        yield CounterMetricFamily("brisk_cached_tokens", "Those that the cache held", stats.cached_tokens)
        yield CounterMetricFamily("brisk_new_tokens", "Tokens generated", stats.new_tokens)
        yield CounterMetricFamily("brisk_prefill_seconds", "Spent on prompts", stats.prefill_seconds)
        yield CounterMetricFamily("brisk_decode_seconds", "Spent on decode steps", stats.decode_seconds)


class Metrics:
    """All that is measured of one service."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service):
        registry = self.registry = CollectorRegistry()  # not the one that all of a process share
        registry.register(Load(service))
        self.responses = Counter("brisk_http_responses", "HTTP responses", ("path", "status"), registry=registry)
        self.finished = Counter("brisk_finished", "Choices that were finished", ("reason",), registry=registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"brisk_{name}_seconds", text, buckets=buckets, registry=registry)

        self.first_token = seconds("time_to_first_token", "From a request to its first token", FIRST_TOKEN)
        self.whole = seconds("request", "From a request to the end of a choice", WHOLE)
        self.per_token = seconds("time_per_token", "Of a choice, after its first token", PER_TOKEN)

    def count(self, scope: Scope, status: int) -> None:
        """Counts a response; those to paths that do not exist all together, since clients invent them."""
        route = scope.get("route")
        self.responses.labels(getattr(route, "path", "other"), str(status)).inc()

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        return generate_latest(self.registry)


class Timer:
    """Measures one client's request."""

    def __init__(self, metrics: Metrics):
        self.metrics, self.begun = metrics, time.perf_counter()
        self.first: dict[int, float] = {}  # when a choice's first token came

    def saw(self, answer: "Answer", indices: Iterable[int]) -> None:
        """To be called with the indices of the choices that have just got tokens."""
        now, metrics = time.perf_counter(), self.metrics
        for index in indices:
            choice = answer.choices[index]
            if index not in self.first:
                self.first[index] = now
                metrics.first_token.observe(now - self.begun)
            if choice.finish_reason is not None:
                metrics.finished.labels(choice.finish_reason).inc()
                metrics.whole.observe(now - self.begun)
                if choice.new_tokens > 1:
                    metrics.per_token.observe((now - self.first[index]) / (choice.new_tokens - 1))

"""What /metrics tells Prometheus: counts, sizes and times, nothing of any text."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from service import Service

if TYPE_CHECKING:
    from answers import Answer

FIRST_TOKEN = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # seconds
WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service):
        registry = self.registry = CollectorRegistry()  # not the one that all of a process share
        self.responses = Counter("brisk_http_responses", "HTTP responses", ("path", "status"), registry=registry)
        self.prompt_tokens = Counter("brisk_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter("brisk_cached_tokens", "Those that the cache held", registry=registry)
        self.new_tokens = Counter("brisk_new_tokens", "Tokens generated", registry=registry)
        self.ends = Counter("brisk_choices", "Choices that are finished", ("finish_reason",), registry=registry)
        running = Gauge("brisk_requests_running", "Requests that have a row", registry=registry)
        running.set_function(lambda: min(service.load, service.rows))
        waiting = Gauge("brisk_requests_waiting", "Requests that wait for a row", registry=registry)
        waiting.set_function(lambda: max(service.load - service.rows, 0))

        def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"brisk_{name}_seconds", text, buckets=buckets, registry=registry)

        self.first_token = seconds("time_to_first_token", "From a request to its first token", FIRST_TOKEN)
        self.whole = seconds("request", "From a request to the end of a choice", WHOLE)
        self.per_token = seconds("time_per_token", "Of a choice, after its first token", PER_TOKEN)

    def count(self, scope: Scope, status: int) -> None:
        """A response. Of a path that is none of ours nothing is kept."""
        route = scope.get("route")
        self.responses.labels(getattr(route, "path", "other"), str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Timer:
    """Times one client's request."""

    def __init__(self, metrics: Metrics):
        self.metrics, self.begun = metrics, time.perf_counter()
        self.first: dict[int, float] = {}  # when a choice's first token came

    def saw(self, answer: "Answer", indices: Iterable[int]) -> None:
        """New tokens of some choices, all that came together."""
        now = time.perf_counter()
        for index in indices:
            choice, metrics = answer.choices[index], self.metrics
            if index not in self.first:
                self.first[index] = now
                metrics.first_token.observe(now - self.begun)
            if choice.finish_reason is not None:
                metrics.ends.labels(choice.finish_reason).inc()
                metrics.new_tokens.inc(choice.new_tokens)
                metrics.prompt_tokens.inc(len(answer.work.requests[index].prompt))
                metrics.cached_tokens.inc(choice.cached_tokens)
                metrics.whole.observe(now - self.begun)
                if choice.new_tokens > 1:
                    metrics.per_token.observe((now - self.first[index]) / (choice.new_tokens - 1))

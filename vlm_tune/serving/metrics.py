"""Metrics of the server, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from vlm_tune.serving.jobs import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts what the server does. Each server has its metrics, in a registry of their own.

    Args:
        engine: The engine whose queue is shown.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "vlm_tune_requests",
            "Requests by route and status; 499 is a client that left",
            ["route", "code"],
            registry=self._registry,
        )
        self.request_seconds = self._histogram(
            "vlm_tune_request_seconds", "Time from a request's arrival to its answer's end", "route"
        )
        self.first_token_seconds = self._histogram(
            "vlm_tune_time_to_first_token_seconds",
            "Time from a request's arrival to the first piece of an answer",
            "model",
        )
        self.token_seconds = self._histogram(
            "vlm_tune_time_per_token_seconds",
            "Mean time of an answer's tokens after the first piece",
            "model",
            TOKEN_SECONDS,
        )
        self.prompt_tokens = self._counter("vlm_tune_prompt_tokens", "Tokens of prompts and images")
        self.answer_tokens = self._counter("vlm_tune_answer_tokens", "Tokens of answers")
        self.image_seconds = Histogram(
            "vlm_tune_image_seconds",
            "Time to read and check an image",
            buckets=SECONDS,
            registry=self._registry,
        )
        waiting = Gauge("vlm_tune_jobs_waiting", "Jobs in the queue", registry=self._registry)
        waiting.set_function(lambda: engine.waiting)
        running = Gauge("vlm_tune_jobs_running", "Jobs being answered", registry=self._registry)
        running.set_function(lambda: engine.running)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model"], registry=self._registry)

    def _histogram(
        self, name: str, text: str, label: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(name, text, [label], buckets=buckets, registry=self._registry)

    def exposition(self) -> tuple[bytes, str]:
        """The metrics as text, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

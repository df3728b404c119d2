"""What a server counts, for Prometheus. No tenant, prompt or concept is a label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)


class ServerMetrics:
    """One process's; `replica` is a label of each, so that several behind one address do not read as one that jumps."""

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, replica: str) -> None:
        self._registry, self._replica = CollectorRegistry(), replica
        self.requests = self._counter("requests", "Requests for pictures answered, by status.", "status")
        self.refusals = self._counter("refusals", "Requests refused, by the code of the error.", "code")
        self.pictures = self._counter("pictures", "Pictures, by what became of them.", "outcome")
        self.gated = self._counter(
            "pictures_gated", "Pictures in which all that was detected was left by the gate."
        )
        self.detected = self._counter(
            "patches_detected", "Patches in which a concept was detected, over all steps."
        )
        self.replaced = self._counter("patches_replaced", "Patches overwritten, over all steps.")
        self.reloads = self._counter(
            "policy_reloads", "New versions of the policy, by whether they were taken.", "outcome"
        )
        self.queue = self._gauge("queue", "Pictures accepted and not answered.")
        self.latency = Histogram(
            "lbdt_request_seconds",
            "Seconds from a request's coming to its pictures' going.",
            ("replica",),
            registry=self._registry,
            buckets=_SECONDS,
        ).labels(replica)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"lbdt_{name}", text, (*labels, "replica"), registry=self._registry)
        return counter if labels else counter.labels(self._replica)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"lbdt_{name}", text, ("replica",), registry=self._registry).labels(self._replica)

    def count(self, counter: Counter, label: str) -> None:
        """One more of a label."""
        counter.labels(label, self._replica).inc()

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

"""Figures for Prometheus: what the engine counts, read when asked for, and what only the server sees."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from seekvl.engine.engine import Metrics
from seekvl.engine.request import Completion
from seekvl.serve.replicas import Replicas
from seekvl.serve.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
COUNTERS: dict[str, tuple[str, Callable[[Metrics], int]]] = {
    "prompt_tokens": ("Tokens of prompts, pictures included.", lambda now: now.prompt_tokens),
    "image_tokens": ("Tokens that stand for pictures.", lambda now: now.image_tokens),
    "generation_tokens": ("Tokens of answers.", lambda now: now.generated_tokens),
    "canceled": ("Answers that were cancelled.", lambda now: now.ended.get("cancelled", 0)),
    "vision_cache_queries": ("Pictures whose features were needed.", lambda now: now.picture_queries),
    "vision_cache_hits": ("Those whose features were at hand.", lambda now: now.picture_hits),
    "prefix_cache_queries": ("Prompts that were let in.", lambda now: now.prefix_queries),
    "prefix_cache_hits": ("Those whose beginning was at hand.", lambda now: now.prefix_hits),
}
"""What an engine counts: name, what it is, and where it is read."""
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)


class EngineFigures(Collector):
    """What the engine counts; nothing while there is none. Of replicas each has its own, labelled."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Yield every figure as it is now."""
        yield GaugeMetricFamily("seekvl_ready", "1 where a request would be taken.", int(self._service.ready))
        yield CounterMetricFamily(
            "seekvl_engine_restarts", "Times the engine died and was started again.", self._service.restarts
        )
        if self._service.phase in ("starting", "failed"):
            return
        engine = self._service.vlm.engine
        now = engine.metrics()
        yield GaugeMetricFamily("seekvl_requests_running", "Answers that grow.", now.running)
        yield GaugeMetricFamily("seekvl_requests_waiting", "Requests without a place.", now.waiting)
        if isinstance(engine, Replicas):
            each = engine.by_replica()
            yield GaugeMetricFamily("seekvl_replicas", "Replicas that answer.", len(each))
            yield from counted([([name], figures) for name, figures in each.items()], labels=["replica"])
        else:
            yield from counted([([], now)], labels=[])


def counted(each: Sequence[tuple[list[str], Metrics]], *, labels: list[str]) -> Iterable[Metric]:
    """Yield what engines count, each engine under the values of its labels."""
    memory = GaugeMetricFamily("seekvl_memory_bytes", "Bytes held.", labels=[*labels, "kind"])
    for name, (text, read) in COUNTERS.items():
        counter = CounterMetricFamily(f"seekvl_{name}", text, labels=labels)
        for values, figures in each:
            counter.add_metric(values, read(figures))
        yield counter
    for values, figures in each:
        memory.add_metric([*values, "cache"], figures.cache_bytes)
        memory.add_metric([*values, "features"], figures.feature_bytes)
    yield memory


class ServerMetrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineFigures(service))
        self.requests = Counter(
            "seekvl_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.rejected = Counter("seekvl_rejected", "Requests refused.", ["reason"], registry=self.registry)
        self.queue = self._seconds("queue", "Waiting for a place and for turns, up to the first token.")
        self.picture = self._seconds("image_load", "Fetching and decoding a picture.")
        self.vision = self._seconds("vision", "Vision towers and adaptor, of one answer.")
        self.first_token = self._seconds("time_to_first_token", "From the request to its first token.")
        self.token = self._seconds("time_per_output_token", "Decoding, a token.", buckets=SHORT)
        self.request = self._seconds("request", "A whole request.")

    def _seconds(self, name: str, text: str, *, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"seekvl_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def answered(self, completion: Completion, *, first_seconds: float) -> None:
        """Note how long the parts of an answer took; `first_seconds` are those up to its first token."""
        timings, tokens = completion.timings, completion.usage.completion_tokens
        self.first_token.observe(first_seconds)
        self.queue.observe(max(0.0, first_seconds - timings.vision - timings.prefill))
        if completion.pictures:
            self.vision.observe(timings.vision)
        if tokens > 1:
            self.token.observe(timings.decode / (tokens - 1))

    def text(self) -> bytes:
        """Return all figures in the form Prometheus reads."""
        return generate_latest(self.registry)

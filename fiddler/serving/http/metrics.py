"""GET /metrics for Prometheus: llama.cpp's names, so that its dashboards work, and our own about experts."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from fiddler.serving.http.body import service_of
from fiddler.serving.http.errors import HttpError
from fiddler.serving.http.service import Service

__all__ = ["metrics"]

_COUNTERS = {
    "prompt_tokens": ("Prompt tokens that were computed.", "prompt_tokens"),
    "prompt_tokens_cached": ("Prompt tokens whose keys and values were cached.", "cached_tokens"),
    "prompt_seconds": ("Time of prompts [s].", "prompt_seconds"),
    "tokens_predicted": ("Generated tokens.", "generated_tokens"),
    "tokens_predicted_seconds": ("Time of generation after the first tokens [s].", "generation_seconds"),
    "n_decode": ("Steps of the model.", "steps"),
}
_TEXTS = ("finished", "failed", "cancelled")


async def metrics(request: Request) -> Response:
    """All metrics in Prometheus's text format."""
    service = service_of(request)
    if not service.options.metrics:
        raise HttpError(501, "this server shows no metrics; start it without --no-metrics")
    text = await service.on_text(_rendered, service)
    response = Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
    # with llama.cpp's capitals, which its scripts look for, and which the framework would lower
    response.raw_headers.append((b"Process-Start-Time-Unix", str(int(service.started)).encode()))
    return response


def _rendered(service: Service) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Collector(service))
    largest = service.worker.counters.largest
    name = "llamacpp:n_tokens_max"  # a counter without `_total`, which the library would append
    text = f"# HELP {name} Largest number of tokens of one text.\n# TYPE {name} counter\n{name} {largest}\n"
    return generate_latest(registry) + text.encode()


class _Collector(Collector):
    """Reads the totals of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Implements `Collector.collect`."""
        yield from self._of_llama_cpp()
        yield from self._of_requests()
        yield from self._of_experts()

    def _of_llama_cpp(self) -> Iterator[Metric]:
        counters = self._service.worker.counters
        for name, (text, field) in _COUNTERS.items():
            yield CounterMetricFamily(f"llamacpp:{name}", text, getattr(counters, field))
        for name in ("num_draft_tokens", "num_accepted_tokens", "num_drafts"):
            yield CounterMetricFamily(f"llamacpp:spec_decode_{name}", "There is no speculative decoding.", 0)
        running = self._service.worker.running
        waiting = sum(text.cached is None for text in running)
        more = max(counters.generated_tokens - counters.finished, 0)
        for name, text, value in (
            (
                "prompt_tokens_seconds",
                "Prompt tokens a second.",
                _over(counters.prompt_tokens, counters.prompt_seconds),
            ),
            ("predicted_tokens_seconds", "Generated tokens a second.", _over(more, counters.generation_seconds)),
            ("requests_processing", "Texts that are computed.", len(running) - waiting),
            ("requests_deferred", "Texts that wait for memory.", waiting),
            ("n_busy_slots_per_decode", "Texts in a step, on average.", _over(counters.stepped, counters.steps)),
        ):
            yield GaugeMetricFamily(f"llamacpp:{name}", text, value)

    def _of_requests(self) -> Iterator[Metric]:
        texts = CounterMetricFamily("fiddler_texts", "Texts that have ended, by how.", labels=["end"])
        for end in _TEXTS:
            texts.add_metric([end], getattr(self._service.worker.counters, end))
        yield texts
        runner = self._service.engine.runner
        for name, text, value in (
            ("fiddler_kv_cache_bytes", "Memory of keys and values, past prompts' included.", runner.kv_taken()),
            ("fiddler_prefix_cache_blocks", "Blocks of past prompts that are found again.", runner.past_blocks()),
            ("fiddler_prefix_cache_tree_bytes", "Host memory of the tree that finds them.", runner.past_bytes()),
        ):
            yield GaugeMetricFamily(name, text, value)
        buckets, total = self._service.first_tokens.cumulative()
        yield HistogramMetricFamily(
            "fiddler_time_to_first_token_seconds", "From a request to its first token [s].", buckets, total
        )

    def _of_experts(self) -> Iterator[Metric]:
        """Choices of experts by where they lie now, and work by kind and place."""
        places = self._service.engine.runner.resident_experts()
        chosen = {"cpu": 0, "gpu": 0}
        for layer, row in enumerate(self._service.totals.counts):
            resident = set(places[layer]) if layer < len(places) else set()
            for expert, count in enumerate(row):
                chosen["gpu" if expert in resident else "cpu"] += count
        hits = CounterMetricFamily("fiddler_expert_choices", "Tokens times experts, by place.", labels=["device"])
        for device, count in chosen.items():
            hits.add_metric([device], count)
        yield hits
        nbytes = CounterMetricFamily("fiddler_weights_read_bytes", "Bytes of weights read.", labels=["work", "device"])
        seconds = CounterMetricFamily("fiddler_work_seconds", "Time of host threads [s].", labels=["work", "device"])
        for (work, device), total in self._service.totals.work.items():
            nbytes.add_metric([work, device], total.nbytes)
            seconds.add_metric([work, device], total.seconds)
        yield nbytes
        yield seconds


def _over(count: float, by: float) -> float:
    return count / by if by else 0.0

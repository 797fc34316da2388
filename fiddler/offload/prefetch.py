"""Prefetches experts of the next layer before that layer's router has run.

Knows how many tokens each expert has had; not the plan's costs, which it is handed as a function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fiddler.files.weights import ExpertWeights
from fiddler.offload.expert_cache import Residents
from fiddler.offload.plan import PlanFor
from fiddler.offload.staging_ring import Part, Ring
from fiddler.telemetry.recorder import Recorder

__all__ = ["Prefetcher"]

_MIN_TOKENS = 8  # on average, for each expert of a layer for which some are prefetched


class Prefetcher:
    """Sends the missing experts that had the most tokens so far, one layer ahead: as many as the ring holds."""

    def __init__(self, layers: Sequence[ExpertWeights], residents: Residents, ring: Ring, recorder: Recorder) -> None:
        self._layers, self._residents, self._ring, self._recorder = layers, residents, ring, recorder
        self._counts = np.zeros((len(layers), len(layers[0].gate)), np.int64)  # tokens of each expert so far
        self._last_layer_tokens: int | None = None
        self._sent: tuple[int, list[list[Part]]] = (0, [])

    @property
    def sent(self) -> tuple[int, list[list[Part]]]:
        """The layer that the prefetched parts belong to, and these parts, of one slot of the ring after the other."""
        return self._sent

    @property
    def counts(self) -> np.ndarray:
        """Tokens that each expert has had so far, int64 [L, E]."""
        return self._counts

    def begin_step(self, last_layer_tokens: int) -> None:
        """Forget the parts of the step before. last_layer_tokens: that the last layer will have."""
        self._last_layer_tokens = last_layer_tokens
        self._sent = (0, [])

    def take(self, layer: int) -> list[list[Part]]:
        """The parts that were sent for `layer`, by slots; those for another one are dropped."""
        (sent_for, slots), self._sent = self._sent, (0, [])
        if sent_for == layer:
            return slots
        for parts in slots:
            self._ring.done(parts)
        return []

    def count(self, layer: int, counts: np.ndarray) -> None:
        """Note how many tokens each expert of a layer has, int64 [E]."""
        self._counts[layer] += counts

    def start(self, layer: int, tokens: int, k: int, plan: PlanFor) -> None:
        """Start sending experts of `layer`, which will have about `tokens` tokens with k experts each.

        They are no more than a plan with evenly spread tokens streams whole.
        """
        experts, layers = len(self._layers[0].gate), len(self._layers)
        if layer == layers - 1 and self._last_layer_tokens is not None:
            tokens = min(tokens, self._last_layer_tokens)
        if layer >= layers or tokens * k < _MIN_TOKENS * experts or self._residents.complete(layer):
            return
        missing = [e for e in range(experts) if (layer, e) not in self._residents]
        hidden, ring = self._layers[layer].gate.shape[1], self._ring
        evenly = (max(1, tokens * k // experts),) * len(missing)
        streamed = plan(evenly, (0,) * len(missing), 0.0, tokens).gpu_rows.count(hidden)
        if not streamed:
            return
        room = max(1, ring.slots * (ring.rows // hidden))  # whole experts; or else the last rows of one
        counts = self._counts[layer].tolist()
        chosen = sorted(missing, key=lambda e: -counts[e])[: min(streamed, room)]
        begin = max(0, hidden - ring.slots * ring.rows)
        row_ranges = [(e, begin, hidden) for e in sorted(chosen)]
        with self._recorder.span("copy", len(chosen) * (hidden - begin) * self._layers[layer].hidden_row_bytes):
            self._sent = (layer, list(ring.send(layer, row_ranges)))

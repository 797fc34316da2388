"""Divides the layers of one token, and computes the CPU's part, by plans for each number of missing experts.

Knows residents, plans and a token's arrays, which are filled anew; not copies or threads. With eight experts a token
there are nine plans for each delay that the balance knows, so a layer looks its plan up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fiddler.kernels import ExpertFfn
from fiddler.kernels.one_token import NOT_YET, TokenDivision
from fiddler.kernels.token_layer import TokenLayer
from fiddler.offload.expert_cache import Residents
from fiddler.offload.plan import Balance, Plan, PlanFor

__all__ = ["OneToken", "TokenInputs", "TokenPlan"]


class TokenPlan(NamedTuple):
    """A plan for one token with `missing` missing experts; which ones, `TokenDivision` has."""

    missing: int
    parts: int  # experts of which the GPU has rows
    gpu_rows: int  # of all experts
    cpu_rows: int
    seconds: float  # expected
    lead: float  # see `Plan`


class _Plans(NamedTuple):
    """The plans for every number of missing experts, with one delay."""

    table: np.ndarray  # see `TokenDivision.plans`
    each: list[TokenPlan]


class TokenInputs(NamedTuple):
    """Arrays of a token on the host, filled anew for each layer; float32, contiguous."""

    x: np.ndarray  # [1, D]
    chosen: np.ndarray  # [1, K], expert ids
    routing_weights: np.ndarray  # [1, K]
    out: np.ndarray  # [1, D], the CPU's sum


class OneToken:
    """Divides and computes layers of a token whose inputs lie in fixed arrays.

    `expert_ids` int64 [1, K], `cpu_rows` int64 [E] and `gpu_rows` int64 [K, 2] are those of the layer divided last.
    """

    def __init__(
        self,
        inputs: TokenInputs,
        ffns: Sequence[ExpertFfn],
        residents: Residents,
        hidden: int,
        counts: np.ndarray,
        signals: np.ndarray,
    ) -> None:
        """ffns: of each layer. hidden: rows of an expert. counts: int64 [L, E], of chosen experts, increased.

        signals: `TokenSignals.numbers`.
        """
        self._hidden, self._k = hidden, inputs.chosen.shape[1]
        self.division = TokenDivision(inputs.chosen, counts.shape[1], hidden, signals)
        self.expert_ids, self.cpu_rows = self.division.expert_ids, self.division.cpu_rows
        self.gpu_rows = self.division.gpu_rows
        bound = inputs.x, self.expert_ids, inputs.routing_weights, self.cpu_rows, inputs.out
        self._layers = [
            TokenLayer(self.division, missing, counted, ffn.bind(*bound))
            for missing, counted, ffn in zip(residents.missing, counts, ffns, strict=True)
        ]
        self._plan: Sequence[PlanFor] = ()
        self._blocks = False
        self._made: list[dict[float, _Plans]] = []
        self._balances: Sequence[Balance] = ()

    def plan_by(self, plan: Sequence[PlanFor], balances: Sequence[Balance], *, blocks: bool) -> None:
        """Divide by these plans from now on, plan[layer]; equal ones are shared.

        balances: of each layer, the GPU's delay. blocks: copies would begin when the CPU is done, so the GPU has no
        part.
        """
        self._plan, self._balances, self._blocks = plan, balances, blocks
        made: dict[PlanFor, dict[float, _Plans]] = {each: {} for each in plan}
        self._made = [made[each] for each in plan]

    def compute(self, layer: int, number: int, send: Callable[[int, int, TokenPlan], None]) -> TokenPlan | None:
        """Divide a layer's missing experts among `chosen`, once the signal ARRIVED has its number; compute the CPU's.

        Sets the signal SUMMED. send: called with layer, number and plan where no other thread waits to send the GPU's
        part. None: nothing arrived within half a millisecond.
        """
        delay = self._balances[layer].seconds
        plans = self._made[layer].get(delay) or self._make(layer, delay)
        missing = self._layers[layer](number, plans.table, lambda missing: send(layer, number, plans.each[missing]))
        return None if missing == NOT_YET else plans.each[missing]

    def times(self, layer: int) -> tuple[float, float]:
        """When a layer was divided, and when the CPU's sum was there, by time.perf_counter [s]."""
        divided, ended = self._layers[layer].times.tolist()
        return divided, ended

    def _make(self, layer: int, delay: float) -> _Plans:
        made, each = [], []
        for missing in range(self._k + 1):
            nothing = (0,) * missing
            plan = Plan(nothing, 0.0) if self._blocks else self._plan[layer]((1,) * missing, nothing, delay, 1)
            made.append(plan)
            parts = [count for count in plan.gpu_rows if count]
            split = [i for i, count in enumerate(parts) if count < self._hidden]
            assert len(split) <= 1, "a plan splits one expert"
            rows = sum(parts)
            cpu_rows = missing * self._hidden - rows
            each.append(TokenPlan(missing, len(parts), rows, cpu_rows, plan.seconds, plan.lead))
        plans = _Plans(self.division.plans([plan.gpu_rows for plan in made]), each)
        self._made[layer][delay] = plans
        return plans

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


class _Plans:
    """The plans of a layer by the number of missing experts, each for the delay that its balance has for it."""

    def __init__(self, table: np.ndarray) -> None:
        """table: see `TokenDivision.plans`."""
        self.table = table
        self.each: list[TokenPlan] = []
        self.delays: tuple[float, ...] = ()


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
        self._balances: Sequence[Balance] = ()
        self._plans: list[_Plans] = []
        self._made: list[dict[tuple[int, float], tuple[TokenPlan, tuple[int, ...]]]] = []

    def plan_by(self, plan: Sequence[PlanFor], balances: Sequence[Balance], *, blocks: bool) -> None:
        """Divide by these plans from now on, plan[layer]; equal ones are shared.

        balances: of each layer, the GPU's delays. blocks: copies would begin when the CPU is done, so the GPU has no
        part.
        """
        self._plan, self._balances, self._blocks = plan, balances, blocks
        nothing = [(0,) * missing for missing in range(self._k + 1)]
        self._plans = [_Plans(self.division.plans(nothing)) for _ in plan]
        made: dict[PlanFor, dict[tuple[int, float], tuple[TokenPlan, tuple[int, ...]]]] = {each: {} for each in plan}
        self._made = [made[each] for each in plan]

    def compute(self, layer: int, number: int, send: Callable[[int, int, TokenPlan], None]) -> TokenPlan | None:
        """Divide a layer's missing experts among `chosen`, once the signal ARRIVED has its number; compute the CPU's.

        Sets the signal SUMMED. send: called with layer, number and plan where no other thread waits to send the GPU's
        part. None: nothing arrived within half a millisecond.
        """
        plans, delays = self._plans[layer], self._balances[layer].delays(self._k)
        if plans.delays is not delays:
            self._renew(layer, delays)
        missing = self._layers[layer](number, plans.table, lambda missing: send(layer, number, plans.each[missing]))
        return None if missing == NOT_YET else plans.each[missing]

    def times(self, layer: int) -> tuple[float, float]:
        """When a layer was divided, and when the CPU's sum was there, by time.perf_counter [s]."""
        divided, ended = self._layers[layer].times.tolist()
        return divided, ended

    def _renew(self, layer: int, delays: tuple[float, ...]) -> None:
        """Let a layer's plans be those for these delays, by the number of missing experts."""
        plans, made = self._plans[layer], self._made[layer]
        for missing, delay in enumerate(delays):
            if plans.delays and plans.delays[missing] == delay:
                continue
            if (missing, delay) not in made:
                made[missing, delay] = self._make(layer, missing, delay)
            plan, rows = made[missing, delay]
            plans.each[missing : missing + 1] = [plan]
            self.division.set_plan(plans.table, missing, rows)
        plans.delays = delays

    def _make(self, layer: int, missing: int, delay: float) -> tuple[TokenPlan, tuple[int, ...]]:
        """The plan for so many missing experts, and the GPU's hidden rows of each."""
        nothing = (0,) * missing
        plan = Plan(nothing, 0.0) if self._blocks else self._plan[layer]((1,) * missing, nothing, delay, 1)
        parts = [count for count in plan.gpu_rows if count]
        assert sum([count < self._hidden for count in parts]) <= 1, "a plan splits one expert"
        rows = sum(parts)
        cpu_rows = missing * self._hidden - rows
        return TokenPlan(missing, len(parts), rows, cpu_rows, plan.seconds, plan.lead), tuple(plan.gpu_rows)

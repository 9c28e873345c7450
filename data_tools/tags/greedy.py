"""Greedy maximisation of a monotone submodular `Coverage`: lazy (Minoux 1978), and plain to compare it with."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.tags.constraints import Ledger, Rules
from megatron_ksa.data_tools.tags.objective import Coverage

WINDOW = 8192
FIRST_REFRESH = 32
# A gain's rounding error, as a share of f(S): a stale bound counts as an upper bound only with this much added.
SLACK = 1e-13


@dataclass(frozen=True)
class Selection:
    """What was chosen: instances int64 [chosen] in order of choice, their gains float64 [chosen], gains computed."""

    chosen: np.ndarray
    gains: np.ndarray
    evaluations: int


class _Progress:
    """The selection as it grows: masses and phi of every node, the budget left, and what was chosen."""

    def __init__(self, coverage: Coverage, budget: float, cost: np.ndarray, show: bool, rules: Rules) -> None:
        self.coverage, self.left, self.cost = coverage, budget, cost
        self.ledger = Ledger(rules, cost, budget)
        self.total = np.zeros(len(coverage.weight))
        self.reached = np.zeros(len(coverage.weight))
        self.value, self.evaluations = 0.0, 0
        self.chosen: list[int] = []
        self.gains: list[float] = []
        self.bar = tqdm(total=budget, desc="select", unit_scale=True, disable=not show, mininterval=1.0)
        for row in rules.first:
            self.add(row, self.refresh(np.array([row]))[0])

    def candidates(self) -> np.ndarray:
        """int64 [rows], what may be chosen and fits."""
        return np.flatnonzero(self.ledger.open & (self.cost <= self.left))

    def refresh(self, rows: np.ndarray) -> np.ndarray:
        """Gain for each unit of cost, float64 [rows]."""
        self.evaluations += len(rows)
        return self.coverage.gains(rows, self.total, self.reached) / self.cost[rows]

    def add(self, row: int, ratio: float) -> bool:
        """Choose a row; returns whether that closed others."""
        mass = self.coverage.mass
        nodes = mass.indices[mass.indptr[row] : mass.indptr[row + 1]]
        self.total[nodes] += mass.data[mass.indptr[row] : mass.indptr[row + 1]]
        self.reached[nodes] = self.coverage.phi(self.total[nodes], nodes)
        self.chosen.append(int(row))
        self.gains.append(float(ratio * self.cost[row]))
        self.value += self.gains[-1]
        self.left -= self.cost[row]
        self.bar.update(self.cost[row])
        return self.ledger.take(row)

    def fill(self, candidates: np.ndarray) -> None:
        """Spend what is left on instances that add nothing, the lowest index first."""
        for row in np.sort(candidates):
            if self.cost[row] <= self.left and self.ledger.open[row]:
                self.add(row, 0.0)

    def selection(self) -> Selection:
        self.bar.close()
        return Selection(np.array(self.chosen, np.int64), np.array(self.gains), self.evaluations)


def _plain(progress: _Progress) -> Selection:
    while True:
        rows = progress.candidates()
        if not len(rows):
            return progress.selection()
        ratio = progress.refresh(rows)
        best = int(ratio.argmax())
        if ratio[best] <= 0:
            progress.fill(rows)
            return progress.selection()
        progress.add(rows[best], ratio[best])


def _top(bound: np.ndarray, rows: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """The rows with the largest bounds, in rising order, and the largest bound left out (-inf if none)."""
    if len(rows) <= size:
        return rows, -np.inf
    order = np.argpartition(-bound[rows], size)
    return np.sort(rows[order[:size]]), float(bound[rows[order[size]]])


def _lazy(progress: _Progress, base: int) -> Selection:
    """Stale gains bound fresh ones from above, so only rows whose bound reaches the best fresh gain are computed anew.

    The queue is a window of the largest bounds, small enough to search as an array, renewed when the best fresh gain no
    longer beats what is outside of it.
    """
    bound = progress.refresh(np.arange(progress.coverage.instances))
    size = base
    while True:
        rows = progress.candidates()
        if not len(rows) or bound[rows].max() <= 0:
            progress.fill(rows)
            return progress.selection()
        window, outside = _top(bound, rows, size)
        taken = _spend_window(progress, window, bound, outside)
        # Many equal bounds can outnumber a window; a larger one holds them all.
        size = base if taken else 4 * size


def _spend_window(progress: _Progress, window: np.ndarray, bound: np.ndarray, outside: float) -> int:
    """Choose from the window while its best beats the bound `outside`; returns how many were chosen."""
    local, cost, taken = bound[window], progress.cost[window], 0
    dearest = cost.max()
    while True:
        if progress.left < dearest:
            local[cost > progress.left] = -np.inf
            dearest = progress.left
        slack = SLACK * (1.0 + progress.value)
        stale = np.ones(len(window), bool)
        best = -1
        due = (
            np.argpartition(-local, FIRST_REFRESH)[:FIRST_REFRESH]
            if len(local) > FIRST_REFRESH
            else np.arange(len(local))
        )
        due = due[local[due] > 0]
        while len(due):
            local[due] = progress.refresh(window[due])
            stale[due] = False
            best = int(np.where(stale, -np.inf, local).argmax())
            due = np.flatnonzero(stale & (local > 0) & (local + slack >= local[best]))
        if best < 0 or local[best] <= outside + slack or local[best] <= 0:
            fits = local > -np.inf
            bound[window[fits]] = local[fits]
            return taken
        closed = progress.add(window[best], local[best])
        local[best] = -np.inf
        if closed:
            local[~progress.ledger.open[window]] = -np.inf
        taken += 1


def greedy(
    coverage: Coverage,
    budget: float,
    cost: np.ndarray | None = None,
    *,
    lazy: bool = True,
    show_progress: bool = False,
    window: int = WINDOW,
    rules: Rules | None = None,
) -> Selection:
    """Choose by largest gain, or gain for a unit of cost, until nothing more fits; ties go to the lower index.

    With unit costs the value is at least (1 - 1/e) of the optimum (Nemhauser et al. 1978). With costs the better of
    this and the best single instance is returned, at least (1 - 1/e)/2 of the optimum (Khuller et al. 1999, Leskovec et
    al. 2007).

    Args:
        budget: instances, or tokens where `cost` is given.
        cost: [instances], above 0.
        lazy: compute few gains anew in a step instead of all; what is chosen is the same.
        window: rows in the lazy queue's window; a matter of speed only.
        rules: what the selection must hold; the bound of token budgets is not for it.

    Raises:
        UsageError: rules that cannot be met.
    """
    rules = rules or Rules()
    costs = np.ones(coverage.instances) if cost is None else np.asarray(cost, np.float64)
    rules.check(budget, costs)
    progress = _Progress(coverage, budget, costs, show_progress, rules)
    result = _lazy(progress, window) if lazy else _plain(progress)
    if cost is None or not coverage.instances or rules:
        return result
    alone = np.where(costs <= budget, coverage.singles(), -np.inf)
    best = int(alone.argmax())
    if alone[best] > result.gains.sum():
        return Selection(np.array([best]), alone[[best]], result.evaluations + coverage.instances)
    return result

"""Greedy maximisation of a monotone submodular `Coverage`: lazy (Minoux 1978), and plain to compare it with."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.tags.alike import Alike
from megatron_ksa.data_tools.tags.constraints import Ledger, Rules
from megatron_ksa.data_tools.tags.ladder import Ladder
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
        return np.flatnonzero(self.usable(np.arange(len(self.cost))))

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """Which of some rows, int64 [rows], may be chosen and fit: bool [rows]."""
        return self.ledger.open[rows] & (self.cost[rows] <= self.left)

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


@dataclass
class _Window:
    """The groups with the largest bounds, in the state of the search for the next choice.

    Args:
        groups: int64 [groups].
        bound: float64 [groups], at least the gain of each; -inf where none of the group may be chosen.
        fresh: bool [groups], whether the bound is the gain since the last choice.
    """

    groups: np.ndarray
    bound: np.ndarray
    fresh: np.ndarray


def _lazy(progress: _Progress, base: int) -> Selection:
    """Stale gains bound fresh ones from above, so only rows whose bound reaches the best fresh gain are computed anew.

    Of equal rows only the next one is looked at. The queue is a window of the largest bounds, small enough to search as
    an array, renewed from a ladder when the best fresh gain no longer beats what is outside of it. Each row that leaves
    a window with a lower bound was computed anew there, so renewing costs O(log rows) for each gain computed.
    """
    alike = Alike(progress.coverage.mass, progress.cost, progress.ledger.limits)
    everyone = np.arange(len(alike.head))
    ladder = Ladder(np.full(len(everyone), -np.inf))
    live = alike.advance(everyone, progress.usable)
    ladder.bound[live] = progress.refresh(alike.head[live])
    # How many were chosen when a group's gain was last computed.
    known = np.full(len(everyone), len(progress.chosen), np.int32)
    size = base
    while True:
        groups, outside = ladder.take(size)
        groups = groups[alike.advance(groups, progress.usable)]
        if not len(groups) and outside > -np.inf:
            continue
        if not len(groups) or ladder.bound[groups].max() <= 0:
            progress.fill(progress.candidates())
            return progress.selection()
        before = len(progress.chosen), progress.evaluations
        window = _Window(groups, ladder.bound[groups], known[groups] == len(progress.chosen))
        _spend(progress, alike, window, outside, base)
        known[groups[window.fresh]] = len(progress.chosen)
        left = window.bound > -np.inf
        ladder.bound[groups] = window.bound
        ladder.put(groups[left])
        # More equal bounds than a window holds: a larger one has them all.
        size = base if before != (len(progress.chosen), progress.evaluations) else 4 * size


def _best(progress: _Progress, heads: np.ndarray, window: _Window, slack: float) -> float:
    """The largest gain in a window, computed anew where a bound may hide a larger one; -inf where none is above 0.

    Args:
        heads: int64 [groups], the instance of each group that would be chosen.
    """
    best = float(window.bound[window.fresh].max(initial=-np.inf))
    size = FIRST_REFRESH
    while True:
        due = np.flatnonzero(~window.fresh & (window.bound > 0) & (window.bound + slack >= best))
        if not len(due):
            return best
        if len(due) > size:
            due = due[np.argpartition(-window.bound[due], size)[:size]]
        window.bound[due] = progress.refresh(heads[due])
        window.fresh[due] = True
        best = max(best, float(window.bound[due].max()))
        size *= 4


def _spend(progress: _Progress, alike: Alike, window: _Window, outside: float, base: int) -> None:
    """Choose from the window while its best beats the bound `outside`, or until a large window is no longer needed."""
    heads = alike.head[window.groups]
    dearest = progress.cost[heads].max()
    while True:
        slack = SLACK * (1.0 + progress.value)
        best = _best(progress, heads, window, slack)
        if best <= outside + slack or best <= 0:
            return
        ties = np.flatnonzero(window.fresh & (window.bound == best))
        first = ties[[heads[ties].argmin()]]
        closed = progress.add(int(heads[first[0]]), best)
        window.fresh[:] = False
        # Whose head may be out of the game now.
        changed = np.flatnonzero(window.bound > -np.inf) if closed or progress.left < dearest else first
        window.bound[changed[~alike.advance(window.groups[changed], progress.usable)]] = -np.inf
        heads[changed] = alike.head[window.groups[changed]]
        dearest = min(max(dearest, progress.cost[heads[first[0]]]), progress.left)
        if len(window.groups) > base and np.count_nonzero(window.bound >= best) <= base:
            return


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

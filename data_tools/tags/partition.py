"""Two-round partitioned greedy, for pools that do not fit one machine."""

from collections.abc import Callable

import numpy as np

from megatron_ksa.data_tools.tags.greedy import Selection, greedy
from megatron_ksa.data_tools.tags.objective import Coverage


def random_parts(instances: int, parts: int, seed: int) -> list[np.ndarray]:
    """Each instance put into one part at random, as the bound requires: int64 [members] a part, rising."""
    part_of = np.random.default_rng(seed).integers(parts, size=instances)
    return [np.flatnonzero(part_of == part) for part in range(parts)]


def two_round_greedy(
    load: Callable[[np.ndarray], tuple[Coverage, np.ndarray | None]],
    parts: list[np.ndarray],
    budget: float,
    *,
    show_progress: bool = False,
    run_parts: Callable = map,
) -> Selection:
    """Greedy in each part, then greedy over the union of their choices; the best of all these selections is returned.

    Only one part, or the union (at most parts * budget instances), is in memory at a time. With unit costs and random
    parts the expected value is at least (1 - 1/e)/2 of the optimum (Barbosa et al., The Power of Randomization, ICML
    2015, RandGreeDi).

    Args:
        load: the coverage of the given instances, int64 [members], and their costs or None.
        parts: the instances of each part.
        budget: instances, or tokens where `load` gives costs.
        run_parts: `map` or one that runs the parts elsewhere, in order.
    """

    def select(members: np.ndarray) -> Selection:
        coverage, cost = load(members)
        found = greedy(coverage, budget, cost, show_progress=show_progress)
        return Selection(members[found.chosen], found.gains, found.evaluations)

    found = list(run_parts(select, parts))
    found.append(select(np.sort(np.concatenate([part.chosen for part in found]))))
    # The union comes first among equals.
    best = max(reversed(found), key=lambda selection: selection.gains.sum())
    return Selection(best.chosen, best.gains, sum(selection.evaluations for selection in found))

"""By how much tree information covers more or fewer known labels than MIG at equal quality, and what else was tried.

    python -m megatron_ksa.data_tools.benchmarks.tags_margin --work DIR --out results.json [--readme FILE]

Pools, tags, share and equal quality are those of `tags_objective`. Scores are drawn `DRAWS` times; MIG and each variant
of the tree see the same scores, and differences are taken draw by draw (`compared`). `most_even` bounds what any
selection with MIG's mean score could have. On the pools kept back only the default and two former ones are looked at.
Variants are of the former default: the power 0.4, branches at 1, and what their name says.

- branches at B: the weights of the nodes above the tags are multiplied by B (`--branch-weight`).
- gains times the score: masses are those without the score, and an instance's gain is multiplied by its score, as MIG
  does; that is no function of a set, and greedy has no bound for it.
- by number of tags: with h, the harmonic mean of tags an instance, the power is 0.8 / h but at least 0.4, and B is
  0.03 + ((h - 1) / 2)^1.5 but at most 1: an only tag is a class, of many each says less.
- by only tags: with p the share of instances with one tag, the power is 0.4 + 0.4 p^2, and B is 1 - 0.97 p^2.
- rare tags N: tags of fewer than N instances are folded (`--rare-tags`, 2 by default), before the tree is made.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, hstack
from scipy.special import xlogy

from megatron_ksa.data_tools.benchmarks.compared import difference, differs, mean_and_deviation
from megatron_ksa.data_tools.benchmarks.tags_objective import (
    ALL,
    KEPT_BACK,
    SHARE,
    TAGGERS,
    at_quality,
    defaults,
    grouped,
    judge,
    prepare,
    taggers_of,
)
from megatron_ksa.data_tools.benchmarks.tags_pools import draw_scores
from megatron_ksa.data_tools.tags.greedy import greedy
from megatron_ksa.data_tools.tags.objective import (
    POWER,
    SHARE_EXPONENT,
    Coverage,
    default_shape,
    default_share_exponent,
    node_weights,
    strengths,
    tree_information,
)  # fmt: skip
from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.data_tools.tags.sample import SampleSettings, sample
from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.markdown import replace_section, table
from megatron_ksa.results import Results

DRAWS = 12
MIG, DEFAULT = "MIG (label-graph)", "tree (the default objective)"
FORMER, OLDER = "power 0.4 and branches at 1, the former default", "share exponent by the number of tags alone"
MEASURED = ("labels", "effective")
# Prices of a unit of mean score, in nats of entropy, of which the best bounds the entropy.
PRICES = np.geomspace(1e-3, 20, 60)


@dataclass(frozen=True)
class _Scored(Coverage):
    """A `Coverage` whose gains are multiplied by a factor of each instance, float64 [instances]."""

    factor: np.ndarray = field(default_factory=lambda: np.ones(0))

    def gains(self, rows: np.ndarray, total: np.ndarray, reached: np.ndarray) -> np.ndarray:
        return self.factor[rows] * super().gains(rows, total, reached)


@dataclass(frozen=True)
class Variant:
    """One objective.

    Args:
        shape: power and factor of the branches' weights, of the pool's shares, as `objective.tag_shares` gives them.
        depth_weight: as the sampler has it.
        scored: gains times the score.
        rare: `--rare-tags`, None for the default.
        share_exponent: `--share-exponent` of the pool's shares.
    """

    shape: Callable[[csr_array], tuple[float, float]] = lambda shares: (POWER, 1.0)
    depth_weight: float = 1.0
    scored: bool = False
    rare: int | None = None
    share_exponent: Callable[[csr_array], float] = default_share_exponent

    def choose(self, pool: Pool, exponent: float) -> np.ndarray:
        """int64 [chosen], with the exponent of the score."""
        power, branches = self.shape(pool.shares)
        weight = node_weights(
            pool.held, pool.parent, pool.depth, power=power, share_exponent=self.share_exponent(pool.shares),
            branch_weight=branches, depth_weight=self.depth_weight,
        )  # fmt: skip
        score = strengths(pool.quality, pool.difficulty, quality_weight=exponent)
        strength = np.ones(pool.instances) if self.scored else score
        coverage = tree_information(pool.shares, strength, pool.parent, weight, power=power)
        if self.scored:
            # A node of weight 0 that holds the score: greedy takes instances of equal masses for equal.
            mass = csr_array(hstack([coverage.mass, csr_array(score[:, None])]))
            mass.sort_indices()
            coverage = _Scored(mass, np.append(weight, 0.0), np.zeros(len(weight) + 1), power, score)
        return greedy(coverage, _budget(pool)).chosen


def _by_number(shares: csr_array) -> tuple[float, float]:
    mean = float(1 / (1 / np.maximum(np.diff(shares.indptr), 1)).mean())
    return max(POWER, 0.8 / mean), min(1.0, 0.03 + ((mean - 1) / 2) ** 1.5)


def _by_only_tags(shares: csr_array) -> tuple[float, float]:
    only = float((np.diff(shares.indptr) == 1).mean()) ** 2
    return 0.4 + 0.4 * only, 1 - 0.97 * only


def _by_number_alone(shares: csr_array) -> float:
    return SHARE_EXPONENT * (1 - float((1 / np.diff(shares.indptr)).mean()))


VARIANTS = {
    DEFAULT: Variant(default_shape),
    FORMER: Variant(),
    OLDER: Variant(share_exponent=_by_number_alone),
    "depth weight 0.5": Variant(depth_weight=0.5),
    "branches at 0.3": Variant(lambda shares: (POWER, 0.3)),
    "branches at 2": Variant(lambda shares: (POWER, 2.0)),
    "power 0.6, branches at 0.1": Variant(lambda shares: (0.6, 0.1)),
    "gains times the score": Variant(scored=True),
    "gains times the score, branches at 0.3": Variant(lambda shares: (POWER, 0.3), scored=True),
    "power and branches by number of tags": Variant(_by_number),
    "power and branches by only tags": Variant(_by_only_tags),
    "rare tags 3": Variant(rare=3),
    "rare tags 5": Variant(rare=5),
    "share exponent 0": Variant(share_exponent=lambda shares: 0.0),
}


def _budget(pool: Pool) -> int:
    return round(SHARE * pool.instances)


def most_even(labels: np.ndarray, quality: np.ndarray, count: int, mean: float) -> float:
    """Upper bound on the effective labels of `count` instances with a mean score of at least `mean`.

    For a price m of the score, -sum c log c + m * sum of scores is separable in the labels' counts c and concave, so
    that its maximum takes the best of each label by its marginals. By duality log(count) - (sum c log c) / count of any
    selection is at most that of the maximum plus m times the mean score that the maximum has above `mean`.

    Args:
        labels: int64 [instances].
        quality: float64 [instances].
    """
    order = np.lexsort((-quality, labels))
    sizes = np.bincount(labels)
    rank = 1.0 + np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    marginal, scores = xlogy(rank - 1, rank - 1) - xlogy(rank, rank), quality[order]
    bound = np.inf
    for price in PRICES:
        taken = np.argpartition(-(marginal + price * scores), count - 1)[:count]
        entropy = np.log(count) + marginal[taken].sum() / count
        bound = min(bound, entropy + price * (scores[taken].mean() - mean))
    return float(np.exp(bound))


def drawn(pool: Pool, labels: np.ndarray) -> list[Pool]:
    """The pool with its own scores, and with each further draw of them."""
    scores = [draw_scores(labels, np.random.default_rng(seed)) for seed in range(1, DRAWS)]
    return [pool, *(replace(pool, quality=each) for each in scores)]


def measure_mig(pool: Pool, labels: np.ndarray) -> dict:
    """What MIG's selections have, and the bound, by draw."""
    settings = SampleSettings(str(_budget(pool)), method="label-graph")
    found = []
    for each in drawn(pool, labels):
        of_draw = judge(each, labels, sample(each, settings).chosen)
        of_draw["most"] = most_even(labels, each.quality, _budget(pool), of_draw["quality"])
        found.append(of_draw)
    return {key: [of_draw[key] for of_draw in found] for key in found[0]}


def measure(variant: Variant, pool: Pool, labels: np.ndarray, qualities: list[float]) -> dict:
    """What a variant's selections have at the given mean scores, by draw."""
    found = []
    for each, quality in zip(drawn(pool, labels), qualities, strict=True):
        found.append(at_quality(partial(variant.choose, each), each, labels, quality))
    return {key: [of_draw[key] for of_draw in found] for key in (*MEASURED, "quality")}


def section(runs: list[dict], pools: list[str]) -> str:
    """The margin of the default in each column, and those of the variants."""
    known = {(run["pool"], run["tags"], run["choice"]): run for run in runs}
    groups = [(TAGGERS[tagger], name, of_group) for tagger, name, of_group in grouped(pools)]
    columns = [(pool, tags) for tags, _, of_group in groups for pool in of_group if (pool, tags, DEFAULT) in known]
    heads = ["tags", "pool", "MIG, effective labels", "no selection has more than", "tree, effective labels"]
    rows = []
    for pool, tags in columns:
        mig, tree = (known[pool, tags, choice] for choice in (MIG, DEFAULT))
        margins = [difference(tree[key], mig[key], digits=2) for key in MEASURED]
        shown = [mean_and_deviation(run[key], digits=2) for run, key in ((mig, "effective"), (tree, "effective"))]
        rows.append([tags, pool, shown[0], f"{np.mean(mig['most']):.2f}", shown[1], *margins])
    parts = [table([*heads, "labels, less MIG's", "effective labels, less MIG's"], rows)]
    for tags, name, of_group in groups:
        shown = [pool for pool in of_group if (pool, tags) in columns and not (pool in KEPT_BACK and tags == name)]
        rows = [
            [choice, *(_margin(known.get((pool, tags, choice)), known[pool, tags, MIG]) for pool in shown)]
            for choice in VARIANTS
            if any((pool, tags, choice) in known for pool in shown)
        ]
        parts += [
            f"With {name} tags: labels and effective labels, less MIG's, means of {DRAWS} draws.",
            table(["", *shown], rows),
        ]
    return "\n\n".join(parts)


def _margin(run: dict | None, mig: dict) -> str:
    if run is None:
        return ""
    parts = []
    for key in MEASURED:
        found = [here - there for here, there in zip(run[key], mig[key], strict=True)]
        text = f"{np.mean(found):+.2f}"
        parts.append(f"**{text}**" if differs(found) else text)
    return ", ".join(parts)


def main() -> None:
    """Run and write the numbers; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--work", type=Path, required=True, help="folder of pools and work folders")
        parser.add_argument("--out", type=Path, required=True, help="JSON file to write; what it has stays")
        parser.add_argument("--pools", nargs="+", default=list(ALL))
        parser.add_argument("--readme", type=Path, help="file with a section tags_margin that takes the tables")
        args = parser.parse_args()
        settings = {"share": SHARE, "draws": DRAWS, "sampler": defaults()}
        results = Results(args.out, settings, ("pool", "tags", "choice"), packages=("numpy", "scipy", "scikit-learn"))
        known = {(run["pool"], run["tags"], run["choice"]): run for run in results.stored()}
        for name in args.pools:
            wanted = [DEFAULT, FORMER, OLDER] if name in KEPT_BACK else list(VARIANTS)
            for tagger, tags in taggers_of(name).items():
                column = {"pool": name, "tags": tags}
                missing = [choice for choice in (MIG, *wanted) if (name, tags, choice) not in known]
                for choice in missing:
                    rare = None if choice == MIG else VARIANTS[choice].rare
                    pool, labels = prepare(args.work, name, tagger, rare)
                    if choice == MIG:
                        found = measure_mig(pool, labels)
                    else:
                        found = measure(VARIANTS[choice], pool, labels, known[name, tags, MIG]["quality"])
                    known[name, tags, choice] = column | {"choice": choice, "commit": results.commit} | found
                    results.add(known[name, tags, choice])
                    print(f"{name}, {tags} tags, {choice}: {found}", flush=True)
        text = section(results.stored(), args.pools)
        print(text)
        if args.readme:
            replace_section(args.readme, "tags_margin", text)


if __name__ == "__main__":
    main()

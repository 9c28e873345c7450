"""Sampling: a grounded pool, a budget and perhaps a target, to the chosen instances (docs/tags.md, 4 to 7)."""

from dataclasses import asdict, dataclass, field

import numpy as np
from scipy.sparse import csr_array, diags_array

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags import baselines
from megatron_ksa.data_tools.tags.alignment import ALIGN_WEIGHT, align, divergence, leaf_distribution
from megatron_ksa.data_tools.tags.budget import Budget, parse_budget
from megatron_ksa.data_tools.tags.constraints import Rules
from megatron_ksa.data_tools.tags.greedy import Selection, greedy
from megatron_ksa.data_tools.tags.objective import (
    BRANCH_EXPONENT,
    PHI,
    POWER,
    POWER_OF_NAMES,
    SHARE_EXPONENT,
    Coverage,
    default_shape,
    default_share_exponent,
    node_weights,
    strengths,
    tree_information,
)
from megatron_ksa.data_tools.tags.partition import random_parts, two_round_greedy
from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.errors import UsageError

# Powers of ten between the weights of the first and the last level.
LARGEST_LEVELS = 100
METHODS = ("tags", "random", "top-quality", "cluster-balanced", "label-graph")
# A lower power counts all masses but 0 alike, and in floats as nothing.
LEAST_POWER = 0.01
PARTS_ALONE = "--parts: not with --quota, --floor, --always and several budgets, which hold for the whole pool"


@dataclass(frozen=True)
class SampleSettings:
    """What one selection does.

    Args:
        budget: as `budget.parse_budget` reads it.
        method: one of `METHODS`.
        align_weight: lambda, nats of divergence against the whole information; used where there is a target.
        phi: one of `objective.PHI`.
        power, share_exponent, branch_exponent, branch_weight, depth_weight: as `objective.node_weights` takes them; a
            share exponent of None is `objective.default_share_exponent`, a power and a branch weight of None those of
            `objective.default_shape`, and with a target 0.4 and 1.
        quality_weight, difficulty_weight: exponents of the scores in s_i.
        parts: greedy in this many random parts, then over the union; 1 is greedy over the whole pool.
        label_similarity: cosine from which labels are joined, for the label graph.
        seed: decides random choices; the same seed chooses the same.
    """

    budget: str = option(
        "5%",
        "How much to choose: instances (5000), a share of them (5%), or tokens (20Mt). Several, rising, with commas: "
        "selections of which each holds the one before.",
        flag="--budget",
    )
    method: str = option(
        "tags", "tags: tree information, aligned to the target if there is one. The others are to compare with.",
        choices=METHODS, flag="--method",
    )  # fmt: skip
    align_weight: float = option(
        ALIGN_WEIGHT,
        "Weight of the divergence from the target, nats against the whole information.",
        flag="--align-weight",
    )
    phi: str = option(
        "power", "How mass on a node counts: x to the --power, or log(1 + x), which depends on the pool's size.",
        choices=PHI, flag="--phi",
    )  # fmt: skip
    power: float | None = option(
        None, f"Exponent of a node's mass, to 1: the lower, the more even. By default {POWER}, and up to "
        f"{POWER_OF_NAMES} where tags are names and there is no target (selection.json has the value).",
        flag="--power",
    )  # fmt: skip
    share_exponent: float | None = option(
        None, "What is sought of a tag is its share of the pool to this exponent: 0 as much of each, 1 as in the pool. "
        f"By default {SHARE_EXPONENT} * (1 - mean of 1/tags of an instance), less where no tag is rarer than those "
        "beside it (selection.json has the value).", flag="--share-exponent",
    )  # fmt: skip
    branch_exponent: float = option(
        BRANCH_EXPONENT, "The same for the branches above the tags, which count --branch-weight times.",
        flag="--branch-exponent",
    )  # fmt: skip
    branch_weight: float | None = option(
        None, "Branches count this many times as much as by their exponent. By default from 0, where tags are a few "
        "names, each as frequent as those beside it, to 1, where rare ones are beside the point or there is a target "
        "(selection.json has the value).", flag="--branch-weight",
    )  # fmt: skip
    depth_weight: float = option(
        1.0, "The nodes of a level count this many times those of the one above.", flag="--depth-weight"
    )
    quality_weight: float = option(1.0, "Exponent of the quality score.", flag="--quality-weight")
    difficulty_weight: float = option(1.0, "Exponent of the difficulty score.", flag="--difficulty-weight")
    parts: int = option(1, "Choose in this many random parts, then from their choices: less memory.", flag="--parts")
    label_similarity: float = option(
        baselines.LABEL_SIMILARITY, "Cosine from which labels are joined (label-graph).", flag="--label-similarity"
    )
    seed: int = option(0, "Decides random choices.", flag="--seed")

    def __post_init__(self) -> None:
        for flag, value, choices in (("--method", self.method, METHODS), ("--phi", self.phi, PHI)):
            if value not in choices:
                raise UsageError(f"{flag} {value}: not one of {', '.join(choices)}")
        exponents = "share_exponent", "branch_exponent", "quality_weight", "difficulty_weight"
        for name in ("align_weight", "branch_weight", *exponents):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise UsageError(f"--{name.replace('_', '-')} {value}: a finite number, at least 0")
        if not (np.isfinite(self.depth_weight) and self.depth_weight > 0):
            raise UsageError(f"--depth-weight {self.depth_weight}: a finite number above 0")
        if self.power is not None and not LEAST_POWER <= self.power <= 1:
            raise UsageError(f"--power {self.power}: from {LEAST_POWER} to 1")
        if self.parts < 1:
            raise UsageError(f"--parts {self.parts}: at least 1")
        if not 0 <= self.label_similarity <= 1:
            raise UsageError(f"--label-similarity {self.label_similarity}: from 0 to 1")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: at least 0")


@dataclass(frozen=True)
class Sample:
    """What was chosen and what it is worth.

    Args:
        chosen: int64 [chosen], in order of choice.
        gains: float64 [chosen], gain of the method's own objective at each choice; NaN for methods without one.
        budget: the budget that was met.
        summary: values for people: information, divergence, tokens, settings.
    """

    chosen: np.ndarray
    gains: np.ndarray
    budget: Budget
    summary: dict = field(default_factory=dict)


class _Problem:
    """One pool and its settings: the objective on any rows of it."""

    def __init__(
        self, pool: Pool, settings: SampleSettings, target: np.ndarray | None, rules: Rules, show_progress: bool
    ) -> None:
        self.pool, self.settings, self.rules, self.show_progress = pool, settings, rules, show_progress
        self.budget = parse_budget(settings.budget, pool.instances, pool.tokens)
        self.target = None if target is None else target / target.sum()
        self.cost = pool.tokens if self.budget.in_tokens else None
        if self.cost is not None and self.cost.min() < 1:
            raise UsageError(
                f"--budget {settings.budget}: instance {int(self.cost.argmin())} of the pool has no tokens"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            self.strength = strengths(
                pool.quality, pool.difficulty,
                quality_weight=settings.quality_weight, difficulty_weight=settings.difficulty_weight,
            )  # fmt: skip
        if not np.isfinite(self.strength).all():
            weights = f"{settings.quality_weight:g} and --difficulty-weight {settings.difficulty_weight:g}"
            raise UsageError(f"--quality-weight {weights}: scores to such exponents are too large to count with")
        most = float(pool.depth.max(initial=0)) * abs(np.log10(settings.depth_weight))
        if most > LARGEST_LEVELS:
            raise UsageError(f"--depth-weight {settings.depth_weight:g}: levels would differ by 10^{most:.0f}")
        given = settings.share_exponent
        self.share_exponent = default_share_exponent(pool.shares) if given is None else given
        # Alignment was chosen for the power 0.4 with branches; with the other shape it comes less near to the target.
        power, branches = default_shape(pool.shares) if target is None else (POWER, 1.0)
        self.power = power if settings.power is None else settings.power
        self.branch_weight = branches if settings.branch_weight is None else settings.branch_weight
        self.weight = node_weights(
            pool.held, pool.parent, pool.depth, phi=settings.phi, power=self.power,
            share_exponent=self.share_exponent, branch_exponent=settings.branch_exponent,
            branch_weight=self.branch_weight, depth_weight=settings.depth_weight,
        )  # fmt: skip
        # What the selection's leaf distribution counts: instances, or tokens where they are what the budget counts.
        self.weighted_shares = (
            pool.shares if self.cost is None else csr_array(diags_array(self.cost.astype(float)) @ pool.shares)
        )

    def information(self, rows: np.ndarray) -> Coverage:
        """I on the given instances, int64 [rows]."""
        return tree_information(
            self.pool.shares[rows], self.strength[rows], self.pool.parent, self.weight,
            phi=self.settings.phi, power=self.power,
        )  # fmt: skip

    def maximise(self, objective) -> Selection:
        """Greedy on `objective`, a function of rows that gives their `Coverage`."""

        def load(rows: np.ndarray) -> tuple[Coverage, np.ndarray | None]:
            return objective(rows), None if self.cost is None else self.cost[rows]

        if self.settings.parts > 1:
            if self.rules:
                raise UsageError(PARTS_ALONE)
            parts = random_parts(self.pool.instances, self.settings.parts, self.settings.seed)
            return two_round_greedy(load, parts, self.budget.amount, show_progress=self.show_progress)
        coverage, cost = load(np.arange(self.pool.instances))
        return greedy(coverage, self.budget.amount, cost, show_progress=self.show_progress, rules=self.rules)

    def value(self, chosen: np.ndarray) -> float:
        """I(S)."""
        return self.information(chosen).value(np.arange(len(chosen)))

    def divergence(self, chosen: np.ndarray) -> float:
        """KL(q || p_S), nats."""
        return divergence(self.target, leaf_distribution(self.weighted_shares, chosen), len(self.pool.leaf_nodes))

    def tags(self) -> tuple[Selection, dict]:
        """The selection by tree information, aligned where there is a target, and what alignment changed."""
        plain = self.maximise(self.information)
        norm = plain.gains.sum()
        if self.target is None or self.settings.align_weight == 0 or norm <= 0:
            return plain, {}

        def aligned(rows: np.ndarray) -> Coverage:
            return align(
                self.information(rows), self.weighted_shares[rows], self.target, len(self.pool.leaf_nodes),
                budget=self.budget.amount, norm=norm, align_weight=self.settings.align_weight,
            )  # fmt: skip

        without = {"information": float(norm), "divergence": self.divergence(plain.chosen)}
        return self.maximise(aligned), {"without_alignment": without}

    def baseline(self) -> Selection:
        """The selection by one of the methods to compare with."""
        pool, settings = self.pool, self.settings
        if settings.method == "label-graph":
            if pool.leaf_vectors is None:
                raise UsageError(
                    "--method label-graph: the tree has no embeddings of its tags; run the tree step again"
                )
            graph = baselines.label_graph(pool.leaf_vectors, settings.label_similarity)
            return self.maximise(
                lambda rows: baselines.label_information(pool.shares[rows], self.strength[rows], pool.leaf_nodes, graph)
            )
        if settings.method == "random":
            order = baselines.random_order(pool.instances, settings.seed)
        elif settings.method == "top-quality":
            order = baselines.top_quality(pool.quality)
        else:
            clusters = baselines.tree_clusters(pool, pool.instances * self.share())
            order = baselines.cluster_balanced(clusters, settings.seed)
        chosen = baselines.spend(order, self.budget.amount, self.cost, self.rules)
        return Selection(chosen, np.full(len(chosen), np.nan), 0)

    def short(self, chosen: np.ndarray) -> int:
        """Instances of the budget that quotas left no room for; 0 for a budget in tokens, which need not come out."""
        return 0 if self.budget.in_tokens else self.budget.amount - len(chosen)

    def share(self) -> float:
        """The budget as a share of the pool's instances or tokens."""
        return self.budget.amount / (self.pool.instances if self.cost is None else self.cost.sum())


def sample(
    pool: Pool,
    settings: SampleSettings,
    target: np.ndarray | None = None,
    *,
    rules: Rules | None = None,
    show_progress: bool = False,
) -> Sample:
    """Choose instances of the pool.

    Args:
        target: float64 [nodes], leaf shares of the target set (of any sum), or None.
        rules: what the selection must hold.

    Raises:
        UsageError: a budget that the pool cannot meet, a target without a tag of the tree, a method that lacks its
            input.
    """
    if not pool.instances:
        raise UsageError("the pool has no instances: nothing to choose from")
    if target is not None and not target.sum() > 0:
        raise UsageError(
            "--target: none of its tags is on the tree; tag it as the pool was tagged, or leave --target out"
        )
    problem = _Problem(pool, settings, target, rules or Rules(), show_progress)
    selection, summary = problem.tags() if settings.method == "tags" else (problem.baseline(), {})
    chosen = selection.chosen
    if not len(chosen):
        raise UsageError("--quota: nothing can be chosen within it")
    summary |= {
        "settings": asdict(settings),
        "pool_instances": pool.instances,
        "instances": len(chosen),
        **({"short_of_budget": short} if (short := problem.short(chosen)) else {}),
        "information": problem.value(chosen),
        "share_exponent": problem.share_exponent,
        "power": problem.power,
        "branch_weight": problem.branch_weight,
        "gains_computed": selection.evaluations,
    }
    if pool.tokens is not None:
        summary |= {"pool_tokens": int(pool.tokens.sum()), "tokens": int(pool.tokens[chosen].sum())}
    if target is not None:
        summary["divergence"] = problem.divergence(chosen)
        summary["target_mass_absent_from_pool"] = float(problem.target[pool.shares.sum(axis=0) == 0].sum())
    return Sample(chosen, selection.gains, problem.budget, summary)

"""What makes a dataset: the top branch or the source of its instances, and what it weighs in the blend."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.objective import ancestors
from megatron_ksa.data_tools.tags.pool import Pool, load_pool, read_records
from megatron_ksa.errors import UsageError

GROUPS = ("branch", "source")
WEIGHTS = ("tokens", "equal", "target")
# Every dataset keeps up to four files open while it is written.
MAX_DATASETS = 100
REST = "rest"
# Weights farther apart are a mistake, and more than a blend's sampling counts with.
LEAST_TIMES, MOST_TIMES = 1e-6, 1e6
# One `name=number`; a name may have commas.
_REPETITION = re.compile(r"\s*(?P<name>.+?)\s*=\s*(?P<times>[0-9.eE+-]+)\s*(?:,|$)", re.DOTALL)


@dataclass(frozen=True)
class GroupSettings:
    """Which datasets the selection makes, and what they weigh.

    Args:
        group_by: one of `GROUPS`, what makes a dataset.
        weights: one of `WEIGHTS`: a dataset counts by its tokens, like every other, or by the target's share of its
            branch.
        min_instances: smaller groups are joined into one named `rest`, as are those beyond the largest hundred.
        repeat: as `repetitions` reads it.
        of_budget: as `selection.selected_rows` takes it.
        every_budget: write a blend of each smaller budget too.

    Raises:
        UsageError: values that do not exist or contradict each other.
    """

    group_by: str = option(
        "branch", "What makes a dataset: a top branch or a source.", choices=GROUPS, flag="--group-by"
    )
    weights: str = option(
        "tokens", "Weight of a dataset: its tokens, the same for all, or the target's share of its branch.",
        choices=WEIGHTS, flag="--weights",
    )  # fmt: skip
    min_instances: int = option(1, "Smaller datasets are joined into one named rest.", flag="--min-instances")
    repeat: str = option(
        "", "Times that a dataset's weight counts, by its name: 'algebra=2,chess=0.5'.", flag="--repeat"
    )

    of_budget: int = option(
        0, "Of several budgets the selection to write, counted from 1; 0: the largest.", flag="--of-budget"
    )
    every_budget: bool = option(
        False, "Write a blend of each smaller budget too: blend/budget-1, blend/budget-2, ...", flag="--every-budget"
    )

    def __post_init__(self) -> None:
        if self.of_budget < 0:
            raise UsageError(f"--of-budget {self.of_budget}: at least 1, or 0 for the largest")
        for name, choices in (("group_by", GROUPS), ("weights", WEIGHTS)):
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: not one of {', '.join(choices)}")
        if self.weights == "target" and self.group_by != "branch":
            raise UsageError("--weights target goes with --group-by branch")
        if self.min_instances < 1:
            raise UsageError(f"--min-instances {self.min_instances}: at least 1")
        repetitions(self.repeat)


def repetitions(text: str) -> dict[str, float]:
    """Times that a dataset counts, by its name.

    Raises:
        UsageError: another form than `name=number,name=number`.
    """
    found: dict[str, float] = {}
    rest = text.strip()
    while rest:
        form = _REPETITION.match(rest)
        try:
            times = float(form["times"]) if form else -1.0
        except ValueError:
            times = -1.0
        if form is None or not (times == 0 or LEAST_TIMES <= times <= MOST_TIMES) or form["name"] in found:
            raise UsageError(
                f"--repeat {rest[:200]}: give NAME=NUMBER, each name once, the number 0 or from {LEAST_TIMES:g} to "
                f"{MOST_TIMES:,.0f}"
            )
        found[form["name"]] = times
        rest = rest[form.end() :].strip()
    return found


def slug(name: str) -> str:
    """A name as part of a file name: lower case ASCII letters, digits and hyphens, at most 40 of them."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")[:40].strip("-") or "unnamed"


@dataclass
class Group:
    """One dataset: its name and file prefix, the top branches in it, and what was written.

    `tokens` are those of the instances, `written_tokens` those of the documents: more where packing fills them.
    """

    name: str
    prefix: str
    nodes: set[int] = field(default_factory=set)
    instances: int = 0
    documents: int = 0
    tokens: int = 0
    tokens_in_loss: int = 0
    written_tokens: int = 0

    def add(self, node: int, mask: np.ndarray) -> None:
        """Count a document, uint8 [tokens], that belongs to a branch."""
        self.nodes.add(node)
        self.instances += 1
        self.tokens += len(mask)
        self.tokens_in_loss += int(mask.sum())


def make_groups(keys: list, names: dict, min_instances: int) -> list[Group]:
    """Group of each instance; the largest comes first, and keys that few instances have share the group `rest`.

    Args:
        keys: what tells an instance's group from the others.
        names: the name of each key.
    """
    sizes = sorted(Counter(keys).items(), key=lambda item: (-item[1], names[item[0]], item[0]))
    kept = [key for key, size in sizes if size >= min_instances]
    if len(kept) > MAX_DATASETS:
        kept = kept[: MAX_DATASETS - 1]
    groups = {key: Group(names[key], f"{i:02d}-{slug(names[key])}_document") for i, key in enumerate(kept)}
    rest = Group(REST, f"{len(kept):02d}-{REST}_document")
    return [groups.get(key, rest) for key in keys]


def groups_of(work: Path, pool: Pool, settings: GroupSettings) -> tuple[list[Group], np.ndarray]:
    """Group and top branch of each instance; the branch is int64 [instances], -1 where a tag is the root itself."""
    branch = branch_of(pool, np.flatnonzero(pool.depth == 1))
    if settings.group_by == "branch":
        keys, names = branch.tolist(), {node: REST if node < 0 else str(pool.names[node]) for node in branch.tolist()}
    else:
        keys = [record["source"] for record in read_records(work, pool.record)]
        names = {key: key for key in keys}
    return make_groups(keys, names, settings.min_instances), branch


def target_mass(work: Path, target: Path | None, settings: GroupSettings) -> np.ndarray | None:
    """The target's mass at or below each node, float64 [nodes], where weights need it.

    Raises:
        UsageError: they do, and there is no target.
    """
    if settings.weights != "target":
        return None
    if target is None:
        raise UsageError("--weights target needs --target")
    grounded = load_pool(target, tree=work)
    return grounded.shares.sum(axis=0) @ ancestors(grounded.parent)


def check_repeated(groups: list[Group], settings: GroupSettings) -> None:
    """Check that datasets to repeat are there.

    Args:
        groups: group of each instance.

    Raises:
        UsageError: one is not, or none is left.
    """
    repeated, names = repetitions(settings.repeat), dict.fromkeys(group.name for group in groups)
    unknown = [name for name in repeated if name not in names]
    if unknown:
        raise UsageError(f"--repeat {unknown[0][:200]}: no such dataset; there are {', '.join(names)}")
    if all(repeated.get(name) == 0 for name in names):
        raise UsageError("--repeat: every dataset has 0, nothing is left to train on")


def weights_of(groups: list[Group], settings: GroupSettings, target: np.ndarray | None) -> list[float]:
    """Weight of each dataset; 0 for one that training shall not read, such as a branch that the target has nothing of.

    Args:
        target: as `target_mass` gives it.

    Raises:
        UsageError: every weight is 0.
    """
    if settings.weights == "tokens":
        weights = [float(group.tokens) for group in groups]
    elif settings.weights == "equal":
        weights = [1.0] * len(groups)
    else:
        weights = [float(sum(target[node] for node in group.nodes if node >= 0)) for group in groups]
    repeated = repetitions(settings.repeat)
    weights = [weight * repeated.get(group.name, 1.0) for weight, group in zip(weights, groups, strict=True)]
    if not any(weights):
        way_out = "raise --align-weight or use --weights tokens" if settings.weights == "target" else "see --repeat"
        raise UsageError(f"--weights {settings.weights}: every dataset has weight 0; {way_out}")
    return weights

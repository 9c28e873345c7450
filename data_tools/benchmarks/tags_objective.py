"""Which selection covers known labels: tree information, its former default with parts changed, MIG, and others.

    python -m megatron_ksa.data_tools.benchmarks.tags_objective --work DIR --out results.json [--readme FILE]

Pools are those of `tags_pools`. The defaults were chosen on the pools of `TUNED`; those of `JUDGED` were looked at
after that, as under earlier defaults, and `KEPT_BACK` once, at the end. 5 % of each pool are chosen with its true tags
and with the offline tagger's. A selection is judged by the labels that it has, by the exponential of the entropy of its
labels, and by the mean of its scores; numbers are means over draws of the scores, of which the first is the pool's own.
So that methods are compared at equal quality, the exponent of the score (`--quality-weight`) of each variant of the
tree is searched for the mean score of MIG's selection, and numbers are taken on the line between the two selections
next to it.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ksa.data_tools.benchmarks.tags_pools import draw_scores, labels_of, make_pool
from megatron_ksa.data_tools.tags.canonicalise import CanonicalSettings
from megatron_ksa.data_tools.tags.duplicates import DuplicateSettings
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_json
from megatron_ksa.data_tools.tags.greedy import greedy
from megatron_ksa.data_tools.tags.objective import (
    OPEN,
    POWER,
    POWER_OF_NAMES,
    RARER,
    SHARE_EXPONENT,
    Coverage,
    default_share_exponent,
    node_weights,
    strengths,
    tree_information,
)  # fmt: skip
from megatron_ksa.data_tools.tags.pipeline import COMMANDS, Pipeline
from megatron_ksa.data_tools.tags.pool import Pool, load_pool
from megatron_ksa.data_tools.tags.sample import SampleSettings, sample
from megatron_ksa.data_tools.tags.step import Context
from megatron_ksa.data_tools.tags.tag import TaggerSettings
from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.markdown import replace_section, table
from megatron_ksa.results import check_settings

TUNED = ("debian", "wordnet", "reasoning-a", "sections")
KEPT_BACK = ("webster", "sayings", "reasoning-words", "several-families")
# Seen under earlier defaults, which they were judged by then; the present ones were not chosen on them.
JUDGED = ("reasoning-b", "verbs", "foldoc", "fortunes", "mixed", "reasoning-c")
# With true tags only. `noise_of_tags` was chosen on these and on what was seen of the pools above.
SEVERAL_TAGS = ("several-words", "several-even", "several-beside", "several-topics", "several-many")
TRUE_ONLY = (*SEVERAL_TAGS, "reasoning-words", "several-families")
ALL = (*TUNED, *JUDGED, *SEVERAL_TAGS, *KEPT_BACK)
TAGGERS = {"data": "true", "keyphrase": "offline"}
SHARE = 0.05
RANDOM_SEEDS = 5
DRAWS = 3
SEARCH_STEPS, LARGEST_EXPONENT = 7, 8.0
DEFAULT = "tree (the default objective)"
# What parts are changed of, one at a time.
FORMER = {"power": 0.4, "branch_weight": 1.0}
CHANGES: dict[str, dict[str, Any]] = {
    "power 0.4 and branches at 1, the former default": {},
    "power 0.8": {"power": 0.8}, "power 0.2": {"power": 0.2},
    "share exponent 0": {"share_exponent": 0.0}, "share exponent 0.2": {"share_exponent": 0.2},
    "share exponent 0.4": {"share_exponent": 0.4}, "branch exponent 0.8": {"branch_exponent": 0.8},
    "branch exponent 0.4": {"branch_exponent": 0.4},
    "both exponents 0": {"share_exponent": 0.0, "branch_exponent": 0.0},
    "exponents 0.4 and 1 whatever the tags, an older default": {"share_exponent": 0.4, "branch_exponent": 1.0},
    "depth weight 0.5": {"depth_weight": 0.5}, "depth weight 2": {"depth_weight": 2.0},
    "log(1 + x)": {"phi": "log1p"},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {DEFAULT: {}, **{name: FORMER | changes for name, changes in CHANGES.items()}}
OLDEST_POWER = 0.8
OLDEST = "the oldest default: levels of equal worth, power 0.8, exponents 0"
RELATIVE = "log(1 + x / x0), x0 a tenth of the mass sought"
# Of the mass that a selection like the pool has.
RELATIVE_SCALE = 0.1


def defaults() -> dict:
    """What a selection is made with where nothing else is said: measurements of other defaults are other ones."""
    return asdict(SampleSettings()) | {
        "share_exponent_of_many_tags": SHARE_EXPONENT,
        "power_of_noise_and_names": [POWER, POWER_OF_NAMES],
        "noise": {"rarer": RARER, "open": OPEN},
    }


def taggers_of(pool: str) -> dict[str, str]:
    """What a pool is tagged with, and what these tags are called."""
    return {tagger: tags for tagger, tags in TAGGERS.items() if tags == "true" or pool not in TRUE_ONLY}


def grouped(pools: Iterable[str]) -> list[tuple[str, str, list[str]]]:
    """What tables are of: the tagger, what its tags are called, and the pools; those of several true tags are apart."""
    pools = list(pools)
    groups = [(tagger, tags, [pool for pool in pools if pool not in TRUE_ONLY]) for tagger, tags in TAGGERS.items()]
    groups.append(("data", "several true", [pool for pool in pools if pool in TRUE_ONLY]))
    return [group for group in groups if group[2]]


def prepare(work: Path, pool: str, tagger: str, rare: int | None = None) -> tuple[Pool, np.ndarray]:
    """A pool on its tree, and the label of each instance, int64 [instances]. Duplicates stay.

    Args:
        rare: `--rare-tags`; None for the default.
    """
    folder = make_pool(pool, work)
    steps = [*COMMANDS["tag"].steps, *COMMANDS["tree"].steps]
    settings = {config: config() for step in steps for config in step.settings.values()}
    settings |= {TaggerSettings: TaggerSettings(kind=tagger), DuplicateSettings: DuplicateSettings(similarity=0)}
    if rare is not None:
        settings[CanonicalSettings] = CanonicalSettings(rare=rare)
    target = folder / (tagger if rare is None else f"{tagger}-rare-{rare}")
    Pipeline(Context(target, Engine(), (folder / "pool.jsonl",)), settings, lambda line: None).run(steps)
    grounded, labels = load_pool(target, vectors=True), labels_of(folder)
    ids = [record["id"] for record in read_jsonl(target / "records.jsonl")]
    return grounded, np.unique([labels[ids[line]] for line in grounded.record], return_inverse=True)[1]


def judge(pool: Pool, labels: np.ndarray, chosen: np.ndarray) -> dict:
    """Labels covered, exponential of their entropy, mean score."""
    count = np.bincount(labels[chosen])
    share = count[count > 0] / len(chosen)
    effective = float(np.exp(-(share * np.log(share)).sum()))
    return {"labels": int((count > 0).sum()), "effective": effective, "quality": float(pool.quality[chosen].mean())}


def _levels_alike(pool: Pool, settings: SampleSettings) -> np.ndarray:
    """Each level of equal worth for each unit of mass of a selection like the pool, as the first version had it."""
    amount, nodes = int(settings.budget), len(pool.parent)
    plain = Coverage(tree_information(pool.shares, np.ones(pool.instances), pool.parent, np.ones(nodes)).mass,
                     np.ones(nodes), np.zeros(nodes), OLDEST_POWER)  # fmt: skip
    worth = np.bincount(pool.depth, plain.phi(amount * pool.held))
    weight = (np.bincount(pool.depth, pool.held) / worth)[pool.depth]
    strength = strengths(pool.quality, pool.difficulty, quality_weight=settings.quality_weight)
    coverage = tree_information(pool.shares, strength, pool.parent, weight, power=OLDEST_POWER)
    return greedy(coverage, amount).chosen


def _relative_logarithm(pool: Pool, settings: SampleSettings) -> np.ndarray:
    """log(1 + x / x0) with x0 a tenth of what a node's level would hold of it in the budget: scale-free too."""
    exponent = default_share_exponent(pool.shares)
    weight = node_weights(pool.held, pool.parent, pool.depth, phi="log1p", share_exponent=exponent)
    level = np.bincount(pool.depth, weight, minlength=int(pool.depth.max()) + 1)
    held = np.bincount(pool.depth, pool.held)
    sought = float(settings.budget) * weight * (held / level)[pool.depth]
    strength = strengths(pool.quality, pool.difficulty, quality_weight=settings.quality_weight)
    coverage = tree_information(pool.shares, strength, pool.parent, weight)
    scale = 1 / np.maximum(RELATIVE_SCALE * sought, 1e-12)
    return greedy(replace(coverage, scale=scale), int(settings.budget)).chosen


def at_quality(choose: Callable[[float], np.ndarray], pool: Pool, labels: np.ndarray, quality: float) -> dict:
    """What a choice by exponent of the score is worth at the mean score `quality`, or as near as it comes."""
    low, high = 0.0, LARGEST_EXPONENT
    below, above = None, None
    for _ in range(SEARCH_STEPS):
        exponent = (low + high) / 2
        found = {**judge(pool, labels, choose(exponent)), "quality_weight": exponent}
        if found["quality"] < quality:
            low, below = exponent, found
        else:
            high, above = exponent, found
    if below is None or above is None:
        return below or above or {}
    part = (quality - below["quality"]) / (above["quality"] - below["quality"])
    return {key: (1 - part) * below[key] + part * above[key] for key in below}


def compare(pool: Pool, labels: np.ndarray) -> dict[str, dict]:
    """Every method on one pool: means over draws of the scores."""
    draws = [_compare(pool, labels)]
    for seed in range(1, DRAWS):
        scores = draw_scores(labels, np.random.default_rng(seed))
        draws.append(_compare(replace(pool, quality=scores), labels))
    return {
        method: {key: statistics.fmean(draw[method][key] for draw in draws) for key in draws[0][method]}
        for method in draws[0]
    }


def _compare(pool: Pool, labels: np.ndarray) -> dict[str, dict]:
    settings = SampleSettings(str(round(SHARE * pool.instances)))

    def chosen(**changes: Any) -> np.ndarray:
        return sample(pool, replace(settings, **changes)).chosen

    mig = judge(pool, labels, chosen(method="label-graph"))
    result = {"MIG (label-graph)": mig}
    for name, changes in VARIANTS.items():
        by_exponent = lambda exponent, changes=changes: chosen(quality_weight=exponent, **changes)  # noqa: E731
        result[name] = at_quality(by_exponent, pool, labels, mig["quality"])
    for name, choose in ((RELATIVE, _relative_logarithm), (OLDEST, _levels_alike)):
        by_exponent = lambda exponent, choose=choose: choose(  # noqa: E731
            pool, replace(settings, quality_weight=exponent)
        )
        result[name] = at_quality(by_exponent, pool, labels, mig["quality"])
    result["tree, --quality-weight 1"] = judge(pool, labels, chosen())
    result["top quality"] = judge(pool, labels, chosen(method="top-quality"))
    random = [judge(pool, labels, chosen(method="random", seed=seed)) for seed in range(RANDOM_SEEDS)]
    result["random"] = {key: float(np.mean([row[key] for row in random])) for key in random[0]}
    return result


def section(results: dict[str, dict]) -> str:
    """One table a tagger: labels covered, their effective number and the mean score of each method and pool."""
    parts = []
    for tagger, name, pools in grouped(results):
        columns = {pool: results[pool] for pool in pools if tagger in results[pool]}
        if not columns:
            continue
        heads = [
            f"{pool} ({row['labels']} labels, {row[tagger]['instances']:,} instances)" for pool, row in columns.items()
        ]
        methods = list(next(iter(columns.values()))[tagger]["methods"])
        rows = []
        for method in methods:
            found = [row[tagger]["methods"][method] for row in columns.values()]
            rows.append(
                [method, *(f"{each['labels']:.1f}, {each['effective']:.1f}, {each['quality']:.2f}" for each in found)]
            )
        parts += [
            f"With {name} tags: labels covered, effective number of labels, mean score.",
            table(["", *heads], rows),
        ]
    return "\n\n".join(parts)


def main() -> None:
    """Run and write the numbers; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--work", type=Path, required=True, help="folder of pools and work folders")
        parser.add_argument("--out", type=Path, required=True, help="JSON file to write; pools that it has stay")
        parser.add_argument("--pools", nargs="+", default=list(ALL))
        parser.add_argument("--readme", type=Path, help="file with a section tags_objective that takes the tables")
        args = parser.parse_args()
        results = {}
        if args.out.exists():
            there = json.loads(args.out.read_text(encoding="utf-8"))
            check_settings(args.out, there.get("settings"), defaults())
            results = there["pools"]
        for name in args.pools:
            for tagger in taggers_of(name):
                if tagger in results.get(name, {}):
                    continue
                pool, labels = prepare(args.work, name, tagger)
                row = results.setdefault(name, {"labels": int(labels.max()) + 1})
                row[tagger] = {"instances": pool.instances, "methods": compare(pool, labels)}
                write_json(
                    args.out, {"share": SHARE, "draws_of_scores": DRAWS, "settings": defaults(), "pools": results}
                )
                print(f"{name}, {TAGGERS[tagger]} tags: {json.dumps(row[tagger]['methods'])}", flush=True)
        text = section({name: results[name] for name in args.pools})
        print(text)
        if args.readme:
            replace_section(args.readme, "tags_objective", text)


if __name__ == "__main__":
    main()

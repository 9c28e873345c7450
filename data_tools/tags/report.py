"""The report step: a page, a picture and a summary of what was selected from what, in `report/` of a work folder."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.indexed import sequence_lengths
from megatron_ksa.data_tools.tags import report_audit
from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS, MERGES
from megatron_ksa.data_tools.tags.decontaminate import CONTAMINATED
from megatron_ksa.data_tools.tags.duplicates import DUPLICATES
from megatron_ksa.data_tools.tags.files import read_arrays, read_jsonl, write_json
from megatron_ksa.data_tools.tags.ground import GROUNDING, UNPLACED
from megatron_ksa.data_tools.tags.groups import REST
from megatron_ksa.data_tools.tags.pool import Pool, load_pool
from megatron_ksa.data_tools.tags.read import RECORDS, REJECTED
from megatron_ksa.data_tools.tags.report_audit import LEFT_OUT, left_out
from megatron_ksa.data_tools.tags.report_compare import Measures, measure, random_measures, rows_of_other
from megatron_ksa.data_tools.tags.report_data import NodeStatistics, choose_samples, node_statistics, typical_rows
from megatron_ksa.data_tools.tags.report_image import draw_report
from megatron_ksa.data_tools.tags.report_page import node_columns, render
from megatron_ksa.data_tools.tags.report_points import MOST_POINTS, point_columns, point_rows
from megatron_ksa.data_tools.tags.selection import SELECTION, SUMMARY, UNWRITABLE, read_selection, read_summary
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import FAILED
from megatron_ksa.data_tools.tags.tree import BRANCH_NAMES, TREE
from megatron_ksa.data_tools.tags.write import BLEND, BLEND_SUMMARY
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

SAMPLES = 3000
EXCERPT = 500
NAME = 100
# A folder, and in it the page.
REPORT, PAGE = "report", "index.html"
SOURCES = 40
LENGTH_BINS = 40


@dataclass(frozen=True)
class ReportSettings:
    """The report.

    Raises:
        UsageError: a number out of range.
    """

    compare: str | None = option(
        None, "Work folder of another run on this pool, whose selection is shown beside this one.", flag="--compare"
    )
    points: int = option(
        MOST_POINTS, "Instances on the map and in its lists, at most; of more all chosen and random others.",
        flag="--report-points",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.points <= 10_000_000:
            raise UsageError(f"--report-points {self.points}: from 1 to 10,000,000")


@dataclass(frozen=True)
class _Groups:
    """Instances of the pool that are shown beside each other: int64 rows, of the other run None without one."""

    chosen: np.ndarray
    other: np.ndarray | None
    other_absent: int = 0


class _Scan:
    """What the report needs of `records.jsonl`, in one pass."""

    def __init__(self, work: Path, pool: Pool, groups: _Groups, points: np.ndarray, samples: np.ndarray) -> None:
        state = np.zeros((pool.instances, 2), bool)
        state[groups.chosen, 0] = True
        if groups.other is not None:
            state[groups.other, 1] = True
        self.sources: dict[str, Counter] = {}
        self.ids: list[str] = []
        self.point_sources: list[str] = []
        self.records: dict[int, dict] = {}
        is_point, is_sample = np.zeros(pool.instances, bool), np.zeros(pool.instances, bool)
        is_point[points], is_sample[samples] = True, True
        row = 0
        for line, record in enumerate(read_jsonl(work / RECORDS)):
            if row == pool.instances:
                break
            if line != pool.record[row]:
                continue
            source = str(record["source"])
            counts = self.sources.setdefault(source, Counter())
            counts["pool"] += 1
            counts["selected"] += int(state[row, 0])
            counts["other"] += int(state[row, 1])
            if is_point[row]:
                self.ids.append(str(record["id"])[:NAME])
                self.point_sources.append(source[:NAME])
            if is_sample[row]:
                self.records[row] = {
                    "id": str(record["id"])[:NAME],
                    "source": source[:NAME],
                    "text": report_audit.record_excerpt(record, EXCERPT),
                }
            row += 1


def _samples(
    pool: Pool, groups: _Groups, scan: _Scan, rows: np.ndarray, typical: np.ndarray, place: np.ndarray,
    branch: np.ndarray,
) -> list[dict]:  # fmt: skip
    is_typical = np.isin(rows, typical)
    is_chosen = np.isin(rows, groups.chosen)
    is_other = np.zeros(len(rows), bool) if groups.other is None else np.isin(rows, groups.other)
    return [
        {
            **scan.records[row],
            "selected": bool(is_chosen[number]),
            "other": bool(is_other[number]),
            "typical": bool(is_typical[number]),
            "quality": None if np.isnan(pool.quality[row]) else float(pool.quality[row]),
            "difficulty": None if np.isnan(pool.difficulty[row]) else float(pool.difficulty[row]),
            "branch": int(place[branch[row]]) if branch[row] >= 0 else -1,
            "leaves": place[pool.leaves[pool.indptr[row] : pool.indptr[row + 1]]].tolist(),
        }
        for number, row in enumerate(rows.tolist())
    ]


def branch_rows(
    pool: Pool, statistics: NodeStatistics, chosen: np.ndarray, branch: np.ndarray | None = None
) -> list[dict]:
    """The top branches, the largest first, as they are in the summary.

    An instance has a tag in each of several branches (`pool`, `selected`) and one branch (`own`, `own_selected`).

    Args:
        branch: int64 [instances], the top branch of each, where it is known.
    """
    branches = np.flatnonzero(pool.depth == 1)
    branch = branch_of(pool, branches) if branch is None else branch
    own, own_selected = (np.bincount(rows[rows >= 0], minlength=len(pool.parent)) for rows in (branch, branch[chosen]))

    def value(column: np.ndarray | None, node: int) -> float | int | None:
        return None if column is None or np.isnan(column[node]) else column[node].item()

    return [
        {
            "name": str(pool.names[node]),
            "own": int(own[node]),
            "own_selected": int(own_selected[node]),
            **{name: value(column, node) for name, column in vars(statistics).items()},
        }  # fmt: skip
        for node in branches[np.argsort(-statistics.pool_share[branches], kind="stable")]
    ]


def _own_note(blend: dict | None, chosen: int) -> str:
    """What a branch's own instances have to do with the datasets that were written."""
    if blend is None:
        return "Own: each instance counts in one branch."
    if blend["settings"]["group_by"] != "branch":
        return "Own: each instance counts in one branch; the datasets are sources."
    note = "Own: each instance counts in one branch, that of its dataset"
    if any(dataset["name"] == REST for dataset in blend["datasets"]):
        note += f", small ones being one dataset named {REST}"
    missing = chosen - blend["instances"]
    return f"{note}. Selected, but in no dataset: {missing:,} (see Counts)." if missing else note + "."


def _facts(summary: dict, statistics: NodeStatistics, blend: dict | None) -> list[tuple[str, str]]:
    settings = summary["settings"]
    facts = [
        ("method", settings["method"]),
        ("selected", f"{summary['instances']:,} of {summary['pool_instances']:,} instances"),
    ]
    if "tokens" in summary:
        facts.append(("tokens", f"{summary['tokens']:,} of {summary['pool_tokens']:,}"))
    if blend is not None:
        budget = blend["settings"]["of_budget"]
        which = f", budget {budget}" if budget else ""
        facts.append(("written", f"{blend['instances']:,} instances in {len(blend['datasets']):,} datasets{which}"))
    facts.append(("tag mass covered", f"{100 * np.nan_to_num(statistics.coverage[0]):.1f} %"))
    facts.append(("information", f"{summary['information']:,.1f}"))
    if "divergence" in summary:
        facts.append(("KL from target", f"{summary['divergence']:.4f} nats"))
    if "without_alignment" in summary:
        without = summary["without_alignment"]
        facts.append(
            ("without alignment", f"{without['divergence']:.4f} nats, information {without['information']:,.1f}")
        )
    return facts


def _tables(counts: dict[str, dict[str, int]], blend: dict | None) -> list[dict]:
    rows = [[LEFT_OUT[name], reason, count] for name, reasons in counts.items() for reason, count in reasons.items()]
    tables = [{"columns": ["left out", "reason", "instances"], "rows": rows or [["none", "", 0]]}]
    if blend is not None:
        columns = ["name", "instances", "tokens", "tokens_in_loss", "weight"]
        tables.append({
            "columns": ["dataset", "instances", "tokens", "tokens in the loss", "weight"],
            "rows": [[dataset[name] for name in columns] for dataset in blend["datasets"]],
        })  # fmt: skip
    return tables


def _sources(scan: _Scan) -> list[dict]:
    """Instances of each source, the largest first; those beyond the largest are one row."""
    rows = sorted(scan.sources.items(), key=lambda item: (-item[1]["pool"], item[0]))
    rest = sum((counts for _, counts in rows[SOURCES:]), Counter())
    shown = [(name[:NAME], counts) for name, counts in rows[:SOURCES]]
    shown += [(f"{len(rows) - SOURCES:,} smaller sources", rest)] if rest else []
    return [{"name": name, **{key: counts[key] for key in ("pool", "selected", "other")}} for name, counts in shown]


def _histogram(values: dict[str, np.ndarray], edges: np.ndarray) -> dict:
    counts = {name: np.histogram(each, edges)[0].tolist() for name, each in values.items()}
    return {"edges": edges.tolist(), "counts": counts}


def _log_edges(values: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(values)
    low, high = max(1, int(whole.min())), max(2, int(whole.max()) + 1)
    return np.unique(np.round(np.geomspace(low, high, LENGTH_BINS + 1)))


def _distributions(work: Path, pool: Pool, groups: _Groups, target: Pool | None, blend: dict | None) -> dict:
    """Histograms of quality, difficulty and length of the pool, the selection, the target and the other run."""
    length = read_arrays(work / GROUNDING)["length"]
    rows = {"pool": np.arange(pool.instances), "selected": groups.chosen}
    if groups.other is not None:
        rows["other"] = groups.other
    found = {}
    for name in ("quality", "difficulty"):
        scores = {group: getattr(pool, name)[each] for group, each in rows.items()}
        if target is not None:
            scores["target"] = getattr(target, name)
        scores = {group: each[~np.isnan(each)] for group, each in scores.items()}
        if any(len(each) for each in scores.values()):
            found[name] = _histogram(scores, np.arange(0.75, 10.5, 0.5))
    characters = {group: np.maximum(length[each], 1) for group, each in rows.items()}
    found["characters"] = _histogram(characters, _log_edges(list(characters.values()))) | {"log": True}
    if blend is not None and blend["datasets"]:
        # Paths of another machine may have been copied here with the folder.
        prefixes = [work / BLEND / Path(dataset["prefix"]).name for dataset in blend["datasets"]]
        tokens = [np.maximum(sequence_lengths(str(prefix)), 1) for prefix in prefixes]
        written = {"selected": np.concatenate(tokens)}
        found["tokens"] = _histogram(written, _log_edges(tokens)) | {"log": True}
    return found


def _comparison(pool: Pool, groups: _Groups, branch: np.ndarray, length: np.ndarray) -> dict:
    """Measures of this selection, random ones and the other run's, and how far the two runs agree."""
    both = [0] if groups.other is None else np.intersect1d(groups.chosen, groups.other)

    def values(found: Measures) -> dict:
        return {name: None if np.isnan(value) else value for name, value in asdict(found).items()}

    rows = {
        "this selection": values(measure(pool, groups.chosen, branch, length)),
        "random": values(random_measures(pool, len(groups.chosen), branch, length)),
    }
    found: dict = {"measures": rows}
    if groups.other is not None:
        rows["other run"] = values(measure(pool, groups.other, branch, length))
        found["overlap"] = {
            "in both": len(both), "only here": len(groups.chosen) - len(both),
            "only in the other run": len(groups.other) - len(both), "not in this pool": groups.other_absent,
        }  # fmt: skip
    return found


def report_step(work: Path, *, target: Path | None = None, settings: ReportSettings | None = None) -> dict:
    """Write `report/index.html`, `report/overview.png` and `report/summary.json`.

    Args:
        target: the target's folder, or None.

    Returns:
        The summary.

    Raises:
        UsageError: a file of an earlier step is missing, or the other run's selection is of another pool.
    """
    settings = settings or ReportSettings()
    pool, chosen = load_pool(work, vectors=True), read_selection(work)
    other, absent = (None, 0) if settings.compare is None else rows_of_other(work, pool, Path(settings.compare))
    groups = _Groups(chosen, other, absent)
    selection = read_summary(work / SUMMARY)
    wanted = None if target is None else load_pool(target, tree=work, vectors=True)
    statistics = node_statistics(pool, chosen, None if wanted is None else wanted.shares, other)
    branch = branch_of(pool, np.flatnonzero(pool.depth == 1))
    nodes, place = node_columns(pool, statistics)
    counts = left_out(work)
    summary_path = work / BLEND / BLEND_SUMMARY
    blend = read_summary(summary_path) if summary_path.exists() else None
    is_chosen = np.zeros(pool.instances, bool)
    is_chosen[chosen] = True
    typical = typical_rows(pool, branch, is_chosen)
    sample_rows, _ = choose_samples(pool, chosen, SAMPLES, typical)
    rows = point_rows(pool.instances, chosen, settings.points)
    scan = _Scan(work, pool, groups, rows, sample_rows)
    branches = branch_rows(pool, statistics, chosen, branch)
    shown = len(nodes["parent"])
    comparison = _comparison(pool, groups, branch, read_arrays(work / GROUNDING)["length"])
    data = {
        "nodes": nodes,
        "own": _own_columns(pool, place, branch, groups) | {"note": _own_note(blend, len(chosen))},
        "points": point_columns(pool, rows, chosen, other, branch, place, wanted)
        | {"ids": scan.ids, **_coded(scan.point_sources)},
        "samples": _samples(pool, groups, scan, sample_rows, typical, place, branch),
        "facts": _facts(selection, statistics, blend),
        "tables": _tables(counts, blend),
        "sources": _sources(scan),
        "distributions": _distributions(work, pool, groups, wanted, blend),
        "comparison": comparison,
        "audit": [
            report_audit.merges(work),
            report_audit.duplicates(work),
            report_audit.contaminated(work),
            report_audit.failures(work),
        ],
        "settings": report_audit.settings(work),
        "note": f"{shown:,} nodes"
        if shown == len(pool.parent)
        else f"the {shown:,} largest of {len(pool.parent):,} nodes",
    }
    summary = {
        "selection": selection,
        "nodes": len(pool.parent),
        "nodes_shown": shown,
        "points_shown": len(rows),
        "tag_mass_covered": float(np.nan_to_num(statistics.coverage[0])),
        "branches": branches,
        "left_out": counts,
        "blend": blend,
        "sources": data["sources"],
        "comparison": comparison,
    }
    folder = work / REPORT
    with whole_file(folder / PAGE) as stream:
        stream.write(render(data))
    draw_report(folder / "overview.png", pool, statistics, f"{len(chosen):,} of {pool.instances:,} instances selected")
    write_json(folder / "summary.json", summary)
    return summary


def _own_columns(pool: Pool, place: np.ndarray, branch: np.ndarray, groups: _Groups) -> dict:
    """Instances whose one branch a top branch is, by its place in the page."""
    nodes = np.flatnonzero(pool.depth == 1)
    found: dict = {"nodes": place[nodes].tolist()}
    rows = {"pool": np.arange(pool.instances), "selected": groups.chosen, "other": groups.other}
    for name, each in rows.items():
        if each is not None:
            own = branch[each]
            found[name] = np.bincount(own[own >= 0], minlength=len(pool.parent))[nodes].tolist()
    return found


def _coded(names: list[str]) -> dict:
    """Names as numbers into a list of them."""
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return {"source": [known[name] for name in names], "sources": list(known)}


def _run(context: Context, settings: ReportSettings) -> dict:
    summary = report_step(context.folder, target=context.target, settings=settings)
    return {name: summary[name] for name in ("nodes", "nodes_shown", "points_shown")}


def _inputs(context: Context, settings: ReportSettings) -> dict[str, Path]:
    target = {} if context.target is None else context.files(context.target, "target", GROUNDING)
    other = {} if settings.compare is None else context.files(Path(settings.compare), "other run", SELECTION)
    return target | other


def _check(context: Context, settings: ReportSettings) -> None:
    if settings.compare is not None and not (Path(settings.compare) / SELECTION).is_file():
        raise UsageError(f"--compare {settings.compare}: no {SELECTION} there; run the sample step of that folder")


STEP = Step(
    "report", {"report": ReportSettings}, reads=(RECORDS, GROUNDING, TREE, BRANCH_NAMES, EMBEDDINGS, SELECTION, SUMMARY,
    MERGES, REJECTED, FAILED, DUPLICATES, CONTAMINATED, UNWRITABLE, UNPLACED, BLEND), writes=(REPORT,), run=_run,
    also_reads=_inputs, check=_check,
)  # fmt: skip

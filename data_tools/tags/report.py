"""The report step: a page, a picture and a summary of what was selected from what, in `report/` of a work folder."""

from collections import Counter
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.duplicates import DUPLICATES
from megatron_ksa.data_tools.tags.files import read_jsonl, write_json
from megatron_ksa.data_tools.tags.ground import GROUNDING, UNPLACED
from megatron_ksa.data_tools.tags.pool import Pool, load_pool, read_records
from megatron_ksa.data_tools.tags.read import RECORDS, REJECTED
from megatron_ksa.data_tools.tags.report_data import NodeStatistics, choose_samples, node_statistics
from megatron_ksa.data_tools.tags.report_image import draw_report
from megatron_ksa.data_tools.tags.report_page import node_columns, render
from megatron_ksa.data_tools.tags.selection import SELECTION, SUMMARY, read_selection, read_summary
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import FAILED
from megatron_ksa.data_tools.tags.tree import BRANCH_NAMES, TREE
from megatron_ksa.data_tools.tags.write import BLEND, BLEND_SUMMARY, UNWRITTEN
from megatron_ksa.files import whole_file

SAMPLES = 3000
EXCERPT = 500
# A folder, and in it the page.
REPORT, PAGE = "report", "index.html"
LEFT_OUT = {
    REJECTED: "could not be read",
    FAILED: "could not be tagged",
    DUPLICATES: "near-duplicates",
    UNPLACED: "no tag on the tree",
    f"{BLEND}/{UNWRITTEN}": "refused by the template",
}


def _excerpt(record: dict) -> str:
    text = record.get("text")
    if text is None:
        text = "\n".join(f"[{message['role']}] {message['content']}" for message in record["messages"])
    return text if len(text) <= EXCERPT else text[:EXCERPT] + " …"


def _samples(work: Path, pool: Pool, chosen: np.ndarray, place: np.ndarray) -> list[dict]:
    rows, is_chosen = choose_samples(pool, chosen, SAMPLES)
    return [
        {
            "id": str(record["id"])[:100],
            "source": str(record["source"])[:100],
            "text": _excerpt(record),
            "selected": bool(selected),
            "quality": None if np.isnan(pool.quality[row]) else float(pool.quality[row]),
            "difficulty": None if np.isnan(pool.difficulty[row]) else float(pool.difficulty[row]),
            "leaves": place[pool.leaves[pool.indptr[row] : pool.indptr[row + 1]]].tolist(),
        }
        for row, selected, record in zip(rows, is_chosen, read_records(work, pool.record[rows]), strict=True)
    ]


def left_out(work: Path) -> dict[str, dict[str, int]]:
    """For each file of instances that are left out, how many there are for each reason."""
    return {
        name: dict(sorted(Counter(row.get("reason", reason) for row in read_jsonl(work / name)).items()))
        for name, reason in LEFT_OUT.items()
        if (work / name).exists()
    }


def branch_rows(pool: Pool, statistics: NodeStatistics, chosen: np.ndarray) -> list[dict]:
    """The top branches, the largest first, as they are in the summary.

    An instance has a tag in each of several branches (`pool`, `selected`) and one branch (`own`, `own_selected`).
    """
    branches = np.flatnonzero(pool.depth == 1)
    branch = branch_of(pool, branches)
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


def _facts(summary: dict, statistics: NodeStatistics) -> list[tuple[str, str]]:
    settings = summary["settings"]
    facts = [
        ("method", settings["method"]),
        ("selected", f"{summary['instances']:,} of {summary['pool_instances']:,} instances"),
    ]
    if "tokens" in summary:
        facts.append(("tokens", f"{summary['tokens']:,} of {summary['pool_tokens']:,}"))
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


def report_step(work: Path, *, target: Path | None = None) -> dict:
    """Write `report/index.html`, `report/overview.png` and `report/summary.json`.

    Args:
        target: the target's folder, or None.

    Returns:
        The summary.

    Raises:
        UsageError: a file of an earlier step is missing.
    """
    pool, chosen = load_pool(work, vectors=True), read_selection(work)
    selection = read_summary(work / SUMMARY)
    wanted: csr_array | None = None if target is None else load_pool(target, tree=work).shares
    statistics = node_statistics(pool, chosen, wanted)
    nodes, place = node_columns(pool, statistics)
    counts = left_out(work)
    blend = read_summary(work / BLEND / BLEND_SUMMARY) if (work / BLEND / BLEND_SUMMARY).exists() else None
    shown = len(nodes["parent"])
    data = {
        "nodes": nodes,
        "samples": _samples(work, pool, chosen, place),
        "facts": _facts(selection, statistics),
        "tables": _tables(counts, blend),
        "note": f"{shown:,} nodes"
        if shown == len(pool.parent)
        else f"the {shown:,} largest of {len(pool.parent):,} nodes",
    }
    summary = {
        "selection": selection,
        "nodes": len(pool.parent),
        "nodes_shown": shown,
        "tag_mass_covered": float(np.nan_to_num(statistics.coverage[0])),
        "branches": branch_rows(pool, statistics, chosen),
        "left_out": counts,
        "blend": blend,
    }
    folder = work / REPORT
    with whole_file(folder / PAGE) as stream:
        stream.write(render(data))
    draw_report(folder / "overview.png", pool, statistics, f"{len(chosen):,} of {pool.instances:,} instances selected")
    write_json(folder / "summary.json", summary)
    return summary


def _run(context: Context) -> dict:
    summary = report_step(context.folder, target=context.target)
    return {"nodes": summary["nodes"], "nodes_shown": summary["nodes_shown"]}


def _target(context: Context) -> dict[str, Path]:
    return {} if context.target is None else context.files(context.target, "target", GROUNDING)


STEP = Step(
    "report", {}, reads=(RECORDS, GROUNDING, TREE, BRANCH_NAMES, EMBEDDINGS, SELECTION, SUMMARY, REJECTED, FAILED,
    DUPLICATES, UNPLACED, BLEND), writes=(REPORT,), run=_run, also_reads=_target,
)  # fmt: skip

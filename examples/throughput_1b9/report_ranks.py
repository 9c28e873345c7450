"""Tables of the runs on several GPUs: tokens/s, memory and time by layout, what of the communication is exposed.

    python examples/throughput_1b9/report_ranks.py examples/throughput_1b9/results_ranks.json docs/results.md

They go into the section `throughput_1b9_ranks` of the Markdown file. Predicted are what `tools/plan_cluster.py` takes
for a step and a GPU's memory, and its bytes; sent is what the ranks asked NCCL to send, as a ring sends it.
"""

import json
from pathlib import Path

from layouts import parse_layout

from megatron_ksa.markdown import replace_section, report_command, table

SECTION = "throughput_1b9_ranks"
NAMES = {"ksa": "KSA", "full": "full attention"}
SHAPES = {"1b9": "1.9B", "8b": "8B"}
# Attention's operations grow with the square of the length, all others with the length.
ATTENTION = ("attention forward", "attention backward")


def name_of(run: dict) -> str:
    """Layout of a run, in words."""
    layout, kind = parse_layout(run["layout"]), run.get("kind", "default")
    sizes = [f"{name} {size}" for name, size in (("TP", layout.tensor), ("CP", layout.context)) if size > 1]
    words = [
        " x ".join(sizes) or "one GPU", "all-to-all" * (layout.comm == "a2a"),
        "recompute to fit" * layout.fit, "" if kind in ("default", "local") else kind,
    ]  # fmt: skip
    return ", ".join(filter(None, words))


def exposed(run: dict) -> dict:
    """The profile of the rank with most exposed communication; empty where none was profiled."""
    profiles = [rank["profile"] for rank in run["ranks"] if "exposed" in rank["profile"]]
    return max(profiles, key=lambda profile: profile["exposed"], default={})


def most_sent(run: dict) -> dict[str, float]:
    """GB of the rank that sends most, by kind of parallelism."""
    ranks = [rank["profile"]["sent_gb"] for rank in run["ranks"] if "sent_gb" in rank["profile"]]
    return max(ranks, key=lambda sent: sum(sent.values()), default={})


def difference(actual: float, predicted: float) -> str:
    """How far the prediction is off, in percent of what was measured."""
    return f"{(predicted - actual) / actual * 100:+.0f} %"


def speeds(runs: list[dict]) -> str:
    """Tokens/s, memory and the plan's prediction of each run."""
    one = {computation(run): run["tokens_per_second"] for run in runs if run["gpus"] == 1}
    full = {(sizes(run), *computation(run)[:-1]): run["tokens_per_second"] for run in runs
            if run["model"] == "full" and parse_layout(run["layout"]).comm == "p2p"}  # fmt: skip
    rows = []
    for run in runs:
        single = one.get(computation(run))
        dense = full.get((sizes(run), *computation(run)[:-1])) if run["model"] == "ksa" else None
        predicted, ms, speed = run["predicted"], run["iteration_ms"], run["tokens_per_second"]
        rows.append([
            SHAPES[run["shape"]], f"{run['length']:,}", name_of(run), NAMES[run["model"]], f"{speed:,.0f}",
            f"{speed / single:.2f}" if single and run["gpus"] > 1 else "", f"{speed / dense:.2f}" if dense else "",
            f"{run['mfu'] * 100:.1f} %" if run["mfu"] else "", f"{run['peak_gib']:.1f}",
            difference(run["peak_gib"], predicted["memory_gib"]), f"{ms / 1e3:.2f}",
            difference(ms / 1e3, predicted["seconds"]),
        ])  # fmt: skip
    return table(
        ["model", "text tokens", "layout", "attention", "tokens/s", "/ one GPU", "KSA / full", "MFU", "peak GiB",
         "predicted", "s a step", "predicted"], rows,
    )  # fmt: skip


def sizes(run: dict) -> tuple[int, int]:
    """Tensor- and context-parallel size of a run."""
    layout = parse_layout(run["layout"])
    return layout.tensor, layout.context


def computation(run: dict) -> tuple:
    """What two layouts of one computation share; the model, KSA or full attention, is the last of it."""
    fit = parse_layout(run["layout"]).fit
    return run["shape"], run["length"], run.get("kind", "default"), fit, run["model"]


def communication(runs: list[dict]) -> str:
    """NCCL's kernels beside the others, and bytes beside the formula."""
    rows = []
    for run in runs:
        if run["gpus"] == 1:
            continue
        seen, sent, formula = exposed(run), most_sent(run), run["predicted"]["sent_gb"]
        linked = [rank["profile"].get("nvlink_gb") for rank in run["ranks"]]
        numbers = [f"{seen[name]:,.0f}" for name in ("communication", "exposed", "idle")] if seen else [""] * 3
        rows.append([
            SHAPES[run["shape"]], f"{run['length']:,}", name_of(run), NAMES[run["model"]], *numbers,
            f"{seen['hidden'] * 100:.0f} %" if seen else "",
            *(f"{sent.get(name, 0):.2f} / {formula[name]:.2f}" for name in ("context", "tensor", "data")),
            f"{max(linked):.2f}" if linked and None not in linked else "",
        ])  # fmt: skip
    return table(
        ["model", "text tokens", "layout", "attention", "NCCL ms", "exposed ms", "idle ms", "hidden",
         "context GB / formula", "tensor", "data", "NVLink GB"], rows,
    )  # fmt: skip


def by_arithmetic(runs: list[dict]) -> list[str]:
    """What full attention would take at lengths at which KSA alone was run: a line each."""
    lines = []
    for run in runs:
        same = [other for other in runs if other["model"] == "full" and other["shape"] == run["shape"]
                and other["gpus"] == run["gpus"]]  # fmt: skip
        if run["model"] != "ksa" or not same or any(other["length"] == run["length"] for other in same):
            continue
        full = max(same, key=lambda other: (other["length"], other["layout"] == run["layout"]))
        times, parts = run["length"] / full["length"], full["parts_ms"]
        attention = sum(parts[part] for part in ATTENTION)
        seconds = (attention * times**2 + (full["iteration_ms"] - attention) * times) / 1e3
        own = run["iteration_ms"] / 1e3
        lines.append(
            f"Full attention at {run['length']:,} tokens, by arithmetic from {full['length']:,} tokens "
            f"({name_of(full)}): {seconds:,.0f} s a step, {seconds / own:.1f} times KSA's {own:.1f} s."
        )
    return lines


def tables(runs: list[dict]) -> str:
    """Markdown of the tables and a line that says where and how; runs that failed are told below."""
    done = [run for run in runs if run.get("complete")]
    if not done:
        return "Not measured yet."
    done.sort(key=lambda run: (run["shape"], run["length"], run["gpus"], run["layout"], run["model"] != "ksa"))
    machine = done[0]["machine"]
    fitted = " where nothing is said of it" * any(parse_layout(run["layout"]).fit for run in done)
    where = (
        f"{max(run['gpus'] for run in done)} {machine.get('gpu') or machine.get('device')} of one host, torch "
        f"{machine['torch']}, triton {machine['triton']}, commit {machine['commit'][:9]}, bf16, one sequence a step, "
        f"full recompute{fitted}, distributed optimizer with overlap; medians of the iterations after the warm-up, "
        "communication of one more, on the rank with most of it exposed:"
    )
    failed = [f"Not measured: {SHAPES[run['shape']]}, {run['length']:,} tokens, {name_of(run)}, {NAMES[run['model']]}: "
              f"{run['error']}" for run in runs if "error" in run]  # fmt: skip
    return "\n\n".join([where, speeds(done), communication(done), *by_arithmetic(done), *failed])


def write_report(results: Path, path: Path) -> None:
    """Put the tables of a file of results into the section of a Markdown file."""
    replace_section(path, SECTION, tables(json.loads(results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    report_command(__doc__, "run.py --layouts", write_report)

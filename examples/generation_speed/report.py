"""Tables of results.json: `report.py results.json docs/generation.md`."""

import json
from pathlib import Path

from megatron_ksa.markdown import replace_section, report_command, table

GIB = 2**30


def tables(runs: list[dict]) -> str:
    """Markdown: tokens a second of both models and their ratio, then prompts."""
    found = {(run["model"], run["kind"], run["length"], run["batch"], run["cuda_graph"]): run for run in runs}
    steps = []
    for kind, length, batch, graph in dict.fromkeys(key[1:] for key in found):
        pair = [found.get((model, kind, length, batch, graph), {}) for model in ("hybrid", "full")]
        if kind != "step" or not all("ms" in each for each in pair):
            continue
        rates = [each["tokens_per_second"] for each in pair]
        sequences = "/".join(dict.fromkeys(str(each["sequences"]) for each in pair))
        ratio = f"{rates[0] / rates[1]:.2f}"
        steps.append([f"{length:,}", sequences, "yes" if graph else "no", *(f"{rate:,.1f}" for rate in rates), ratio])
    prompts = []
    for run in runs:
        if run["kind"] == "prompt" and "seconds" in run:
            peak = "" if run["peak_over_bytes"] is None else f"{run['peak_over_bytes'] / GIB:.2f}"
            state = f"{run['state_bytes'] / 1e9:.2f}"
            prompts.append([run["model"], f"{run['length']:,}", f"{run['seconds']:.2f}", peak, state])
    return "\n\n".join(
        [
            table(["tokens", "batch", "CUDA graph", "hybrid, tokens/s", "full, tokens/s", "ratio"], steps),
            table(["model", "prompt tokens", "seconds", "peak over weights and state, GiB", "state, GB"], prompts),
        ]
    )


def write_report(results: Path, path: Path) -> None:
    """Write the tables and their machine into the section `generation_speed` of a Markdown file."""
    record = json.loads(results.read_text(encoding="utf-8"))
    machine = record["header"]
    head = (
        f"One {machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}; "
        "where two batches are given, they are what fits beside the weights, hybrid / full:"
    )
    replace_section(path, "generation_speed", f"{head}\n\n{tables(record['runs'])}")


if __name__ == "__main__":
    report_command(__doc__, "run.py", write_report)

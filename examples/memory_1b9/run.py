"""Peak memory of the 1.9B model on a GPU with each recompute, against what the memory model predicts.

    python examples/memory_1b9/run.py --out examples/memory_1b9/results_h100.json --report docs/results.md
    python examples/memory_1b9/run.py --ranks 2 --out two.json

One process (one a rank) trains 2 iterations of every case that the model says fits the GPU: each of --lengths with
nothing recomputed; norms, heads and activations; the MLP; half of the layers; all but the last; all; and what
`--recompute-to-fit` chooses.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
import report
import torch
from model_1b9 import LAYERS, TINY_LAYERS, training_flags

from megatron_ksa.config.recompute import CHEAP, FULL, MODULES, NONE, Recompute
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_file
from megatron_ksa.markdown import check_section
from megatron_ksa.platform.ranks import run_ranks

HERE = Path(__file__).parent
LENGTHS = (8192, 32768, 131072)
ITERATIONS = 2


def recomputes(layers: int) -> list[Recompute | None]:
    """What is tried with every length; None is what fits."""
    blocks = [Recompute(layers // 2), Recompute(layers - 1)]
    return [NONE, Recompute(cheap=CHEAP), Recompute(modules=("mlp",)), *blocks, FULL, None]


def cases(options: argparse.Namespace) -> list[list]:
    """[text tokens, fields of a `Recompute` or None for what fits, iterations] of every case."""
    layers = TINY_LAYERS if options.tiny else LAYERS
    if not options.cases:
        chosen = [(length, how) for length in sorted(options.lengths) for how in recomputes(layers)]
        # What fits fills the GPU: where it does not, the rest is measured.
        chosen.sort(key=lambda case: case[1] is None)
    else:
        chosen = [_case(words, options.lengths) for words in options.cases]
    fields = [(length, None if how is None else dataclasses.asdict(how)) for length, how in chosen]
    return [[length, how, options.iterations] for length, how in fields]


def _case(words: str, lengths: list[int]) -> tuple[int, Recompute | None]:
    """`LENGTH:none`, `LENGTH:full`, `LENGTH:fit`, or parts such as `LENGTH:3+norms+heads` (whole layers, modules)."""
    length, _, how = words.partition(":")
    named, parts = {"none": NONE, "full": FULL, "fit": None}, how.split("+")
    known = how in named or all(part.isdigit() or part in (*MODULES, *CHEAP) for part in parts)
    if not length.isdigit() or not known or int(length) > max(lengths):
        raise UsageError(f"--cases {words}: text tokens, at most {max(lengths)}, and a recompute, such as 8192:3+norms")
    if how in named:
        return int(length), named[how]
    whole = sum(int(part) for part in parts if part.isdigit())
    kinds = (tuple(part for part in parts if part in kind) for kind in (MODULES, CHEAP))
    return int(length), Recompute(whole, 1, *kinds)


def measure(options: argparse.Namespace) -> dict:
    """Train the cases and return what `peaks_pretrain.py` has written."""
    record, listed = options.out.with_suffix(".part"), options.out.with_suffix(".cases")
    record.unlink(missing_ok=True)
    listed.write_text(json.dumps(cases(options)))
    more = ["--context-parallel-size", str(options.ranks)]
    flags = [*training_flags(options.model, max(options.lengths), 1, more, tiny=options.tiny), *options.extra]
    failure = _train([str(HERE / "peaks_pretrain.py"), str(record), str(listed), *flags], options)
    listed.unlink()
    if not record.exists():
        raise UsageError(f"nothing was measured ({failure}): the program's own lines above say why")
    result = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    if options.commit:
        result["machine"]["commit"] = options.commit
    return {"model": options.model, **result, **({"error": failure} if failure else {})}


def _train(script: list[str], options: argparse.Namespace) -> str | None:
    """Run the script in as many processes as there are ranks; why it did not end well."""
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    late = f"not done after {options.limit:.0f} s"
    if options.ranks > 1:
        # A launcher that is killed leaves its ranks on the GPUs: this one is told to end.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        began = time.monotonic()
        done = run_ranks(script, options.ranks, seconds=options.limit, environment=environment)
        print(done.stdout, done.stderr, sep="\n", flush=True)
        if done.returncode and time.monotonic() - began >= options.limit:
            return late
    else:
        try:
            command = [sys.executable, *script]
            done = subprocess.run(command, timeout=options.limit, check=False, env={**os.environ, **environment})
        except subprocess.TimeoutExpired:
            return late
    return f"exit code {done.returncode}" if done.returncode else None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="results, read and added to")
    parser.add_argument("--report", type=Path, help="Markdown file whose memory_1b9 section gets the table")
    parser.add_argument("--model", choices=("ksa", "full"), default="ksa", help="which attention")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="text tokens of a sequence")
    parser.add_argument(
        "--cases", nargs="+", help="instead of every recompute with every length: LENGTH:none, :full, :fit, or such as "
        ":3+norms+heads+activation (the first 3 layers, and modules of the others)"
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, which context parallelism divides the text among")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of a case; those after the first are timed")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which the run is given up")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    parser.add_argument("--tiny", action="store_true", help="a model of the same kind that trains on a CPU in seconds")
    parser.add_argument("extra", nargs="*", default=[], help="flags for pretrain_gpt.py, after --")
    options = parser.parse_args()
    if options.report:
        check_section(options.report, report.SECTION)
    if not options.tiny and not torch.cuda.is_available():
        raise UsageError("no GPU is here: add --tiny for a small model on the CPU")
    return options


def main() -> None:
    """Measure, keep the results of other runs, and report."""
    with usage_errors_exit():
        options = parse_arguments()
        runs = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
        result = measure(options)
        kind = ("model", "ranks", "layers")
        runs = [run for run in runs if any(run[key] != result[key] for key in kind)] + [result]
        with whole_file(options.out) as stream:
            stream.write(json.dumps(runs, indent=1) + "\n")
        print(report.tables(runs))
        if options.report:
            report.write_report(options.out, options.report)
    sys.exit("error" in result)


if __name__ == "__main__":
    main()

"""The trainer with KSA and HARPE on GPUs: does every kind of layer, precision and CUDA graph train to its numbers?

    python tests/training/gpu_check.py --out gpu.json [--only reference te te_fp8_delayed]

Each kind trains a tiny model and is compared with another kind, step by step: plain PyTorch with the kernels, CUDA
graphs with the run without, Transformer Engine's layers with local ones, FP8 with its bf16, a run that was interrupted
with one that was not. Kinds of two ranks need two GPUs, Transformer Engine's need the package; where something is
missing, the kind is named as skipped. A second call with the same --out goes on with the kinds that do not agree there.
Exit code 0 where all that ran agree, 1 where one does not.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from gpu_kinds import COMMON, GRAPH, KINDS, LAYER_GRAPHS, STEPS, Kind
from trainer import launch, steps

from megatron_ksa.files import whole_file
from megatron_ksa.platform.defaults import importable
from megatron_ksa.results import machine

PACKAGES = ("megatron-core", "transformer-engine")
# Kinds in one set of processes.
TOGETHER = 5
# Of a run that is interrupted: after so many steps.
HALF = STEPS // 2


def missing(kind: Kind) -> str | None:
    """What the machine lacks for a kind."""
    if kind.uses_te and not importable("transformer_engine.pytorch"):
        return "Transformer Engine is not installed"
    gpus = torch.cuda.device_count()
    return f"{kind.ranks} GPUs are needed, {gpus} is here" if gpus < kind.ranks else None


def with_compared(names: list[str]) -> list[str]:
    """The kinds asked for and those that they are compared with."""
    wanted = list(names)
    for name in wanted:
        like = KINDS[name].like
        if like is not None and like not in wanted:
            wanted.append(like)
    return [name for name in KINDS if name in wanted]


def is_done(name: str, result: dict) -> bool:
    """Whether a kind need not run again for itself; those that others are compared with run with these."""
    return result.get("agrees", KINDS[name].like is None and "losses" in result)


def groups(names: list[str]) -> list[list[str]]:
    """Kinds that train one after the other in the same processes; a graph a layer has processes of its own.

    Graphs of iterations need a state of random numbers that the first run of a process sets up.
    """
    found: dict[tuple, list[str]] = {}
    for name in names:
        kind = KINDS[name]
        alone = name if LAYER_GRAPHS in kind.flags else None
        graphs = kind.uses_te if GRAPH in kind.flags else None
        found.setdefault((kind.ranks, alone, graphs), []).append(name)
    return [same[i : i + TOGETHER] for same in found.values() for i in range(0, len(same), TOGETHER)]


def runs_of(folder: Path, name: str) -> list[tuple[Path, str]]:
    """The runs of a kind: one, or two where it is interrupted or begins with another run's weights."""
    kind, record = KINDS[name], folder / f"{name}.json"
    if kind.start is not None:
        saved = f"{folder}/{name}"
        begin = f"{COMMON} {kind.precision} {kind.start} --save {saved} --save-interval 1"
        own = f"{COMMON} {kind.precision} {kind.flags} --load {saved} --finetune"
        return [(folder / f"{name}.start.json", begin), (record, own)]
    if kind.first is None:
        return [(record, f"{COMMON} {kind.precision} {kind.flags}")]
    saved = f"{folder}/{name}"
    begin = f"{COMMON} {kind.precision} {kind.first} --save {saved} --save-interval {HALF}"
    return [
        (folder / f"{name}.first.json", begin),
        (record, f"{COMMON} {kind.precision} {kind.flags} --load {saved} --ckpt-step {HALF}"),
    ]


def train(folder: Path, names: list[str], limit: float, end: float) -> dict[str, dict | str]:
    """Losses and gradient norms of each kind's steps, or what went wrong; kinds of one group.

    A kind that fails takes the processes with it; those after it get new ones, and so does one that was not the first.

    Args:
        limit: seconds of a run.
        end: of all runs, by `time.monotonic`.
    """
    folder.mkdir()
    done: dict[str, dict | str] = {}
    while names and time.monotonic() < end:
        runs = [run for name in names for run in runs_of(folder, name)]
        ended = launch(runs, KINDS[names[0]].ranks, limit=limit, seconds=end - time.monotonic())
        for name in names:
            trained = {}
            for path, last in ((folder / f"{name}.first.json", HALF), (folder / f"{name}.json", STEPS)):
                taken = steps(path) if path.exists() else {}
                trained |= {step: values for step, values in taken.items() if step <= last}
            if len(trained) < STEPS and name != names[0]:
                break
            if len(trained) < STEPS:
                print(f"{name}:\n{ended.stderr[-3000:]}", file=sys.stderr)
                errors = [line for line in ended.stderr.splitlines() if line.startswith("error:") or "Error" in line]
                hung = [path for path in folder.glob("stacks*.txt") if path.stat().st_size]
                for path in hung:
                    print(f"{path.stem}:\n{path.read_text()}", file=sys.stderr)
                errors = errors or ([f"no end within {limit:.0f} s"] if hung else ["no result"])
                done[name] = errors[-1][:400]
                break
            done[name] = trained
        names = [name for name in names if name not in done]
    return done


def compare(name: str, trained: dict[str, dict | str]) -> dict:
    """Deviations of a kind from what it is compared with, or why there are none."""
    kind, own = KINDS[name], trained[name]
    if isinstance(own, str):
        return {"failed": own, "agrees": False}
    result: dict = {"losses": [step["loss"] for step in own.values()]}
    result["grad_norms"] = [step["grad_norm"] for step in own.values()]
    if kind.like is None:
        return result
    other = trained[kind.like]
    if isinstance(other, str):
        return {**result, "failed": f"{kind.like} failed: {other}", "agrees": False}
    deviations = {
        value: max(abs(own[i][value] - other[i][value]) / abs(other[i][value]) for i in other)
        for value in ("loss", "grad_norm")
    }
    compared = ("loss", "grad_norm") if kind.norms else ("loss",)
    agrees = all(deviations[value] <= kind.limit for value in compared)
    if kind.gradient is not None:
        norm, expected = (run[1 if kind.first is None else HALF + 1]["grad_norm"] for run in (own, other))
        deviations["first_grad_norm"] = abs(norm / expected - 1)
        agrees = agrees and deviations["first_grad_norm"] <= kind.gradient
    return {**result, "like": kind.like, "deviations": deviations, "limit": kind.limit, "agrees": agrees}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of the deviations, written as kinds are done")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
                        help=f"of {', '.join(KINDS)}; those that they are compared with run too")  # fmt: skip
    parser.add_argument("--at-once", type=int, default=4, help="groups of processes at a time (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a run (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="seconds for all of them (default: unlimited)")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: these checks need a GPU")
    end = time.monotonic() + args.seconds
    here = machine(args.commit, PACKAGES)
    earlier = json.loads(args.out.read_text(encoding="utf-8"))["results"] if args.out and args.out.exists() else {}
    asked = with_compared([name for name in args.only if not is_done(name, earlier.get(name, {}))])
    results: dict[str, dict] = {name: {"skipped": why} for name in asked if (why := missing(KINDS[name]))}
    trained: dict[str, dict | str] = {}

    def write() -> None:
        for name in trained:
            if name not in results and KINDS[name].like in (None, *trained):
                results[name] = compare(name, trained)
                print(name, {k: v for k, v in results[name].items() if k != "losses"}, flush=True)
        if args.out:
            with whole_file(args.out) as stream:
                stream.write(
                    json.dumps({"machine": here, "steps": STEPS, "results": earlier | results}, indent=1) + "\n"
                )

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        parts = groups([name for name in asked if name not in results])
        sets = [pool.submit(train, Path(folder) / str(i), part, args.limit, end) for i, part in enumerate(parts)]
        for done in as_completed(sets):
            trained |= done.result()
            write()
    for name in asked:
        if name not in results:
            results[name] = {"failed": "the time of --seconds is over", "agrees": False}
    write()
    print(json.dumps({name: result.get("agrees", result.get("skipped")) for name, result in results.items()}))
    sys.exit(not all(result.get("agrees", True) for result in results.values()))


if __name__ == "__main__":
    main()

"""Several GPUs against one: the trainer under NCCL in each layout of so many ranks, from one checkpoint.

    python tests/training/nccl_check.py --processes 4 --out nccl.json
    python tests/training/nccl_check.py --only 'CP 2, all-to-all' 'PP 2'

Float32 losses and gradient norms of every step must be those of a single process to 1e-5, bf16 ones to the rounding of
16-bit weights and activations (`nccl_layouts.py` says where its numbers come from). The layouts run one after the other
in one set of processes, each at most --limit seconds; one that hangs is named, with the stacks of its ranks, one that
fails with its error, and those after it go on in new processes. What a package that is not installed or a refusal of
the trainer keeps from running is skipped. Without GPUs the same runs go over gloo. The results are written after each
set of processes; a second call with the same --out goes on with the layouts that do not agree there, and keeps the
others. After --seconds nothing is started, and what runs is ended. Exit code 0 where all layouts agree or were skipped.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nccl_layouts import EXPERTS, FP8, LAYOUTS, LOCAL, SIZES, Layout
from trainer import launch, steps

from megatron_ksa.files import whole_file
from megatron_ksa.results import machine

STEPS = 4
# With less time left of --seconds, no set of processes is started.
SHORTEST = 25
PACKAGES = ("megatron-core", "transformer-engine")
# Sets of processes: FP8 layouts of Transformer Engine are refused or taken all together.
BATCHES = ("local", "transformer_engine", "fp8")
TIME_IS_OVER = "the time of --seconds is over"


def kind_of(layout: Layout) -> str:
    """Which of the two models it trains."""
    return "experts" if EXPERTS in layout.shared else "dense"


def deviation(trained: dict, expected: dict) -> float:
    """Largest relative difference of a loss or gradient norm."""
    pairs = [(trained[i][name], expected[i][name]) for i in trained for name in expected[i]]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def trained_all(record: Path, iterations: int) -> bool:
    """Whether a run has written as many iterations."""
    try:
        return len(steps(record)) == iterations
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def train(
    folder: Path, runs: list[tuple[Path, str]], processes: int, limit: float, seconds: float = math.inf
) -> tuple[int, str, bool]:  # fmt: skip
    """Launch the runs; how many have trained every step, what ended the next one in a line, whether it was a refusal.

    The ranks' errors, or their stacks where they do not end, go to stderr.

    Args:
        limit: seconds of a run.
        seconds: of all of them.
    """
    began = time.monotonic()
    done = launch(runs, processes, limit=limit, seconds=seconds)
    wanted = [1 if "--train-iters 1 " in flags else STEPS for _, flags in runs]
    trained = [trained_all(record, iterations) for (record, _), iterations in zip(runs, wanted, strict=True)]
    complete = trained.index(False) if False in trained else len(runs)
    if done.returncode == 0 and complete == len(runs):
        return complete, "", False
    stacks = {rank: folder / f"stacks{rank}.txt" for rank in range(processes)}
    hung = {rank: path.read_text() for rank, path in stacks.items() if path.exists() and path.stat().st_size}
    print(file=sys.stderr)
    for rank, stack in hung.items():
        print(f"rank {rank}:\n{stack}", file=sys.stderr)
    print(done.stderr[-6000:], file=sys.stderr, flush=True)
    if hung:
        return complete, f"no end within {limit:.0f} s", False
    if time.monotonic() - began >= seconds:
        return complete, TIME_IS_OVER, False
    refusals = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return complete, (refusals or [f"exit code {done.returncode}"])[0], bool(refusals)


class Check:
    """Trains the layouts of a number of processes and compares each with one process."""

    def __init__(
        self, folder: Path, processes: int, limit: float, tell: Callable[[dict], None], seconds: float = math.inf
    ) -> None:  # fmt: skip
        self.folder, self.processes, self.limit, self.tell = folder, processes, limit, tell
        self.end = time.monotonic() + seconds
        self.size, self.results = SIZES[processes], {}

    def _train(self, runs: list[tuple[Path, str]], processes: int) -> tuple[int, str, bool]:
        left = self.end - time.monotonic()
        return (0, TIME_IS_OVER, False) if left < SHORTEST else train(self.folder, runs, processes, self.limit, left)

    def _start(self, layout: Layout) -> str:
        """Flags of a run that goes on from the checkpoint of its kind of model."""
        return f"--train-iters {STEPS} --load {self.folder / kind_of(layout)} --ckpt-step 1 --finetune {self.size}"

    def single(self, layouts: dict[str, Layout]) -> dict[str, Path]:
        """Records of the single process, by the flags that it shares with a layout; those that fail are left out."""
        first = {layout.shared: layout for layout in layouts.values()}
        records, runs = {}, []
        # Models of experts last: where those fail, the others have what they are compared with.
        for kind, more in (("dense", ""), ("experts", EXPERTS)):
            same = [layout for layout in first.values() if kind_of(layout) == kind]
            if same and not (self.folder / kind).exists():
                start = f"--train-iters 1 {LOCAL} --save {self.folder}/{kind} --save-interval 1 {self.size} {more}"
                runs.append((self.folder / f"{kind}.json", start))
            for layout in same:
                records[layout.shared] = self.folder / f"single{len(self.results)}_{len(records)}.json"
                runs.append((records[layout.shared], f"{self._start(layout)} {layout.shared}"))
        print(f"single process, {len(runs)} runs: ", end="", flush=True)
        began = time.monotonic()
        complete, failed, _ = self._train(runs, 1)
        print(f"{failed or 'trained'}, {time.monotonic() - began:.0f} s", flush=True)
        finished = {path for path, _ in runs[:complete]}
        for name, layout in layouts.items():
            if records[layout.shared] not in finished:
                why = {"skipped" if layout.needs else "failed": f"single process: {failed}"}
                self.results[name] = {"flags": f"{layout.flags} {layout.shared}", "agrees": False, **why}
        return {shared: path for shared, path in records.items() if path in finished}

    def run(self, layouts: dict[str, Layout]) -> None:
        """Train and compare; results are kept by name, and told after each set of processes."""
        single = self.single(layouts)
        left = {name: layout for name, layout in layouts.items() if layout.shared in single}
        while left:
            runs = [
                (self.folder / f"layout{number}.json", f"{self._start(layout)} {layout.flags} {layout.shared}")
                for number, layout in enumerate(left.values())
            ]
            for record, _ in runs:
                record.unlink(missing_ok=True)
            began = time.monotonic()
            complete, failed, refused = self._train(runs, self.processes)
            took = time.monotonic() - began
            names = list(left)
            for name, (record, _) in zip(names[:complete], runs[:complete], strict=True):
                self._compare(name, left.pop(name), steps(record), steps(single[layouts[name].shared]))
            if left and failed == TIME_IS_OVER:
                for name, layout in left.items():
                    self.results[name] = {"flags": f"{layout.flags} {layout.shared}", "agrees": False, "failed": failed}
                left = {}
            elif left and failed:
                name = names[complete]
                layout = left.pop(name)
                kind = "skipped" if refused and layout.needs else "failed"
                self.results[name] = {"flags": f"{layout.flags} {layout.shared}", "agrees": False, kind: failed}
                print(f"   {name}: {failed}", flush=True)
            print(f"   {complete} of {len(runs)} layouts in one set of processes, {took:.0f} s", flush=True)
            self.tell(self.results)

    def _compare(self, name: str, layout: Layout, trained: dict, expected: dict) -> None:
        worst, allowed = deviation(trained, expected), layout.allowed
        first, allowed_first = deviation({1: trained[1]}, expected), layout.allowed_first
        agrees = worst <= allowed and first <= allowed_first
        self.results[name] = {
            "flags": f"{layout.flags} {layout.shared}", "largest_relative_deviation": worst, "allowed": allowed,
            "first_step_deviation": first, "allowed_first": allowed_first, "agrees": agrees,
        }  # fmt: skip
        said = f"{worst:.1e} (allowed {allowed:.0e}), first step {first:.1e} ({allowed_first:.0e})"
        print(f"   {name}: {'ok' if agrees else 'FAIL'}, {said}", flush=True)


def batches(layouts: dict[str, Layout]) -> dict[str, dict[str, Layout]]:
    """Layouts by what else they need."""
    found: dict[str, dict[str, Layout]] = {batch: {} for batch in BATCHES}
    for name, layout in layouts.items():
        found["fp8" if FP8 in layout.shared else layout.needs or "local"][name] = layout
    return found


def missing(package: str, gpus: int) -> str | None:
    """Why the layouts that need a package cannot run here."""
    if not gpus:
        return f"{package} needs a GPU"
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of the deviations")
    parser.add_argument("--processes", type=int, choices=LAYOUTS, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="layouts to check; --list names them")
    parser.add_argument("--list", action="store_true", help="print the layouts of so many processes, and end")
    parser.add_argument("--without", nargs="+", choices=BATCHES, default=[], help="kinds of layouts that are left out")
    parser.add_argument("--limit", type=float, default=50, help="seconds for a layout (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="seconds for all of them (default: unlimited)")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    args = parser.parse_args()
    layouts = LAYOUTS[args.processes]
    if args.list:
        print("\n".join(layouts))
        return
    if unknown := sorted(set(args.only or ()) - set(layouts)):
        parser.error(f"--only {unknown[0]!r}: use one of {'; '.join(layouts)}")
    earlier = json.loads(args.out.read_text(encoding="utf-8"))["layouts"] if args.out and args.out.exists() else {}
    layouts = {
        name: layouts[name] for name in layouts
        if name in (args.only or ()) or (not args.only and not earlier.get(name, {}).get("agrees"))
    }  # fmt: skip
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < args.processes:
        raise SystemExit(f"error: {gpus} of {args.processes} GPUs: use fewer --processes, or none for gloo")
    # Tensor and context parallelism want it before CUDA starts.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    device = torch.cuda.get_device_name() if gpus else "CPU, gloo"
    here = machine(args.commit, PACKAGES)
    record = {"device": device, "processes": args.processes, "steps": STEPS, "machine": here}

    def tell(results: dict) -> None:
        if args.out:
            every = {name: result for name, result in (earlier | results).items() if name in LAYOUTS[args.processes]}
            with whole_file(args.out) as stream:
                stream.write(json.dumps(record | {"layouts": every}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder), args.processes, args.limit, tell, args.seconds)
        for batch, chosen in batches(layouts).items():
            if not chosen or batch in args.without:
                continue
            why = None if batch == "local" else missing("transformer_engine", gpus)
            if why:
                print(f"   {len(chosen)} layouts skipped: {why}", flush=True)
                flags = {name: f"{each.flags} {each.shared}" for name, each in chosen.items()}
                check.results |= {name: {"flags": flags[name], "skipped": why} for name in chosen}
            else:
                check.run(chosen)
        tell(check.results)
    sys.exit(not all(result.get("agrees") or "skipped" in result for result in check.results.values()))


if __name__ == "__main__":
    main()

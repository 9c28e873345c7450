"""From a dense model to a KSA model by the authors' recipe: import, distil, anneal, extend, export (arXiv 2604.24432).

    python examples/ksa_from_dense/run.py --input QWEN3_FOLDER --data-path PREFIX --work FOLDER \
        --lengths 8192 32768 65536 131072

At every length three stages: distillation of the summary parameters, annealing of the summary projections to those of
the text, and training at that length; each starts from the weights of the one before. Every stage is exported and
evaluated.
What a folder holds is not done again: killed anywhere and started again, the chain goes on to the same weights.
Flags after `--` go to every training stage, such as `-- --tensor-model-parallel-size 2 --recompute-granularity full`.
They may be others when the chain goes on (on another number of GPUs), all other settings must be those it began with.

The schedule of the authors' 4B run is not published. Steps, batch and learning rate are by default those of their 1.9B
model's stages beyond 8k: 1,600 steps of 240 sequences, 1e-5 to 1e-7, 100 steps of warm-up and of decay.
"""

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
from checks import check_inputs, check_values
from stages import Stage, plan, progress, train_flags

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import read_json, whole_file
from megatron_ksa.platform import prepare_platform

ROOT = Path(__file__).resolve().parents[2]
# What a training stage that saved and stopped on a signal makes of the chain: it is to be started again.
STOPPED = 75


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", required=True, type=Path, help="Hugging Face folder of a dense model")
    parser.add_argument("--data-path", required=True, nargs="+", help="training data, as pretrain_gpt.py takes it")
    parser.add_argument("--work", required=True, type=Path, help="folder of checkpoints, exports and evaluations")
    lengths = [8192, 32768, 65536, 131072]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="text tokens, stage by stage")
    parser.add_argument("--validation", help="prefix of an indexed dataset for the evaluations (unset: none)")
    parser.add_argument("--layer-pattern", default="kkkf", help="layer kinds; a pattern shorter than the model repeats")
    parser.add_argument("--chunk-size", type=int, default=8, help="text tokens in a chunk (C)")
    parser.add_argument("--summary-tokens", type=int, default=1, help="summary tokens of a chunk (S)")
    parser.add_argument("--window-chunks", default="128", help="past chunks that text sees as text (W)")
    parser.add_argument(
        "--distil-at", choices=("every", "first"), default="every",
        help="lengths at which distillation and annealing are done; the others train at a = 0",
    )  # fmt: skip
    for stage, does in (("distil", "distillation"), ("anneal", "annealing"), ("extend", "training at a length")):
        group = parser.add_argument_group(does)
        for what, default, help in (("steps", 1600, "iterations; 0: no such stage"), ("batch", 240, "sequences")):
            text = f"{help}; one number, or one a length"
            group.add_argument(f"--{stage}-{what}", type=int, nargs="+", default=[default], help=text)
        group.add_argument(f"--{stage}-lr", type=float, default=1e-5, help="largest learning rate")
    parser.add_argument("--min-lr", type=float, default=1e-7, help="learning rate at the end of each stage")
    parser.add_argument("--warmup", type=int, default=100, help="iterations of warm-up, at most a quarter of the stage")
    parser.add_argument("--decay", type=int, default=100, help="iterations of decay, at most a quarter of the stage")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16", help="of training")
    parser.add_argument("--save-interval", type=int, default=100, help="iterations between checkpoints")
    parser.add_argument("--seed", type=int, default=1234, help="of data order and new parameters")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes of a training stage on this machine")
    parser.add_argument("--launcher", help="command before pretrain_gpt.py in place of python or torchrun: srun's")
    parser.add_argument("--evaluation-windows", type=int, default=32, help="windows a length of the perplexity")
    parser.add_argument("--dry-run", action="store_true", help="print every command and do nothing")
    parser.add_argument("--progress", action="store_true", help="print iterations done and to do, and do nothing")
    parser.add_argument("trainer", nargs="*", default=[], help="flags for every training stage, after --")
    return parser.parse_args()


class Chain:
    """Runs the commands of a plan that are not done yet."""

    def __init__(self, args: argparse.Namespace, stages: list[Stage]) -> None:
        self.args, self.stages = args, stages
        self.lock = None if args.dry_run else _lock(args.work)

    def run(self) -> None:
        """All of it, in order.

        Raises:
            UsageError: a command failed.
        """
        args = self.args
        dense = args.work / "dense"
        if args.dry_run or not dense.exists():
            self.call("tools/convert_checkpoint.py", "import", "--input", args.input, "--output", dense)
        for stage in self.stages:
            self.train(stage)
            if args.dry_run or not stage.exported.exists():
                self.call("tools/convert_checkpoint.py", "export", "--input", stage.folder, "--output", stage.exported,
                          "--like", args.input, "--vocab-size", stage.vocab_size)  # fmt: skip
            if args.validation and (args.dry_run or not stage.evaluation.exists()):
                self.evaluate(stage)
        if not args.dry_run:
            print(f"done: {self.stages[-1].exported}")

    def train(self, stage: Stage) -> None:
        """Train a stage up to its last iteration."""
        if self.args.dry_run or stage.done() < stage.steps:
            source = ["--load", stage.folder] if stage.done() else ["--load", stage.start, "--finetune"]
            self.call(*self._launcher(), ROOT / "pretrain_gpt.py", *train_flags(self.args, stage), *source,
                      *self.args.trainer, python=False)  # fmt: skip
        if not self.args.dry_run and stage.done() < stage.steps:
            print(f"{stage.name}: stopped after {stage.done()} of {stage.steps} iterations; start again to go on")
            sys.exit(STOPPED)

    def evaluate(self, stage: Stage) -> None:
        """Perplexity up to the stage's length."""
        lengths = [length for length in sorted(set(self.args.lengths)) if length <= stage.length]
        self.call("examples/evaluate/perplexity.py", "--checkpoint", stage.folder, "--data-path", self.args.validation,
                  "--concatenate", "--lengths", ",".join(map(str, lengths)), "--stride", min(256, lengths[0]),
                  "--windows", self.args.evaluation_windows, "--output", stage.evaluation)  # fmt: skip

    def _launcher(self) -> list[str]:
        if self.args.launcher:
            return shlex.split(self.args.launcher)
        if self.args.nproc_per_node == 1:
            return [sys.executable]
        processes = str(self.args.nproc_per_node)
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]

    def call(self, *words: object, python: bool = True) -> None:
        """Run, or print, a command of the repository."""
        command = [*([sys.executable] if python else []), *map(str, words)]
        print(f"\n$ {shlex.join(command)}", flush=True)
        if self.args.dry_run:
            return
        # Commands hold the lock too: what outlives a killed chain must end before the chain goes on.
        try:
            done = subprocess.run(command, cwd=ROOT, check=False, pass_fds=[self.lock.fileno()])
        except OSError as error:
            raise UsageError(f"{command[0]} cannot be run: {error.strerror}; see --launcher") from None
        if done.returncode:
            raise UsageError(f"{words[0]} ended with exit code {done.returncode}; the same command line goes on")


def _lock(work: Path):
    """The folder's lock, held until this process and all of its commands have ended."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        stream = (work / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"--work {work} is no folder to write in: {error.strerror}") from None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"--work {work}: another chain, or a command of a killed one, is at work there") from None
    return stream


def _check_plan(work: Path, stages: list[Stage], args: argparse.Namespace) -> None:
    """Refuse to go on with other settings than the folder was begun with."""
    ours: dict[str, dict[str, object]] = {"dense": {"input": str(args.input)}}
    for stage in stages:
        ours[stage.name] = {**stage.settings(), "flags": shlex.join(map(str, train_flags(args, stage)))}
    path = work / "plan.json"
    theirs = read_json(path) if path.exists() else ours
    if not all(isinstance(settings, dict) for settings in theirs.values()):
        raise UsageError(f"{path} does not hold the settings of a chain's stages: give another --work")
    for name, settings in theirs.items():
        for key, value in settings.items():
            found = ours.get(name, {}).get(key)
            if found != value:
                raise UsageError(
                    f"--work {work} was begun with {key} {value} for the stage {name}, now it is {found}: give the "
                    f"same flags, or another folder"
                )
    with whole_file(path) as stream:
        json.dump(theirs | ours, stream, indent=1)


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        check_values(args)
        for name in ("work", "input"):
            setattr(args, name, getattr(args, name).resolve())
        args.data_path = [_absolute(word) for word in args.data_path]
        args.validation = args.validation and _absolute(args.validation)
        if not args.input.is_dir():
            raise UsageError(f"--input {args.input} is no folder")
        prepare_platform([])
        stages = plan(args)
        if args.progress:
            print(progress(stages))
            return
        if not args.dry_run:
            check_inputs(args)
        chain = Chain(args, stages)
        if not args.dry_run:
            _check_plan(args.work, stages, args)
        chain.run()


def _absolute(word: str) -> str:
    """The path of a dataset's prefix, since commands run in the repository; weights stay."""
    return os.path.abspath(word) if Path(f"{word}.idx").exists() else word


if __name__ == "__main__":
    main()

"""From raw instruction data to a tree-aware, target-aligned blend (TAGS); files: data_tools/tags/README.md.

Without a command, or with `all`, every step runs. A rerun continues; a changed setting redoes what depends on it.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    from megatron_ksa.config.options import add_config_arguments, config_from_args
    from megatron_ksa.data_tools.tags.canonicalise import CanonicalSettings
    from megatron_ksa.data_tools.tags.duplicates import DuplicateSettings
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[data]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.data_tools.tags.engine import ENGINES, Engine
from megatron_ksa.data_tools.tags.ground import GroundSettings
from megatron_ksa.data_tools.tags.pipeline import TARGET, Pipeline, TaggerSettings, TreeStepSettings
from megatron_ksa.data_tools.tags.records import RecordSettings
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import TokenSettings, read_summary
from megatron_ksa.data_tools.tags.taggers.endpoint import EndpointSettings
from megatron_ksa.data_tools.tags.tree import TreeSettings
from megatron_ksa.data_tools.tags.write import WriteSettings
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.locks import exclusive_folder

COMMANDS = {
    "tag": "read the input and tag every record",
    "tree": "leave out near-duplicates, join tags into a tree, put the records on it",
    "sample": "choose what covers the tree best within a budget, aligned to the target",
    "write": "write the selection as datasets and a blend file that pretrain_gpt.py --data-args-path reads",
    "report": "a page, a picture and a summary of the selection",
    "all": "every step (the default)",
}
CONFIGS = {
    "tag": {"records": RecordSettings, "tagger": TaggerSettings, "endpoint": EndpointSettings},
    "tree": {
        "near-duplicates": DuplicateSettings, "canonical tags": CanonicalSettings, "tree": TreeSettings,
        "grounding": GroundSettings,
    },
    "sample": {"sampling": SampleSettings, "tokens": TokenSettings},
    "write": {"writing": WriteSettings},
    "report": {},
}  # fmt: skip


def _add_step(parser: argparse.ArgumentParser, step: str, *, alone: bool) -> None:
    """The flags of one step; those of `TokenSettings` are among the write step's as well."""
    if step == "tag":
        parser.add_argument(
            "--input", nargs="+", required=True, help="JSONL (also .gz, .zst), Parquet, or folders of text"
        )
        parser.add_argument("--glob", default="**/*.txt", help="files of a folder that are records (default: **/*.txt)")
        parser.add_argument("--target", nargs="+", default=[], help="data that the selection is aligned to, as --input")
    if step == "tree":
        parser.add_argument(
            "--tree", type=Path, help="work folder with a tree to put the records on, instead of a new one"
        )
    for title, config in CONFIGS[step].items():
        if alone or config is not TokenSettings:
            add_config_arguments(parser, config, "", title)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; the command is `all` where none is named."""
    if not arguments or (arguments[0] not in COMMANDS and arguments[0] not in ("-h", "--help")):
        arguments = ["all", *arguments]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("--work", type=Path, required=True, help="folder of everything that is written")
        command.add_argument(
            "--engine", choices=ENGINES, default="local", help="where records are handled (default: local)"
        )
        command.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
        for step in CONFIGS if name == "all" else (name,):
            _add_step(command, step, alone=name != "all")
    return parser.parse_args(arguments)


@contextmanager
def of_target() -> Iterator[None]:
    """A mistake in the target says so: its lines read like the pool's."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--target: {error}") from None


def run_tag(pipeline: Pipeline, target: Pipeline | None, args: argparse.Namespace) -> None:
    """Read and tag the pool, then the target."""
    records, tagger, endpoint = (config_from_args(config, args, "") for config in CONFIGS["tag"].values())
    pipeline.read(args.input, args.glob, records)
    pipeline.tag(tagger, endpoint)
    if target is not None:
        with of_target():
            target.read(args.target, args.glob, records)
            target.tag(tagger, endpoint, pool=pipeline.folder)


def run_tree(pipeline: Pipeline, target: Pipeline | None, args: argparse.Namespace) -> None:
    """Build the tree or take an older one; put pool and target on it."""
    settings = TreeStepSettings(*(config_from_args(config, args, "") for config in CONFIGS["tree"].values()))
    if args.tree is None:
        pipeline.tree(settings)
    else:
        pipeline.adopt_tree(settings, args.tree)
    if target is not None:
        with of_target():
            target.ground_on(settings, args.tree or pipeline.folder)


def run_sample(pipeline: Pipeline, target: Pipeline | None, args: argparse.Namespace) -> None:
    """Choose."""
    settings, tokens = (config_from_args(config, args, "") for config in CONFIGS["sample"].values())
    pipeline.sample(settings, tokens, None if target is None else target.folder)


def run_write(pipeline: Pipeline, target: Pipeline | None, args: argparse.Namespace) -> None:
    """Write the blend and tell how to train on it."""
    settings = config_from_args(WriteSettings, args, "")
    pipeline.write(settings, None if target is None else target.folder)
    flags = read_summary(pipeline.folder / "blend" / "blend.json")["training_flags"]
    print(f"train with: --data-args-path {pipeline.folder / 'blend' / 'blend.txt'} {flags}", flush=True)


def run_report(pipeline: Pipeline, target: Pipeline | None, args: argparse.Namespace) -> None:
    """Report."""
    pipeline.report(None if target is None else target.folder)
    print(f"look at {pipeline.folder / 'report' / 'index.html'}", flush=True)


STEPS = {"tag": run_tag, "tree": run_tree, "sample": run_sample, "write": run_write, "report": run_report}


def target_pipeline(pipeline: Pipeline, engine: Engine, args: argparse.Namespace) -> Pipeline | None:
    """The target's folder, where one is given now or, for a step alone, was given to `tag`."""
    folder = pipeline.folder / TARGET
    wanted = args.target if hasattr(args, "target") else (folder / "manifest.json").exists()
    return Pipeline(folder, engine, lambda line: print(f"target, {line}", flush=True)) if wanted else None


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit(), ExitStack() as stack:
        args = parse_arguments(sys.argv[1:])
        stack.enter_context(exclusive_folder(args.work, "tools/preprocess_tags.py"))
        engine = Engine(args.engine, args.workers)
        pipeline = Pipeline(args.work, engine, lambda line: print(line, flush=True))
        target = target_pipeline(pipeline, engine, args)
        if args.command == "all":
            for config in (SampleSettings, WriteSettings):
                config_from_args(config, args, "")  # a mistake must not show only after hours
        for step in STEPS if args.command == "all" else (args.command,):
            STEPS[step](pipeline, target, args)


if __name__ == "__main__":
    main()

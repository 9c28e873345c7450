"""From raw instruction data to a tree-aware, target-aligned blend (TAGS); files: data_tools/tags/README.md.

    preprocess_tags.py --work DIR --input data.jsonl --budget 5% --tokenizer-model TOKENIZER --template chatml

Without a command, or with `all`, every step runs; `all --help` has all flags, and the help of a command has its own. A
rerun continues; a changed setting redoes what depends on it.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    from megatron_ksa.config.options import OneLineParser, add_config_arguments, config_from_args
    from megatron_ksa.data_tools.tags.pipeline import (
        ADOPTING_STEPS,
        BATCH_STEPS,
        COMMANDS,
        TARGET,
        Pipeline,
        finish,
        forget_target,
    )
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here: run `pip install -e '.[data]'` in the repository", file=sys.stderr
    )
    sys.exit(2)
from megatron_ksa.data_tools.tags import apart
from megatron_ksa.data_tools.tags.engine import ENGINES, Engine
from megatron_ksa.data_tools.tags.formats import check_utf8, input_files
from megatron_ksa.data_tools.tags.groups import GroupSettings
from megatron_ksa.data_tools.tags.manifest import MANIFEST
from megatron_ksa.data_tools.tags.report import PAGE, REPORT
from megatron_ksa.data_tools.tags.sample import SampleSettings
from megatron_ksa.data_tools.tags.selection import check_of_budget, read_summary
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TaggerSettings
from megatron_ksa.data_tools.tags.write import BLEND, BLEND_FILE, BLEND_SUMMARY
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.locks import exclusive_folder

ALL = "every step (the default)"
# Flags that name files, which may be folders too.
FOLDERS = ("input", "target", "decontaminate")


def commands(name: str) -> tuple[str, ...]:
    """The commands that a command stands for."""
    return tuple(COMMANDS) if name == "all" else (name,)


def _settings_of(steps: Iterator[Step]) -> dict[type, str]:
    """Config classes of the steps, each once, with the titles of their groups of flags."""
    return {config: title for step in steps for title, config in step.settings.items()}


def _folder(text: str) -> Path:
    """A folder. An empty text, from a variable that is not set, is not the current one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty")
    return Path(text)


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The flags of one command."""
    parser.add_argument("--work", type=_folder, required=True, help="folder of everything that is written")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where records are handled (default: local)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    # None: the target is what was given to `tag`. Without --target `tag` itself has none.
    parser.set_defaults(tree=None, input=None, target=None, batch_out=None)
    if "tag" in commands(name):
        parser.add_argument(
            "--input",
            nargs="+",
            required=True,
            help="files or folders: JSONL, JSON, Parquet, Arrow, save_to_disk, text",
        )
        parser.add_argument(
            "--glob", help="files of a folder to read (default: its data files, or else its .txt files)"
        )
        parser.add_argument("--target", nargs="+", default=[], help="data that the selection is aligned to, as --input")
    if "tree" in commands(name):
        parser.add_argument(
            "--tree", type=Path, help="work folder with a tree to put the records on, instead of a new one"
        )
    for config, title in _settings_of(step for each in commands(name) for step in COMMANDS[each].steps).items():
        add_config_arguments(parser, config, "", title)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; the command is `all` where none is named."""
    names = {**{name: command.help for name, command in COMMANDS.items()}, "all": ALL}
    if not arguments or (arguments[0] not in names and arguments[0] not in ("-h", "--help")):
        if arguments and not arguments[0].startswith("-"):
            raise UsageError(f"{arguments[0][:60]}: no command; there are {', '.join(names)}")
        arguments = ["all", *arguments]
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in names.items():
        _add_arguments(subparsers.add_parser(name, help=description, description=description), name)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        elsewhere = [name for name, each in subparsers.choices.items() if flag in each.format_help() and name != "all"]
        known = f"of the {' and '.join(elsewhere)} command" if flag.startswith("--") and elsewhere else "no flag"
        raise UsageError(f"{' '.join(unknown)[:100]}: {known} (--help lists those of {args.command})")
    return args


@contextmanager
def of_target() -> Iterator[None]:
    """A mistake in the target says so: its lines read like the pool's."""
    try:
        yield
    except UsageError as error:
        said = str(error).removeprefix("--input")
        raise UsageError(f"--target{':' if said == str(error) else ''} {said.removeprefix(':').strip()}") from None


def make_pipelines(args: argparse.Namespace) -> tuple[Pipeline, Pipeline | None]:
    """The pool's pipeline, and the target's where one is given now or was given to the `tag` command before."""
    steps = [step for name in commands(args.command) for step in COMMANDS[name].steps]
    settings = {config: config_from_args(config, args, "") for config in _settings_of(steps)}
    engine, folder = Engine(args.engine, args.workers), args.work / TARGET
    given = (folder / MANIFEST).exists() if args.target is None else bool(args.target)
    inputs = tuple(input_files(args.input, args.glob)) if args.input else ()
    context = Context(args.work, engine, inputs, args.tree, folder if given else None)
    pipeline = Pipeline(context, settings, lambda line: print(line, flush=True))
    if not given:
        return pipeline, None
    with of_target():
        inputs = tuple(input_files(args.target, args.glob)) if args.target else ()
        context = Context(folder, engine, inputs, pool=args.work)
        return pipeline, Pipeline(context, settings, lambda line: print(f"target, {line}", flush=True))


def check_files(args: argparse.Namespace, pipeline: Pipeline, target: Pipeline | None) -> None:
    """Check that nothing that is read, and nothing that no run wrote, would be replaced.

    Raises:
        UsageError: something would.
    """
    decontaminate = [Path(name) for name in getattr(args, "decontaminate", None) or []]
    read = {
        "--input": pipeline.context.inputs, "--target": () if target is None else target.context.inputs,
        "--batch-in": pipeline.settings[TaggerSettings].results, "--decontaminate": decontaminate,
    }  # fmt: skip
    apart.check_files(args.work, read, args.batch_out)
    apart.check_unused(args.work)


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit(), ExitStack() as stack:
        for word in sys.argv[1:]:
            check_utf8(word, "argument")
        args = parse_arguments(sys.argv[1:])
        if args.work.exists() and not args.work.is_dir():
            raise UsageError(f"--work {args.work}: a file, where a folder is needed")
        if "tag" not in commands(args.command) and not args.work.is_dir():
            raise UsageError(f"--work {args.work}: no such folder; the tag command makes it")
        apart.check_folders(args.work, {f"--{name}": getattr(args, name, None) or [] for name in FOLDERS})
        stack.enter_context(exclusive_folder(args.work, "tools/preprocess_tags.py"))
        pipeline, target = make_pipelines(args)
        stack.callback(pipeline.context.engine.close)
        if "tag" in commands(args.command):
            check_files(args, pipeline, target)
        names = commands(args.command)
        steps = {name: COMMANDS[name].steps for name in names}
        target_steps = {name: COMMANDS[name].target_steps for name in names}
        if args.tree is not None:
            steps["tree"] = ADOPTING_STEPS
        if names == ("export",) and args.export == "none":
            raise UsageError("--export none: name a format, jsonl or parquet")
        if args.batch_out is not None:
            if args.command != "tag":
                raise UsageError("--batch-out goes with the tag command: the other steps wait for the results")
            steps["tag"] = target_steps["tag"] = BATCH_STEPS
        for name in names:
            pipeline.check(steps[name])
        if args.command == "all":
            check_of_budget(pipeline.settings[SampleSettings], pipeline.settings[GroupSettings].of_budget)
        try:
            if target is None and args.target is not None and forget_target(args.work / TARGET):
                print("target: none is given; what an earlier run made of one is removed", flush=True)
            for name in names:
                pipeline.run(steps[name])
                if target is not None:
                    with of_target():
                        target.run(target_steps[name])
        finally:
            finish([pipeline] if target is None else [pipeline, target])
        if "write" in names:
            flags = read_summary(args.work / BLEND / BLEND_SUMMARY)["training_flags"]
            print(f"train with: --data-args-path {args.work / BLEND / BLEND_FILE} {flags}", flush=True)
        if "report" in names:
            print(f"look at {args.work / REPORT / PAGE}", flush=True)


if __name__ == "__main__":
    interrupted = False
    try:
        main()
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        # Progress bars that were cut end with the exception's frames, so before this line.
        print("\ninterrupted: the same command continues", file=sys.stderr, flush=True)
        sys.exit(130)

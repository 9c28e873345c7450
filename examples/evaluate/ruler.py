"""RULER of a trained model by decoding: scores of every task by context length, their average, a table and a chart.

Thirteen tasks less what needs a download: the eight needle forms, variable tracking, common and frequent words, and
question answering over a file of yours (--questions). The model is a Megatron checkpoint or a Hugging Face folder.
Results are kept task by task: the same command goes on where it was stopped.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
from common import add_model_arguments, lengths, load_for_decoding, prepare, read_text, stops_of, write_json
from tqdm import tqdm

from megatron_ksa.data_tools.tokenizers import known_text, load_tokenizer, tokens_of
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import read_small, whole_file
from megatron_ksa.locks import exclusive

MAX_RESULT_BYTES = 1_000_000_000


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description's own lines, and defaults beside flags."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add_model_arguments(parser, ", or a Hugging Face folder")
    parser.add_argument("--tokenizer-model", help="SentencePiece .model or folder with tokenizer.json; a Hugging Face "
                        "folder's own without it")  # fmt: skip
    parser.add_argument("--haystack", required=True, type=Path, help="text file of essays that needles are hidden in, "
                        "and whose words the word lists take")  # fmt: skip
    parser.add_argument("--questions", type=Path, help="JSON list (or .jsonl) of {question, context, answers}; context "
                        "and answers are a text or a list of texts. Adds the task qa")  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", default=["all"], help="tasks, such as niah_single_1 vt cwe fwe qa, or all"
    )
    parser.add_argument("--lengths", type=lengths, default="4k,8k,16k,32k,64k,128k", help="context lengths, tokens, "
                        "what the model may write included")  # fmt: skip
    parser.add_argument("--cases", type=int, default=20, help="cases of each task and length (RULER: 500)")
    parser.add_argument("--tokens-per-batch", type=int, default=65536, help="tokens that are decoded together")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--compare", nargs="+", type=Path, default=[], help="results of other models, for the chart")
    return parser.parse_args()


def read_results(path: Path, flag: str) -> tuple[dict, list]:
    """Settings and cells of an earlier run.

    Raises:
        UsageError: a file that this program did not write.
    """
    from megatron_ksa.evaluation.ruler import Cell

    try:
        content = json.loads(read_small(path, flag, MAX_RESULT_BYTES))
        return content["settings"], [Cell(**cell) for cell in content["results"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{flag} {path} holds no results of this program: {error}") from None


def chosen_tasks(args: argparse.Namespace) -> list[str]:
    """The tasks to run, in RULER's order."""
    from megatron_ksa.evaluation.ruler import QA, TASKS

    known = [*TASKS, QA] if args.questions else list(TASKS)
    tasks = known if args.tasks == ["all"] else args.tasks
    for task in tasks:
        if task == QA and not args.questions:
            raise UsageError("--tasks qa needs --questions: a file of questions with their documents and answers")
        if task not in known:
            raise UsageError(f"--tasks {task}: one of {', '.join([*TASKS, QA])}, or all")
    return [task for task in known if task in tasks]


def largest_token(plan: list[tuple[str, int]], language, seed: int, questions) -> int:
    """The largest token of one case of each task and length.

    Raises:
        UsageError: a length that is too short for a task: the run ends before it has begun.
    """
    from megatron_ksa.evaluation.ruler import build

    cells = (build(task, language, length, 1, seed, questions)[0] for task, length in plan)
    return max(max(sample.prompt) for samples in cells for sample in samples)


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit(), contextlib.ExitStack() as stack:
        args = parse_arguments()
        for flag in ("cases", "tokens_per_batch"):
            if getattr(args, flag) < 1:
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
        if args.seed < 0:
            raise UsageError(f"--seed {args.seed}: 0 or more")
        prepare(args)
        from megatron_ksa.evaluation.questions import read_questions
        from megatron_ksa.evaluation.ruler import evaluate, plot, score_table
        from megatron_ksa.evaluation.text_language import TextLanguage

        tasks = chosen_tasks(args)
        if args.tokenizer_model is None and not (args.checkpoint / "tokenizer.json").is_file():
            raise UsageError(f"--tokenizer-model is needed: {args.checkpoint} has no tokenizer.json")
        tokenizer = load_tokenizer(args.tokenizer_model or str(args.checkpoint))
        encode = functools.partial(tokens_of, tokenizer, what="a prompt")
        language = TextLanguage(
            encode, functools.partial(known_text, tokenizer), read_text(args.haystack, "--haystack")
        )
        questions = read_questions(args.questions) if args.questions else None
        others = {str(path): read_results(path, "--compare")[1] for path in args.compare}
        plan = [(task, length) for length in args.lengths for task in tasks]
        largest = largest_token(plan, language, args.seed, questions)
        model = load_for_decoding(args, stops_of(tokenizer))
        if largest >= model.vocab_size:
            raise UsageError(
                f"--tokenizer-model: token {largest} is beyond the model's vocabulary of {model.vocab_size}"
            )
        settings = {"checkpoint": model.name, "tokenizer": args.tokenizer_model,
                    "haystack": str(args.haystack), "questions": args.questions and str(args.questions),
                    "cases": args.cases, "seed": args.seed, "dtype": args.dtype}  # fmt: skip
        stack.enter_context(exclusive(args.output, "examples/evaluate/ruler.py"))
        stored, cells = read_results(args.output, "--output") if args.output.exists() else (settings, [])
        if different := next((key for key in settings if stored.get(key) != settings[key]), ""):
            raise UsageError(
                f"--output {args.output} has results with {different} {stored.get(different)!r}, now it is "
                f"{settings.get(different)!r}: choose another file or remove it"
            )
        done = {(cell.task, cell.length) for cell in cells}
        for task, length in tqdm([cell for cell in plan if cell not in done], desc="RULER", unit="task"):
            cells.append(
                evaluate(
                    model.generate, language, task, length, cases=args.cases, tokens_per_batch=args.tokens_per_batch,
                    seed=args.seed, questions=questions,
                )
            )  # fmt: skip
            write_json(args.output, {"settings": settings, "results": [dataclasses.asdict(cell) for cell in cells]})
        shown = sorted(
            (cell for cell in cells if (cell.task, cell.length) in plan), key=lambda cell: tasks.index(cell.task)
        )
        text = score_table(shown)
        with whole_file(args.output.with_suffix(".md")) as stream:
            stream.write(text + "\n")
        plot({args.checkpoint.name: shown, **others}, args.output.with_suffix(".png"))
        print(text)
        for cell in (cell for cell in shown if cell.skipped or cell.cases < args.cases):
            print(f"{cell.task} at {cell.length}: {cell.cases} cases; {cell.skipped} questions have longer documents")
        print(", ".join(str(args.output.with_suffix(suffix)) for suffix in (".json", ".md", ".png")))


if __name__ == "__main__":
    main()

"""The decontamination step: instances that hold an evaluation's questions are listed, and left out of sampling.

The evaluations are the target, unless told otherwise, and any files. `contamination.py` tells what holding is. A target
is never changed.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.documents import BadDocument
from megatron_ksa.data_tools.tags.contamination import LEAST_WORDS, Found, Question, QuestionIndex
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_jsonl
from megatron_ksa.data_tools.tags.formats import TABLE_SUFFIXES, input_files, read_raw, source_name
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.records import RecordSettings, parse_record
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.data_tools.tags.tagged import DUPLICATES, kept_lines
from megatron_ksa.errors import UsageError

CONTAMINATED = "contaminated.jsonl"
SKIPPED = "evaluation_skipped.jsonl"
FLAG = "--decontaminate"
RECORDS_PER_TASK = 256
TARGET = "target"


@dataclass(frozen=True)
class DecontaminationSettings:
    """Instances that hold questions of an evaluation, left out before sampling and listed in contaminated.jsonl.

    Raises:
        UsageError: a share out of range.
    """

    files: tuple[str, ...] = option(
        (), "Evaluation data that must not be in the selection, in files or folders of the formats of --input.",
        flag=FLAG,
    )  # fmt: skip
    target: bool = option(True, "Take the target for evaluation data too.", flag="--decontaminate-target")
    keep: bool = option(False, "List such instances, but do not leave them out.", flag="--keep-contaminated")
    overlap: float = option(
        0.5, "Share of a question's words, in runs of 8 that an instance has too, from which it holds the question.",
        flag="--contamination-overlap",
    )  # fmt: skip
    similarity: float = option(
        0.6, "Jaccard similarity of 3-word shingles from which an instance's question is the same.",
        flag="--contamination-similarity",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("overlap", "similarity"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"--contamination-{name} {getattr(self, name)}: above 0, at most 1")


def _files(settings: DecontaminationSettings) -> list[Path]:
    return input_files(list(settings.files), flag=FLAG)


def _parsed(files: list[Path]) -> Iterator[tuple[str, str, dict | BadDocument]]:
    """File, place and record of every document; what is wrong in place of a record that cannot be read."""
    for document in read_raw(files, flag=FLAG):
        path = Path(document.origin.rpartition(":")[0] if document.is_json else document.origin)
        table = path.name.lower().endswith(TABLE_SUFFIXES)
        try:
            record, _ = parse_record(document, source_name(path), RecordSettings(), from_table=table)
            yield str(path), document.origin, record
        except BadDocument as error:
            yield str(path), document.origin, error


def read_questions(target: Path | None, files: list[Path]) -> tuple[list[Question], list[dict]]:
    """The questions of a target's work folder and of files, and what cannot be compared: origin, reason and detail.

    Raises:
        UsageError: a file without any record that can be read.
    """
    questions: list[Question] = []
    skipped: list[dict] = []
    kept = [] if target is None else ((TARGET, record["id"], record) for record in read_jsonl(target / RECORDS))
    readable = Counter({str(path): 0 for path in files})
    for source, origin, record in (*kept, *_parsed(files)):
        if isinstance(record, BadDocument):
            skipped.append({"origin": origin, "reason": "unreadable", "detail": str(record)})
            continue
        readable[source] += 1
        question = Question.of(record, source)
        if len(question.words) < LEAST_WORDS:
            detail = f"{len(question.words)} words, fewer than {LEAST_WORDS}"
            skipped.append({"origin": origin, "reason": "too_short", "detail": detail})
        else:
            questions.append(question)
    for source, count in readable.items():
        if not count:
            raise UsageError(f"{FLAG} {source}: no record that can be used; see data_tools/tags/README.md")
    return questions, skipped


class _Search:
    """Looks up batches of records; what workers take."""

    def __init__(self, index: QuestionIndex) -> None:
        self.index = index

    def __call__(self, lines: tuple[tuple[int, bytes], ...]) -> tuple[int, list[tuple[int, str, Found]]]:
        records = [json.loads(line) for _, line in lines]
        found = self.index.search(records)
        return len(lines), [(lines[each.text][0], records[each.text]["id"], each) for each in found]


def decontaminate(
    folder: Path, settings: DecontaminationSettings, target: Path | None, engine: Engine, total: int | None
) -> dict:
    """Write `contaminated.jsonl` and `evaluation_skipped.jsonl`; returns counts.

    Args:
        target: the target's work folder, or None.
        total: tagged instances, for progress.
    """
    questions, skipped = read_questions(target if settings.target else None, _files(settings))
    write_jsonl(folder / SKIPPED, skipped)
    counts = Counter(each["reason"] for each in skipped)
    if not questions:
        return {"contaminated": write_jsonl(folder / CONTAMINATED, []), "questions": 0, **counts}
    search = _Search(QuestionIndex(questions, settings.overlap, settings.similarity))
    reasons: Counter[str] = Counter()
    touched: set[int] = set()

    def rows() -> Iterator[dict]:
        tasks = batched(((each.line, each.record) for each in kept_lines(folder)), RECORDS_PER_TASK)
        with tqdm(total=total, desc="decontaminate", unit=" records") as progress:
            for count, batch in engine.map(search, tasks):
                progress.update(count)
                for line, name, found in batch:
                    question = questions[found.question]
                    reasons[found.reason] += 1
                    touched.add(found.question)
                    yield {
                        "id": name, "record": line, "left_out": not settings.keep, "reason": found.reason,
                        "overlap": round(found.overlap, 4), "text": found.words, "evaluation": question.source,
                        "question": question.id, "question_text": found.question_words,
                    }  # fmt: skip

    written = write_jsonl(folder / CONTAMINATED, rows())
    return {
        "contaminated": written, "left_out": 0 if settings.keep else written, **counts,
        "questions": len(questions), "questions_found": len(touched), "reasons": dict(reasons),
    }  # fmt: skip


def contaminated_lines(folder: Path) -> np.ndarray:
    """int64, rising: lines of `records.jsonl` that are left out because they hold a question."""
    return np.array([row["record"] for row in read_jsonl(folder / CONTAMINATED) if row["left_out"]], np.int64)


def _run(context: Context, settings: DecontaminationSettings) -> dict:
    total = context.counts.get("tag", {}).get("tagged")
    return decontaminate(context.folder, settings, context.target, context.engine, total)


def _evaluations(context: Context, settings: DecontaminationSettings) -> dict[str, Path]:
    files = {f"evaluation:{number}:{path.name}": path for number, path in enumerate(_files(settings))}
    if context.target is not None and settings.target:
        files |= context.files(context.target, "target", RECORDS)
    return files


def _decides(context: Context, settings: DecontaminationSettings) -> dict:
    return {name: value for name, value in asdict(settings).items() if name != "files"}


def _check(context: Context, settings: DecontaminationSettings) -> None:
    """Check that the files are there, before hours of work.

    Raises:
        UsageError: a file that does not exist.
    """
    _files(settings)


STEP = Step(
    "decontaminate", {"decontamination": DecontaminationSettings}, reads=(RECORDS, TAGS, DUPLICATES),
    writes=(CONTAMINATED, SKIPPED), run=_run, also_reads=_evaluations, decides=_decides, check=_check,
)  # fmt: skip

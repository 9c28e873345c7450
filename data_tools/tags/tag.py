"""The tagging step: `records.jsonl` to `tags.jsonl`, `failed.jsonl` and `dropped_tags.jsonl`."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.readers import is_one_of
from megatron_ksa.data_tools.tags.files import json_line, read_jsonl
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.records import MAX_TAGS
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.taggers import Answer, Failure, Tagger
from megatron_ksa.data_tools.tags.taggers.batch import BatchTagger, write_requests
from megatron_ksa.data_tools.tags.taggers.endpoint import EndpointTagger
from megatron_ksa.data_tools.tags.taggers.in_data import InDataTagger
from megatron_ksa.data_tools.tags.taggers.keyphrase import SEGMENTERS, KeyphraseTagger
from megatron_ksa.data_tools.tags.taggers.quality import rule_quality
from megatron_ksa.data_tools.tags.taggers.settings import EndpointSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

TAGS, FAILED, DROPPED = "tags.jsonl", "failed.jsonl", "dropped_tags.jsonl"
SCORES = ("quality", "difficulty")
TAGGERS = ("keyphrase", "llm", "data")
CACHE = "tag_cache/answers.sqlite"


@dataclass(frozen=True)
class TaggerSettings:
    """Where tags and scores come from.

    Raises:
        UsageError: settings that contradict each other.
    """

    kind: str = option(
        "keyphrase",
        "llm: an endpoint. keyphrase: phrases that TF-IDF finds, offline, the weaker choice. data: the records' own.",
        choices=TAGGERS, flag="--tagger",
    )  # fmt: skip
    count: int = option(6, "Tags of a record, at most (keyphrase).", flag="--tags-per-record")
    segmenter: str = option(
        SEGMENTERS[0], "Words of Chinese and Japanese (keyphrase): runs of characters, or the library named.",
        choices=SEGMENTERS, flag="--segmenter",
    )  # fmt: skip
    quality: str = option(
        "rule",
        "Quality of a record that has no score: rule: 1 to 10 by length, repetition, refusal and missing answer "
        "(data_tools/tags/README.md). none: no score.",
        choices=("rule", "none"), flag="--quality-score",
    )  # fmt: skip
    retry_failed: bool = option(False, "Ask again about records that failed in the last run.", flag="--retry-failed")
    batch_out: str | None = option(
        None, "Write requests for a batch service to this file and stop (tag --tagger llm).", flag="--batch-out"
    )
    batch_in: str | None = option(
        None, "Take answers from a batch's results instead of asking; several files with commas.", flag="--batch-in"
    )

    def __post_init__(self) -> None:
        if self.batch_out is not None and self.batch_in is not None:
            raise UsageError("--batch-out and --batch-in do not go together: take the results, then write what is left")
        if self.kind != "llm" and (self.batch_out is not None or self.batch_in is not None):
            raise UsageError(f"--batch-out and --batch-in go with --tagger llm, not {self.kind}")
        if self.batch_out is not None and is_one_of(Path(self.batch_out), (".gz", ".zst")):
            raise UsageError(f"--batch-out {self.batch_out}: the file is not compressed; name it .jsonl")
        if not 1 <= self.count <= MAX_TAGS:
            raise UsageError(f"--tags-per-record {self.count}: from 1 to {MAX_TAGS}")

    @property
    def results(self) -> list[Path]:
        """Files of a batch's results."""
        return [Path(name.strip()) for name in (self.batch_in or "").split(",") if name.strip()]


class _NoneTagged(Exception):
    """No record could be tagged, so that `tags.jsonl` must not appear."""


class _Outcome:
    """Counts of what came of the records, and the rows about those that failed."""

    def __init__(self, failed: IO, dropped_tags: IO) -> None:
        self.failed, self.dropped_tags = failed, dropped_tags
        self.reasons: Counter[str] = Counter()
        self.details: dict[str, str] = {}
        self.tagged = self.dropped = self.ruled = 0

    def note_dropped(self, name: str, answer: Answer | Failure) -> None:
        """Tags that were left out of an answer."""
        for text, reason in answer.dropped:
            self.dropped += 1
            self.dropped_tags.write(json_line({"id": name, "tag": text, "reason": reason}))

    def note_failure(self, name: str, failure: Failure) -> None:
        """A record without an answer."""
        self.reasons[failure.reason] += 1
        self.details.setdefault(failure.reason, failure.detail)
        row = {"id": name, "reason": failure.reason, "detail": failure.detail, "attempts": failure.attempts}
        self.failed.write(json_line(row))

    def counts(self) -> dict:
        """Everything counted."""
        counts = {"tagged": self.tagged, "failed": self.reasons.total(), "reasons": dict(self.reasons)}
        counts["dropped_tags"] = self.dropped
        return counts | ({"quality_by_rule": self.ruled} if self.ruled else {})

    def error(self, folder: Path) -> UsageError:
        """Why no record could be tagged, with what was said about the first one of each of the commonest reasons."""
        found = "; ".join(
            f"{count:,} {reason}" + (f": {self.details[reason]}" if self.details[reason] else "")
            for reason, count in self.reasons.most_common(3)
        )
        return UsageError(f"--tagger: no record could be tagged ({found}); {folder / FAILED} lists them")


def tag(folder: Path, tagger: Tagger, total: int, quality: Callable[[dict], float] | None = None) -> dict:
    """Tag every record: each is in `tags.jsonl` or in `failed.jsonl`. Returns counts and what the tagger spent.

    A score that the tagger does not give is the record's own.

    Args:
        total: records.
        quality: quality of a record that has no score from the tagger and none of its own, or None for no score.

    Raises:
        UsageError: no record could be tagged, or the tagger cannot work at all. In the first case `failed.jsonl` is
            there with the reasons, and no `tags.jsonl`.
    """
    with whole_file(folder / FAILED) as failed, whole_file(folder / DROPPED) as dropped_tags:
        outcome = _Outcome(failed, dropped_tags)
        with suppress(_NoneTagged), whole_file(folder / TAGS) as tags:
            pairs = zip(read_jsonl(folder / RECORDS), tagger.answers(folder / RECORDS, total), strict=True)
            for record, answer in tqdm(pairs, total=total, desc="tag", unit=" records"):
                outcome.note_dropped(record["id"], answer)
                if isinstance(answer, Failure):
                    outcome.note_failure(record["id"], answer)
                    continue
                outcome.tagged += 1
                scores = {key: record[key] if getattr(answer, key) is None else getattr(answer, key) for key in SCORES}
                if scores["quality"] is None and quality is not None:
                    outcome.ruled += 1
                    scores["quality"] = quality(record)
                tags.write(json_line({"id": record["id"], "tags": answer.tags, **scores}))
            if not outcome.tagged:
                raise _NoneTagged
    if not outcome.tagged:
        # Tags of an earlier run do not belong to these failures.
        (folder / TAGS).unlink(missing_ok=True)
        raise outcome.error(folder)
    return outcome.counts() | tagger.totals()


def _tagger(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> Tagger:
    if settings.kind == "llm" and settings.batch_in is not None:
        return BatchTagger(endpoint, context.folder / CACHE, settings.results)
    if settings.kind == "llm":
        return EndpointTagger(endpoint, context.folder / CACHE)
    if settings.kind == "data":
        return InDataTagger()
    # A target takes the phrases of its pool.
    pool = None if context.pool is None else context.pool / RECORDS
    return KeyphraseTagger(settings.count, context.engine, pool=pool, segmenter=settings.segmenter)


def _run(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> dict:
    quality = rule_quality if settings.quality == "rule" else None
    tagger = _tagger(context, settings, endpoint)
    return tag(context.folder, tagger, context.counted("read", "records"), quality)


def _inputs(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> dict[str, Path]:
    results = {f"batch:{number}:{path.name}": path for number, path in enumerate(settings.results)}
    if context.pool is None or settings.kind != "keyphrase":
        return results
    return results | context.files(context.pool, "pool", RECORDS)


def _decides(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> dict:
    return _tagger(context, settings, endpoint).settings() | {"quality_score": settings.quality}


def _check(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> None:
    if settings.kind == "llm" and settings.batch_in is None and settings.batch_out is None and not endpoint.urls:
        raise UsageError("--tagger llm: name the endpoint with --llm-url, or write a batch with --batch-out")
    for path in settings.results:
        if not path.is_file():
            raise UsageError(f"--batch-in {path}: no such file")
    _decides(context, settings, endpoint)


def _again(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> bool:
    return settings.retry_failed and bool(context.counts.get("tag", {}).get("failed"))


STEP = Step(
    "tag", {"tagger": TaggerSettings, "endpoint": EndpointSettings}, reads=(RECORDS,), writes=(TAGS, FAILED, DROPPED),
    run=_run, also_reads=_inputs, decides=_decides, check=_check, again=_again,
)  # fmt: skip


def requests_file(context: Context, settings: TaggerSettings) -> Path:
    """The file of `--batch-out`; a target's has `-target` in its name."""
    path = Path(settings.batch_out or "")
    return path if context.pool is None else path.with_name(f"{path.stem}-target{path.suffix}")


def _run_batch(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> dict:
    return write_requests(context.folder / RECORDS, requests_file(context, settings), endpoint, context.folder / CACHE)


# What `tag --batch-out` does in place of STEP.
BATCH_STEP = Step(
    "batch", {"tagger": TaggerSettings, "endpoint": EndpointSettings}, reads=(RECORDS,), writes=(), run=_run_batch,
    again=lambda context, *settings: True,
)  # fmt: skip

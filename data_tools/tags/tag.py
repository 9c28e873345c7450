"""The tagging step: `records.jsonl` to `tags.jsonl`, `failed.jsonl` and `dropped_tags.jsonl`."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.files import json_line, read_jsonl
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.taggers import Answer, Tagger
from megatron_ksa.data_tools.tags.taggers.endpoint import EndpointSettings, EndpointTagger
from megatron_ksa.data_tools.tags.taggers.in_data import InDataTagger
from megatron_ksa.data_tools.tags.taggers.keyphrase import KeyphraseTagger
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

TAGS, FAILED, DROPPED = "tags.jsonl", "failed.jsonl", "dropped_tags.jsonl"
TAGGERS = ("keyphrase", "llm", "data")
CACHE = "tag_cache/answers.sqlite"


@dataclass(frozen=True)
class TaggerSettings:
    """Where tags come from."""

    kind: str = option(
        "keyphrase",
        "llm: an endpoint. keyphrase: phrases that TF-IDF finds, offline, the weaker choice. data: the records' own.",
        choices=TAGGERS, flag="--tagger",
    )  # fmt: skip
    count: int = option(6, "Tags of a record, at most (keyphrase).", flag="--tags-per-record")
    retry_failed: bool = option(False, "Ask again about records that failed in the last run.", flag="--retry-failed")


def tag(folder: Path, tagger: Tagger, total: int) -> dict:
    """Tag every record: each is in `tags.jsonl` or in `failed.jsonl`. Returns counts and what the tagger spent.

    A score that the tagger does not give is the record's own.

    Args:
        total: records.

    Raises:
        UsageError: no record could be tagged, or the tagger cannot work at all.
    """
    reasons: Counter[str] = Counter()
    tagged = dropped = 0
    with (
        whole_file(folder / TAGS) as tags,
        whole_file(folder / FAILED) as failed,
        whole_file(folder / DROPPED) as dropped_tags,
    ):
        pairs = zip(read_jsonl(folder / RECORDS), tagger.answers(folder / RECORDS, total), strict=True)
        for record, answer in tqdm(pairs, total=total, desc="tag", unit=" records"):
            name = record["id"]
            for text, reason in answer.dropped:
                dropped += 1
                dropped_tags.write(json_line({"id": name, "tag": text, "reason": reason}))
            if isinstance(answer, Answer):
                tagged += 1
                scores = {
                    key: record[key] if getattr(answer, key) is None else getattr(answer, key)
                    for key in ("quality", "difficulty")
                }
                tags.write(json_line({"id": name, "tags": answer.tags, **scores}))
            else:
                reasons[answer.reason] += 1
                row = {"id": name, "reason": answer.reason, "detail": answer.detail, "attempts": answer.attempts}
                failed.write(json_line(row))
        if not tagged:
            found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
            raise UsageError(f"--tagger: no record could be tagged ({found})")
    counts = {"tagged": tagged, "failed": sum(reasons.values()), "reasons": dict(reasons), "dropped_tags": dropped}
    return counts | tagger.totals()


def _tagger(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> Tagger:
    if settings.kind == "llm":
        return EndpointTagger(endpoint, context.folder / CACHE)
    if settings.kind == "data":
        return InDataTagger()
    # A target takes the phrases of its pool.
    pool = None if context.pool is None else context.pool / RECORDS
    return KeyphraseTagger(settings.count, context.engine, pool=pool)


def _run(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> dict:
    return tag(context.folder, _tagger(context, settings, endpoint), context.counted("read", "records"))


def _pool(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> dict[str, Path]:
    if context.pool is None or settings.kind != "keyphrase":
        return {}
    return context.files(context.pool, "pool", RECORDS)


def _decides(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> dict:
    return _tagger(context, settings, endpoint).settings()


def _again(context: Context, settings: TaggerSettings, endpoint: EndpointSettings) -> bool:
    return settings.retry_failed and bool(context.counts.get("tag", {}).get("failed"))


STEP = Step(
    "tag", {"tagger": TaggerSettings, "endpoint": EndpointSettings}, reads=(RECORDS,), writes=(TAGS, FAILED, DROPPED),
    run=_run, also_reads=_pool, decides=_decides, check=_decides, again=_again,
)  # fmt: skip

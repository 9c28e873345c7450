"""The tagging step: `records.jsonl` to `tags.jsonl`, `failed.jsonl` and `dropped_tags.jsonl`."""

from collections import Counter
from pathlib import Path

from tqdm import tqdm

from megatron_ksa.data_tools.tags.files import json_line, read_jsonl
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.taggers import Answer, Tagger
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

TAGS, FAILED, DROPPED = "tags.jsonl", "failed.jsonl", "dropped_tags.jsonl"


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

"""Tags that came with the data."""

from collections.abc import Iterator
from pathlib import Path

from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.records import clean_tags
from megatron_ksa.data_tools.tags.taggers import Answer, Failure


class InDataTagger:
    """Takes each record's own tags."""

    def settings(self) -> dict:
        """Nothing decides but the data."""
        return {"tagger": "data"}

    def answers(self, records: Path, total: int) -> Iterator[Answer | Failure]:
        """One answer for each line of `records`, in order."""
        for record in read_jsonl(records):
            if record["tags"] is None:
                yield Failure("no tags in the data", "the tags field is absent or no list (--tags-field)")
                continue
            kept, dropped = clean_tags(record["tags"])
            yield Answer(kept, dropped=dropped) if kept else Failure("no usable tag", dropped=dropped)

    def totals(self) -> dict:
        """Nothing is spent."""
        return {}

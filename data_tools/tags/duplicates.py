"""Near-duplicates by MinHash and locality-sensitive hashing (datasketch): of instances here, of tags' spellings too.

A candidate of the index counts only if its similarity reaches the threshold, so the index is set to miss little
rather than to propose little. The first of a group stays, and what leaves is compared with those that stay only: no
chains.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_jsonl
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.records import record_text
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.errors import UsageError

DUPLICATES = "duplicates.jsonl"
PERMUTATIONS = 128
SEED = 1
SCHEME = "affine32"
SHINGLE_WORDS = 5
RECORDS_PER_TASK = 256
# False proposals cost a comparison, false silence a duplicate.
ERROR_WEIGHTS = (0.1, 0.9)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DuplicateSettings:
    """Near-duplicate instances, left out before the tree is built.

    Raises:
        UsageError: a similarity out of range.
    """

    similarity: float = option(
        0.8, "Jaccard similarity of 5-word shingles from which an instance is a duplicate; 0 keeps all.",
        flag="--duplicate-similarity",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.similarity <= 1:
            raise UsageError(f"--duplicate-similarity {self.similarity}: from 0 to 1")


def tagged_records(folder: Path) -> Iterator[tuple[int, dict, dict]]:
    """Line (from 0) in `records.jsonl`, record and row of `tags.jsonl` of every tagged instance, in order."""
    tags = read_jsonl(folder / TAGS)
    row = next(tags, None)
    for line, record in enumerate(read_jsonl(folder / RECORDS)):
        if row is not None and row["id"] == record["id"]:
            yield line, record, row
            row = next(tags, None)
    if row is not None:
        raise UsageError(f"{folder / TAGS}: id {row['id']!r} is not in {RECORDS} in this order; run the tag step again")


def word_shingles(text: str) -> list[bytes]:
    """Runs of 5 words in lower case; of a shorter text, all its words."""
    words = _WORD.findall(text.lower()) or [text]
    runs = range(max(len(words) - SHINGLE_WORDS, 0) + 1)
    return list({" ".join(words[first : first + SHINGLE_WORDS]).encode("utf-8") for first in runs})


def letter_shingles(text: str) -> set[str]:
    """Runs of 3 characters, with a space before and after the text."""
    padded = f" {text} "
    return {padded[first : first + 3] for first in range(len(padded) - 2)}


def signatures(sets: list[list[bytes]]) -> np.ndarray:
    """MinHash signatures: uint32 [sets, 128]."""
    found = MinHash.bulk(sets, num_perm=PERMUTATIONS, seed=SEED, scheme=SCHEME)
    return np.stack([each.hashvalues for each in found])


def _signatures(texts: tuple[str, ...]) -> np.ndarray:
    return signatures([word_shingles(text) for text in texts])


class Index:
    """What stays, found again by MinHash signature.

    Args:
        similarity: Jaccard similarity that is sought, above 0.
    """

    def __init__(self, similarity: float) -> None:
        self._lsh = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS, weights=ERROR_WEIGHTS)
        self._kept: dict[int, np.ndarray] = {}

    @staticmethod
    def _minhash(signature: np.ndarray) -> MinHash:
        return MinHash(PERMUTATIONS, SEED, hashvalues=signature, permutations=_PERMUTATIONS, scheme=SCHEME)

    def candidates(self, signature: np.ndarray) -> list[tuple[int, float]]:
        """What may be similar, in order of insertion keys, with the similarity that the signatures estimate."""
        keys = sorted(self._lsh.query(self._minhash(signature)))
        return [(key, float((self._kept[key] == signature).mean())) for key in keys]

    def insert(self, key: int, signature: np.ndarray) -> None:
        """Add one that stays."""
        self._lsh.insert(key, self._minhash(signature), check_duplication=False)
        self._kept[key] = signature


_PERMUTATIONS = MinHash(PERMUTATIONS, SEED, scheme=SCHEME).permutations


def find_duplicates(folder: Path, settings: DuplicateSettings, engine: Engine, total: int) -> dict:
    """Write `duplicates.jsonl`; the similarity is MinHash's estimate (standard error at most 0.045). Returns counts.

    Args:
        total: tagged instances.
    """
    if settings.similarity == 0:
        return {"duplicates": write_jsonl(folder / DUPLICATES, [])}
    index = Index(settings.similarity)
    names: list[str] = []

    def texts() -> Iterator[str]:
        for _, record, _ in tagged_records(folder):
            names.append(record["id"])
            yield record_text(record)

    def rows() -> Iterator[dict]:
        line = 0
        with tqdm(total=total, desc="find duplicates", unit=" records") as progress:
            for batch in engine.map(_signatures, batched(texts(), RECORDS_PER_TASK)):
                for signature in batch:
                    near = max(index.candidates(signature), key=lambda pair: (pair[1], -pair[0]), default=(0, 0.0))
                    if near[1] >= settings.similarity:
                        yield {"id": names[line], "kept": names[near[0]], "similarity": round(near[1], 4)}
                    else:
                        index.insert(line, signature)
                    line += 1
                progress.update(len(batch))

    return {"duplicates": write_jsonl(folder / DUPLICATES, rows())}


def _run(context: Context, settings: DuplicateSettings) -> dict:
    return find_duplicates(context.folder, settings, context.engine, context.counted("tag", "tagged"))


STEP = Step("duplicates", {"near-duplicates": DuplicateSettings}, reads=(RECORDS, TAGS), writes=(DUPLICATES,), run=_run)

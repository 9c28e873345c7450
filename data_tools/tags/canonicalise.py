"""The canonicalising step: spellings of a concept become one tag, and every merge is listed.

Tags are folded (Unicode NFKC, case, white space, hyphens), then merged into a more frequent one by spelling (shared
letter triples), by meaning (cosine) and, where rare, into the nearest that is not. A tag merges into one that stays:
no chains.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags import minhash
from megatron_ksa.data_tools.tags.embed import LatentEmbedder, SentenceEmbedder, check_sentence_package
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_arrays, write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.near_pairs import memory_pairs, unpacked
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.data_tools.tags.tagged import DUPLICATES, kept_tags, kept_texts
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

VOCABULARY, MERGES, EMBEDDINGS, EMBEDDER = "vocabulary.jsonl", "tag_merges.jsonl", "embeddings.npy", "embedder"
CARRIED = "carried.npz"
REASONS = ("spelling", "meaning", "rare")
MODEL_MERGE_COSINE = 0.92
TAGS_PER_TASK = 4096
ROWS_AT_ONCE, AMONG_AT_ONCE = 512, 1 << 15
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class CanonicalSettings:
    """Which tags become one.

    Raises:
        UsageError: a value out of range.
    """

    embedding_model: str | None = option(
        None,
        "sentence-transformers model, name or path; TF-IDF and SVD over the pool without one.",
        flag="--embedding-model",
    )
    merge_spelling: float = option(
        0.8,
        "Jaccard similarity of letter triples from which spellings are one tag; 0 merges none.",
        flag="--merge-spelling",
    )
    merge_cosine: float | None = option(
        None, f"Cosine from which tags mean the same; {MODEL_MERGE_COSINE} with --embedding-model. Off by default "
        "without one: tags used in the same instances look alike to TF-IDF.", flag="--merge-cosine",
    )  # fmt: skip
    rare: int = option(2, "Tags of fewer instances fold into the nearest kept tag.", flag="--rare-tags")
    rare_cosine: float = option(
        0.0, "Cosine from which a rare tag folds; one that is near to no kept tag stays a tag of its own.",
        flag="--rare-cosine",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.merge_spelling <= 1:
            raise UsageError(f"--merge-spelling {self.merge_spelling}: from 0 to 1")
        if self.merge_cosine is not None and not 0 < self.merge_cosine <= 1:
            raise UsageError(f"--merge-cosine {self.merge_cosine}: above 0, at most 1")
        if not -1 <= self.rare_cosine <= 1:
            raise UsageError(f"--rare-cosine {self.rare_cosine}: from -1 to 1")
        if self.rare < 1:
            raise UsageError(f"--rare-tags {self.rare}: at least 1")


def fold(tag: str) -> str:
    """A tag without differences of case, Unicode form, white space, hyphens and underscores."""
    text = unicodedata.normalize("NFKC", tag).casefold()
    text = re.sub(r"[\s_\-‐-―]+", " ", text).strip(" .,;:!?\"'()[]")
    return unicodedata.normalize("NFKC", text) or tag


class TagTable:
    """Folded tags of instances as a sparse matrix, with the spellings of each.

    Args:
        rows: tags of each instance, in order.
    """

    def __init__(self, rows: Iterable[list[str]]) -> None:
        self.names: list[str] = []
        self.spellings: dict[str, int] = {}
        known: dict[str, int] = {}
        # Arrays of the standard library grow in place, 8 and 4 bytes an entry.
        indptr, columns = array("q", [0]), array("i")
        for tags in rows:
            held = set()
            for tag in tags:
                number = self.spellings.get(tag)
                if number is None:
                    folded = fold(tag)
                    number = self.spellings[tag] = known.setdefault(folded, len(known))
                    if len(known) > len(self.names):
                        self.names.append(folded)
                held.add(number)
            columns.extend(sorted(held))
            indptr.append(len(columns))
        entries = (np.ones(len(columns), np.int8), np.frombuffer(columns, np.int32), np.frombuffer(indptr, np.int64))
        # int8 [instances, tags], 1 where an instance carries a tag.
        self.carried = csr_array(entries, shape=(len(indptr) - 1, len(self.names)))
        self.counts = np.bincount(self.carried.indices, minlength=len(self.names))


def by_frequency(names: list[str], counts: np.ndarray) -> np.ndarray:
    """int64 [tags], the most frequent first; ties in the order of the alphabet."""
    return np.array(sorted(range(len(names)), key=lambda tag: (-counts[tag], names[tag])), np.int64)


def letter_shingles(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Runs of 3 characters of each name, with a space before and after it; as `minhash.shingles` gives them."""
    return minhash.shingles([list(f" {name} ") for name in names], 3)


def _letter_keys(names: tuple[str, ...], similarity: float) -> np.ndarray:
    return minhash.band_keys(minhash.signatures(*letter_shingles(names)), similarity)


def merge_spellings(
    names: list[str], order: np.ndarray, similarity: float, engine: Engine
) -> dict[int, tuple[int, float]]:
    """Tags that are a spelling of a more frequent one, with it and their similarity; other numbers are other tags.

    Args:
        order: int64 [tags], as `by_frequency` gives it.
    """
    merged: dict[int, tuple[int, float]] = {}
    if similarity == 0 or len(names) < 2:
        return merged
    ordered = [names[tag] for tag in order]
    with tqdm(total=len(names), desc="merge spellings", unit=" tags") as progress:
        keys = []
        for batch in engine.map(partial(_letter_keys, similarity=similarity), batched(ordered, TAGS_PER_TASK)):
            keys.append(batch)
            progress.update(batch.shape[1])
    gone, stays = unpacked(memory_pairs(np.concatenate(keys, axis=1)))
    places, inverse = np.unique(np.concatenate([gone, stays]), return_inverse=True)
    shingles = letter_shingles(tuple(ordered[place] for place in places))
    sets = [minhash.distinct(*shingles, place) for place in range(len(places))]
    digits = [_DIGITS.findall(ordered[place]) for place in places]
    best: dict[int, tuple[int, float]] = {}
    # Rising by the rarer tag, then by the more frequent one: what stays is known when it is asked for.
    for one, other in zip(inverse[: len(gone)].tolist(), inverse[len(gone) :].tolist(), strict=True):
        if other not in best and digits[one] == digits[other]:
            near = minhash.jaccard(sets[one], sets[other])
            if near >= similarity and near > best.get(one, (0, 0.0))[1]:
                best[one] = (other, near)
    return {int(order[places[one]]): (int(order[places[other]]), near) for one, (other, near) in best.items()}


def merge_meanings(vectors: np.ndarray, order: np.ndarray, cosine: float) -> dict[int, tuple[int, float]]:
    """Tags that mean what a more frequent one does: its index and the cosine. Every pair is compared.

    Args:
        vectors: unit, float32 [tags, dimensions].
        order: int64 [tags], the most frequent first.
    """
    merged: dict[int, tuple[int, float]] = {}
    ordered = vectors[order]
    stays = np.ones(len(order), bool)
    for first in tqdm(range(0, len(order), ROWS_AT_ONCE), desc="merge meanings", unit=" blocks"):
        rows = ordered[first : first + ROWS_AT_ONCE]
        near = rows @ ordered[: first + len(rows)].T
        row, column = np.nonzero(near >= cosine)
        before = column < row + first
        row, column = row[before], column[before]
        bounds = np.searchsorted(row, np.arange(len(rows) + 1))
        for tag in np.flatnonzero(np.diff(bounds)):
            others = column[bounds[tag] : bounds[tag + 1]]
            others = others[stays[others]]
            if len(others):
                best = int(others[near[tag, others].argmax()])
                stays[first + tag] = False
                merged[int(order[first + tag])] = (int(order[best]), float(near[tag, best]))
    return merged


def nearest(
    vectors: np.ndarray, among: np.ndarray, rows: np.ndarray | None = None, of: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The place in `of` with the largest cosine for each of `rows`: int64 [rows], and the cosine, float32 [rows].

    Args:
        vectors, among: unit, float32 [., dimensions].
        rows, of: int64, which of `vectors` and of `among`; all by default. They are copied a block at a time. `of` has
            one or more.
    """
    rows = np.arange(len(vectors)) if rows is None else rows
    of = np.arange(len(among)) if of is None else of
    found, cosine = np.zeros(len(rows), np.int64), np.full(len(rows), -np.inf, np.float32)
    blocks = range(0, len(rows), ROWS_AT_ONCE)
    for first in tqdm(blocks, desc="find nearest", unit=" blocks", disable=not len(rows)):
        part = slice(first, first + ROWS_AT_ONCE)
        own = vectors[rows[part]]
        for start in range(0, len(of), AMONG_AT_ONCE):
            near = own @ among[of[start : start + AMONG_AT_ONCE]].T
            best = near.argmax(axis=1)
            top = near[np.arange(len(near)), best]
            better = top > cosine[part]
            found[part] = np.where(better, start + best, found[part])
            cosine[part] = np.where(better, top, cosine[part])
    return found, cosine


class _Merger:
    """Where every tag went: `into` int64 [tags], itself for those that stay, and what the audit lists."""

    def __init__(self, table: TagTable) -> None:
        self.table, self.names = table, table.names
        self.into = np.arange(len(self.names))
        # Tags, what each went into, and how alike they are, by reason: arrays, since a pool can have millions.
        self._merged: dict[str, tuple[array, array, array]] = {}

    @property
    def kept(self) -> np.ndarray:
        return np.flatnonzero(self.into == np.arange(len(self.into)))

    def merge(self, merged: Iterable[tuple[int, tuple[int, float]]], reason: str) -> None:
        """Take tags with what each goes into, rising by tag."""
        tags, others, similarities = self._merged[reason] = array("q"), array("q"), array("d")
        for tag, (other, similarity) in merged:
            self.into[tag] = other
            tags.append(tag)
            others.append(other)
            similarities.append(round(similarity, 4))
        # What had merged into a tag that now goes moves with it.
        self.into = self.into[self.into]

    def _folded(self) -> Iterator[tuple[str, str]]:
        pairs = ((spelling, self.names[tag]) for spelling, tag in self.table.spellings.items())
        return (pair for pair in pairs if pair[0] != pair[1])

    def counts(self) -> dict[str, int]:
        """Merges by reason."""
        merged = {reason: len(self._merged[reason][0]) if reason in self._merged else 0 for reason in REASONS}
        return {"folding": sum(1 for _ in self._folded()), **merged}

    def rows(self) -> Iterator[dict]:
        """The audit."""
        for spelling, name in self._folded():
            yield {"tag": spelling, "into": name, "reason": "folding", "similarity": 1.0}
        for reason, columns in self._merged.items():
            for tag, other, similarity in zip(*columns, strict=True):
                yield {"tag": self.names[tag], "into": self.names[other], "reason": reason, "similarity": similarity}

    def carried(self, table: csr_array) -> csr_array:
        """[instances, kept tags] with 1 where an instance carries a kept tag, itself or merged."""
        column = np.searchsorted(self.kept, self.into)
        entries = (np.ones(table.nnz, np.int8), column[table.indices].astype(np.int32), table.indptr)
        result = csr_array(entries, shape=(table.shape[0], len(self.kept)), copy=True)  # what follows works in place
        result.sum_duplicates()
        result.data[:] = 1
        return result


def canonicalise(folder: Path, settings: CanonicalSettings, engine: Engine) -> dict:
    """Write vocabulary, merges, embeddings and embedder; returns counts.

    Raises:
        UsageError: no tag in the pool, or an embedding model that cannot be had.
    """
    table = TagTable(kept_tags(folder))
    if not table.names:
        raise UsageError(f"{folder}: no instance has a tag; run the tag step again with another --tagger")
    merger = _Merger(table)
    order = by_frequency(table.names, table.counts)
    merger.merge(sorted(merge_spellings(table.names, order, settings.merge_spelling, engine).items()), "spelling")

    texts = partial(kept_texts, folder)
    instances = table.carried.shape[0]
    embedder: LatentEmbedder | SentenceEmbedder
    if settings.embedding_model is None:
        embedder, cosine = LatentEmbedder.fit(texts, instances, engine), settings.merge_cosine
    else:
        embedder, cosine = SentenceEmbedder(settings.embedding_model), settings.merge_cosine or MODEL_MERGE_COSINE
    kept, carried = merger.kept, merger.carried(table.carried)
    vectors = embedder.embed([table.names[tag] for tag in kept], csr_array(carried.T), texts)
    counts = np.bincount(carried.indices, minlength=carried.shape[1])
    stays = np.ones(len(kept), bool)
    if cosine is not None:
        found = merge_meanings(vectors, by_frequency([table.names[tag] for tag in kept], counts), cosine)
        meant = sorted(found.items())
        merger.merge(((int(kept[tag]), (int(kept[other]), near)) for tag, (other, near) in meant), "meaning")
        stays[list(found)] = False
        counts = np.zeros(len(kept), np.int64)
        counts[stays] = merger.carried(table.carried).sum(axis=0)
    frequent, rare = np.flatnonzero(stays & (counts >= settings.rare)), np.flatnonzero(stays & (counts < settings.rare))
    if len(frequent):
        other, near = nearest(vectors, vectors, rare, frequent)
        goes = near >= settings.rare_cosine
        merged = zip(kept[rare][goes], kept[frequent[other]][goes], near[goes], strict=True)
        merger.merge(((int(tag), (int(into), float(cosine))) for tag, into, cosine in merged), "rare")
        stays[rare[goes]] = False
    embedder.save(folder / EMBEDDER)
    _save_rows(folder / EMBEDDINGS, vectors, np.flatnonzero(stays))
    return _write(folder, table, merger)


def _save_rows(path: Path, vectors: np.ndarray, rows: np.ndarray) -> None:
    """Write those rows as `np.save` writes an array of them, without a copy of them all."""
    with whole_file(path, "wb") as stream:
        header = np.lib.format.header_data_from_array_1_0(vectors) | {"shape": (len(rows), vectors.shape[1])}
        np.lib.format.write_array_header_1_0(stream, header)
        for first in range(0, len(rows), AMONG_AT_ONCE):
            stream.write(vectors[rows[first : first + AMONG_AT_ONCE]].tobytes())


def _write(folder: Path, table: TagTable, merger: _Merger) -> dict:
    kept, carried = merger.kept, merger.carried(table.carried)
    counts = np.bincount(carried.indices, minlength=carried.shape[1])
    rows = ({"tag": table.names[tag], "count": int(count)} for tag, count in zip(kept, counts, strict=True))
    write_jsonl(folder / VOCABULARY, rows)
    write_jsonl(folder / MERGES, merger.rows())
    write_arrays(folder / CARRIED, indptr=carried.indptr.astype(np.int64), tags=carried.indices.astype(np.int32))
    numbers = {"instances": table.carried.shape[0], "spellings": len(table.spellings), "tags": len(kept)}
    return numbers | {"merges": merger.counts()}


def read_carried(path: Path, tags: int) -> csr_array:
    """float32 [instances, tags], 1 where an instance that is no duplicate carries a canonical tag.

    Args:
        tags: tags of the vocabulary.
    """
    arrays = read_arrays(path)
    ones = np.ones(len(arrays["tags"]), np.float32)
    return csr_array((ones, arrays["tags"], arrays["indptr"]), shape=(len(arrays["indptr"]) - 1, tags))


def _run(context: Context, settings: CanonicalSettings) -> dict:
    return canonicalise(context.folder, settings, context.engine)


def _check(context: Context, settings: CanonicalSettings) -> None:
    if settings.embedding_model is not None:
        check_sentence_package("--embedding-model")


STEP = Step(
    "canonicalise", {"canonical tags": CanonicalSettings}, reads=(RECORDS, TAGS, DUPLICATES),
    writes=(VOCABULARY, MERGES, CARRIED, EMBEDDINGS, EMBEDDER), run=_run, check=_check,
)  # fmt: skip

"""Duplicate instances: exact copies by a hash of the content, near ones by MinHash and a comparison of the texts, and,
if asked for, those alike in meaning (`semantic.py`).

Of a group the best-scored stays, among equals the first. What leaves is compared with those that stay only: no chains.
A near-duplicate is alike in what was asked and in what was answered, each by itself, and has the same numbers,
operators, single letters and words of denial (`compared.py`), so that another answer is no duplicate. System turns,
tools and templates are not compared, and shingles that many instances share do not count.

Band keys and candidates lie on disk (`near_pairs.py`): memory does not hold texts or signatures.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags import minhash
from megatron_ksa.data_tools.tags.compared import Compared, Side, asked_and_answered, exact_key
from megatron_ksa.data_tools.tags.embed import check_sentence_package
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import lines_of, write_jsonl
from megatron_ksa.data_tools.tags.near_pairs import BandFiles, unpacked
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.semantic import semantic_copies
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.data_tools.tags.tagged import DUPLICATES, tagged_lines
from megatron_ksa.errors import UsageError

SCRATCH = "duplicates.scratch"
RECORDS_PER_TASK = 256
# Instances in which shingles are counted to find shared ones; a shingle of fewer than `SHARED_LEAST` of them is not.
SAMPLE, SHARED_LEAST, SAMPLE_SHINGLES = 10_000, 10, 4096
EXACT, NEAR, SEMANTIC = "exact", "near", "semantic"
EXAMPLES, EXAMPLE_CHARACTERS = 3, 70
_EMPTY = np.empty(0, np.uint64)


@dataclass(frozen=True)
class DuplicateSettings:
    """Duplicate instances, left out before the tree is built; exact copies always are, unless all are kept.

    Raises:
        UsageError: a similarity or share out of range.
    """

    similarity: float = option(
        0.8, "Jaccard similarity of 5-word shingles, of what was asked and of what was answered, from which an "
        "instance is a duplicate; 1 leaves out exact copies only, 0 keeps all.", flag="--duplicate-similarity",
    )  # fmt: skip
    shared: float = option(
        0.02, "Shingles in more than this share of the instances do not count as alike (at least 10 instances); 1 "
        "counts all.", flag="--duplicate-shared",
    )  # fmt: skip
    semantic: float = option(
        0.0, "Cosine of instances' vectors from which they are duplicates too, if their numbers, operators, single "
        "letters and words of denial are the same; 0 compares none.", flag="--duplicate-cosine",
    )  # fmt: skip
    model: str | None = option(
        None, "sentence-transformers model of these vectors; TF-IDF and SVD over the pool without one.",
        flag="--duplicate-model",
    )  # fmt: skip
    warn_share: float = option(
        0.3, "Warn when more than this share of the instances is left out.", flag="--duplicate-warn"
    )
    warn_cluster: float = option(
        0.02, "Warn when more than this share of the instances are copies of one.", flag="--duplicate-warn-one"
    )

    def __post_init__(self) -> None:
        for flag, value in (
            ("--duplicate-similarity", self.similarity), ("--duplicate-shared", self.shared),
            ("--duplicate-cosine", self.semantic),
            ("--duplicate-warn", self.warn_share), ("--duplicate-warn-one", self.warn_cluster),
        ):  # fmt: skip
            if not 0 <= value <= 1:
                raise UsageError(f"{flag} {value}: from 0 to 1")
        if self.model is not None and not self.semantic:
            raise UsageError("--duplicate-model has no effect without --duplicate-cosine above 0")


def _records(lines: tuple[bytes, ...]) -> list[dict]:
    return [json.loads(line) for line in lines]


def _sampled(lines: tuple[bytes, ...]) -> list[tuple[bytes, np.ndarray]]:
    """Exact key and distinct shingles of each record."""
    records = _records(lines)
    texts = Compared(records, _EMPTY)
    sets = [
        np.unique(texts.values[texts.bounds[2 * n] : texts.bounds[2 * n + 2]][:SAMPLE_SHINGLES])
        for n in range(len(records))
    ]
    return [(exact_key(record), found) for record, found in zip(records, sets, strict=True)]


def shared_shingles(folder: Path, share: float, engine: Engine, total: int) -> np.ndarray:
    """Shingles in more than `share` of an even sample of the instances, exact copies counted once: uint64, sorted."""
    if share >= 1:
        return _EMPTY
    step = max(1, -(-total // SAMPLE))
    lines = (each.record for number, each in enumerate(tagged_lines(folder)) if number % step == 0)
    known, found = set(), [_EMPTY]
    with tqdm(total=-(-total // step), desc="find shared text", unit=" records") as progress:
        for batch in engine.map(_sampled, batched(lines, RECORDS_PER_TASK)):
            for key, values in batch:
                if key not in known:
                    known.add(key)
                    found.append(values)
            progress.update(len(batch))
    values, counts = np.unique(np.concatenate(found), return_counts=True)
    return values[(counts > share * len(known)) & (counts >= SHARED_LEAST)]


@dataclass(frozen=True)
class _Signed:
    """What is known of a batch: uint64 [records, 2], float32 [records], uint64 [bands, records], bool [records]."""

    exact: np.ndarray
    quality: np.ndarray
    keys: np.ndarray
    compared: np.ndarray


def _sign(lines: tuple[tuple[bytes, bytes], ...], similarity: float, shared: np.ndarray) -> _Signed:
    records = _records(tuple(record for record, _ in lines))
    exact = np.frombuffer(b"".join(map(exact_key, records)), np.uint64).reshape(-1, 2)
    scores = [json.loads(tags)["quality"] for _, tags in lines]
    quality = np.array([-np.inf if score is None else score for score in scores], np.float32)
    if similarity == 1:
        return _Signed(exact, quality, np.empty((0, len(lines)), np.uint64), np.zeros(len(lines), bool))
    return _Signed(exact, quality, *Compared(records, shared).keys(similarity))


class _Pool:
    """The instances by number: where each lies, and their order of preference.

    Args:
        folder: the work folder.
        scratch: of this step.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch

    def sign(self, settings: DuplicateSettings, engine: Engine, total: int) -> None:
        """Read every instance once, and write what is compared to the scratch folder."""
        self.shared = (
            shared_shingles(self.folder, settings.shared, engine, total) if settings.similarity < 1 else _EMPTY
        )
        bands = minhash.bands_for(settings.similarity)[0] if settings.similarity < 1 else 0
        self.files = BandFiles(self.scratch, bands)
        streams = {name: open(self.scratch / name, "wb") for name in ("exact", "quality", "compared", "offset")}  # noqa: SIM115
        sign = partial(_sign, similarity=settings.similarity, shared=self.shared)

        def tasks() -> Iterator[tuple[tuple[bytes, bytes], ...]]:
            for batch in batched(tagged_lines(self.folder), RECORDS_PER_TASK):
                streams["offset"].write(np.array([each.offset for each in batch], np.int64).tobytes())
                yield tuple((each.record, each.tags) for each in batch)

        try:
            with tqdm(total=total, desc="compare", unit=" records") as progress:
                for signed in engine.map(sign, tasks()):
                    self.files.write(signed.keys)
                    for name in ("exact", "quality", "compared"):
                        streams[name].write(getattr(signed, name).tobytes())
                    progress.update(len(signed.quality))
        finally:
            self.files.close()
            for stream in streams.values():
                stream.close()
        self.offset = np.fromfile(self.scratch / "offset", np.int64)
        quality = np.fromfile(self.scratch / "quality", np.float32)
        # Item k is the k-th best instance: int64 [items].
        self.text_of_item = np.argsort(-quality, kind="stable")

    def exact_copies(self) -> np.ndarray:
        """int64 [items], the best item of the same content, itself for the best."""
        keys = np.fromfile(self.scratch / "exact", np.uint64).reshape(-1, 2)[self.text_of_item]
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: items of one content in order of preference
        ordered = keys[order]
        new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
        result = np.empty(len(order), np.int64)
        result[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
        return result

    def near_copies(self, stands_for: np.ndarray, similarity: float, engine: Engine) -> dict[int, tuple[int, float]]:
        """Items that are near-duplicates of one that stays: it, and the similarity.

        Args:
            stands_for: as `exact_copies` gives it.
        """
        texts = np.where(stands_for == np.arange(len(stands_for)), self.text_of_item, -1)
        compared = np.fromfile(self.scratch / "compared", bool)
        texts[~compared[self.text_of_item]] = -1
        texts.tofile(self.scratch / "texts")
        found = tqdm(
            self.files.find_pairs(self.scratch / "texts", engine), total=self.files.bands, desc="find candidates"
        )
        shards = self.files.shards(len(texts), sum(found))
        check = partial(_check, records=self.folder / RECORDS, shared=self.shared, similarity=similarity)

        def tasks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
            for first, last in shards:
                gone, stays = unpacked(self.files.shard_pairs(first, last))
                items, places = np.unique(np.concatenate([gone, stays]), return_inverse=True)
                yield places[: len(gone)], places[len(gone) :], self.offset[texts[items]], items

        copies: dict[int, tuple[int, float]] = {}
        for alike in tqdm(engine.map(check, tasks()), total=len(shards), desc="check"):
            # Rising by the item that would go, then by the one that would stay.
            for gone, stays, near in zip(*(column.tolist() for column in alike), strict=True):
                if stays not in copies and near > copies.get(gone, (0, 0.0))[1]:
                    copies[gone] = (stays, near)
        return copies

    def semantic_copies(
        self, stays: np.ndarray, settings: DuplicateSettings, engine: Engine
    ) -> dict[int, tuple[int, float]]:
        """As `near_copies`, by vectors, among the items that stay so far: int64, rising."""
        offsets = self.offset[self.text_of_item[stays]]
        found = semantic_copies(
            lambda: read_lines(self.folder / RECORDS, offsets),
            lambda item: next(read_lines(self.folder / RECORDS, offsets[[item]])),
            len(stays), settings.model, settings.semantic, self.scratch, engine,
        )  # fmt: skip
        return {int(stays[gone]): (int(stays[kept]), near) for gone, (kept, near) in found.items()}


def read_lines(path: Path, offsets: np.ndarray) -> Iterator[bytes]:
    """The lines of a file that begin at the given places, int64."""
    with open(path, "rb") as stream:
        for offset in offsets.tolist():
            stream.seek(offset)
            yield next(lines_of(stream, path), b"")


def _check(
    task: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], records: Path, shared: np.ndarray, similarity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of candidates those that are alike: items that would go and stay, int64, and their similarity, float64."""
    gone, stays, offsets, items = task
    sides: list[Side] = []
    for batch in batched(read_lines(records, offsets), RECORDS_PER_TASK):
        sides.extend(Compared(_records(batch), shared).sides())
    near = np.array([sides[a].similarity(sides[b]) for a, b in zip(gone.tolist(), stays.tolist(), strict=True)])
    alike = np.flatnonzero(near >= similarity)
    return items[gone[alike]], items[stays[alike]], near[alike]


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder that is empty at the start, whatever a killed run left there, and gone at the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def find_duplicates(folder: Path, settings: DuplicateSettings, engine: Engine, total: int) -> dict:
    """Write `duplicates.jsonl` and warn of what looks wrong; returns counts.

    Args:
        total: tagged instances.
    """
    if settings.similarity == 0 or total == 0:
        return {"duplicates": write_jsonl(folder / DUPLICATES, [])}
    with scratch_folder(folder / SCRATCH) as scratch:
        pool = _Pool(folder, scratch)
        pool.sign(settings, engine, total)
        stands_for = pool.exact_copies()
        near = pool.near_copies(stands_for, settings.similarity, engine) if settings.similarity < 1 else {}
        items = np.arange(len(stands_for))
        kind, similarity = np.where(stands_for == items, "", EXACT).astype("U8"), np.ones(len(stands_for))
        steps = [(NEAR, near)]
        if settings.semantic:
            stay = np.flatnonzero((stands_for == items) & ~np.isin(items, list(near)))
            steps.append((SEMANTIC, pool.semantic_copies(stay, settings, engine)))
        for name, copies in steps:
            for gone, (stays, value) in copies.items():
                stands_for[gone], similarity[gone], kind[gone] = stays, value, name
        # Whom a copy stands with may have gone itself, in a later step.
        for _ in range(len(steps)):
            similarity = np.minimum(similarity, similarity[stands_for])
            stands_for = stands_for[stands_for]
        left_out = np.flatnonzero(stands_for != np.arange(len(stands_for)))
        left_out = left_out[np.argsort(pool.text_of_item[left_out])]
        offsets = pool.offset[pool.text_of_item]
        _warn(folder, settings, left_out, stands_for, offsets)
        gone_ids, kept_ids = (
            (json.loads(line)["id"] for line in read_lines(folder / RECORDS, offsets[items]))
            for items in (left_out, stands_for[left_out])
        )
        write_jsonl(folder / DUPLICATES, (
            {"id": name, "kept": kept, "similarity": round(float(near), 4), "kind": str(how)}
            for name, kept, near, how in zip(gone_ids, kept_ids, similarity[left_out], kind[left_out], strict=True)
        ))  # fmt: skip
    kinds = {name: int((kind == name).sum()) for name in (EXACT, NEAR, SEMANTIC)}
    return {"duplicates": len(left_out), "kinds": kinds}


def _warn(
    folder: Path, settings: DuplicateSettings, left_out: np.ndarray, stands_for: np.ndarray, offsets: np.ndarray
) -> None:
    """Say on standard error if much is left out, with examples."""
    if not len(left_out):
        return
    kept, sizes = np.unique(stands_for[left_out], return_counts=True)
    largest = int(sizes.argmax())
    total = len(stands_for)
    flag = "--duplicate-similarity"
    if len(left_out) > settings.warn_share * total:
        examples = left_out[:: -(-len(left_out) // EXAMPLES)]
        text = f"{len(left_out):,} of {total:,} instances are left out as duplicates ({flag} {settings.similarity})"
    elif sizes[largest] > max(settings.warn_cluster * total, EXAMPLES):
        examples = left_out[stands_for[left_out] == kept[largest]][:EXAMPLES]
        text = f"{sizes[largest]:,} of {total:,} instances are left out as duplicates of one"
    else:
        return
    print(f"warning: {text}; {DUPLICATES} lists them, for example:", file=sys.stderr)
    for item in examples.tolist():
        pair = read_lines(folder / RECORDS, offsets[[item, stands_for[item]]])
        print("  " + " | ".join(map(_excerpt, pair)), file=sys.stderr)


def _excerpt(line: bytes) -> str:
    record = json.loads(line)
    text = " ".join(" ".join(asked_and_answered(record)).split())
    return f"{record['id']}: {text[:EXAMPLE_CHARACTERS]}"


def _run(context: Context, settings: DuplicateSettings) -> dict:
    if context.pool is not None:
        # A target is what it is: copies in it are weight that its author gave.
        return {"duplicates": write_jsonl(context.folder / DUPLICATES, [])}
    return find_duplicates(context.folder, settings, context.engine, context.counted("tag", "tagged"))


def _check_model(context: Context, settings: DuplicateSettings) -> None:
    if settings.model is not None:
        check_sentence_package("--duplicate-model")


STEP = Step(
    "duplicates", {"near-duplicates": DuplicateSettings}, reads=(RECORDS, TAGS), writes=(DUPLICATES,), run=_run,
    check=_check_model,
)  # fmt: skip

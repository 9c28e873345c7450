"""Semantic duplicates (optional): instances whose vectors are alike and that have the same telling words.

The vectors are those of whole instances by an embedder of `embed.py`, on disk. Within blocks of neighbours that k-means
splits off every pair is compared; pairs of two blocks are not (Abbas et al., SemDeDup, 2023).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from megatron_ksa.data_tools.tags.clustering import blocks
from megatron_ksa.data_tools.tags.compared import asked_and_answered, compared_words, telling
from megatron_ksa.data_tools.tags.embed import Embedder, LatentEmbedder, SentenceEmbedder
from megatron_ksa.data_tools.tags.engine import Engine


def _texts(lines: Callable[[], Iterator[bytes]], wanted: np.ndarray | None = None) -> Iterator[str]:
    for row, line in enumerate(lines()):
        if wanted is None or wanted[row]:
            yield "\n\n".join(asked_and_answered(json.loads(line)))


def _statement(line: bytes) -> tuple[tuple[str, ...], ...]:
    return tuple(telling(compared_words(part)) for part in asked_and_answered(json.loads(line)))


def semantic_copies(
    lines: Callable[[], Iterator[bytes]], line_of: Callable[[int], bytes], total: int, model: str | None, cosine: float,
    scratch: Path, engine: Engine,
) -> dict[int, tuple[int, float]]:  # fmt: skip
    """Items that are near to one that stays in meaning: it, and the cosine.

    Args:
        lines: iterates over the records of all items, in order of preference.
        line_of: the record of one item.
        total: items.
        model: sentence-transformers model; TF-IDF and SVD over the items without one.
        cosine: from which two are alike.
        scratch: folder for the vectors.
    """
    embedder: Embedder = (
        SentenceEmbedder(model, "--duplicate-model")
        if model
        else LatentEmbedder.fit(lambda wanted: _texts(lines, wanted), total, engine)
    )
    with open(scratch / "vectors", "wb") as stream:
        width = 0
        for vectors in embedder.embed_texts(_texts(lines), total):
            stream.write(vectors.tobytes())
            width = vectors.shape[1]
    vectors = np.memmap(scratch / "vectors", np.float32, "r", shape=(total, width))
    with threadpool_limits(1):  # one order of additions: the same blocks every time
        parts = blocks(vectors)
    copies: dict[int, tuple[int, float]] = {}
    for members in tqdm(parts, desc="compare meanings", unit=" blocks"):
        members = np.sort(members)
        block = np.array(vectors[members])
        row, column = np.nonzero(np.tril(block @ block.T, -1) >= cosine)
        for gone, candidates in _by_row(row, column):
            near = block[candidates] @ block[gone]
            for place in np.argsort(-near, kind="stable").tolist():
                item, stays = int(members[gone]), int(members[candidates[place]])
                if stays not in copies and _statement(line_of(item)) == _statement(line_of(stays)):
                    copies[item] = stays, float(near[place])
                    break
    return copies


def _by_row(row: np.ndarray, column: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows in rising order, each with its columns."""
    for first in np.flatnonzero(np.diff(row, prepend=-1)).tolist():
        yield int(row[first]), column[first : np.searchsorted(row, row[first], side="right")]

"""Vectors of tags: a sentence-transformers model where one is named, otherwise TF-IDF and SVD over the pool.

A sentence model sees the tag's words. Without one a tag's words say too little: its vector is then the mean of the
vectors of instances that have the tag (TF-IDF in its first 128 singular directions) and of the vector of its words.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import batched
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.sparse import csr_array
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_arrays, write_arrays, write_json
from megatron_ksa.data_tools.tags.minhash import mixed
from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES, read_small

DIMENSIONS = 128
WORDS = 30_000
SAMPLE = 50_000
CHARACTERS = 4_000
TEXTS_PER_TASK = 512
ROWS_AT_ONCE = 1 << 16
# A tag's vector is the mean of the vectors of 16 instances or a few more, where so many have the tag. Its random error
# is 1 / sqrt(16), a quarter, of one instance's, which does for clustering.
INSTANCES_PER_TAG = 16


# Texts of the instances for which a bool [instances] is true.
Texts = Callable[[np.ndarray], Iterable[str]]


class Embedder(Protocol):
    """What turns tags into vectors, of the pool and of new data alike."""

    def embed(self, tags: list[str], carried: csr_array, texts: Texts) -> np.ndarray:
        """Unit vectors, float32 [tags, dimensions].

        Args:
            carried: [tags, instances], above 0 where an instance carries the tag.
            texts: iterates over the texts of the instances that are wanted, bool [instances].
        """

    def embed_texts(self, texts: Iterable[str], total: int) -> Iterator[np.ndarray]:
        """Unit vectors of `total` texts in batches, float32 [batch, dimensions]."""

    def save(self, folder: Path) -> None:
        """Write what `load_embedder` needs."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def check_sentence_package(flag: str) -> None:
    """Check that sentence-transformers is installed, without importing it.

    Raises:
        UsageError: it is not.
    """
    if find_spec("sentence_transformers") is None:
        raise UsageError(f"{flag} needs a package: pip install sentence-transformers")


class SentenceEmbedder:
    """Vectors of the tags' words from a sentence-transformers model.

    Args:
        model: name or path.

        flag: what named it, for errors.

    Raises:
        UsageError: the package or the model is not there.
    """

    def __init__(self, model: str, flag: str = "--embedding-model") -> None:
        check_sentence_package(flag)
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(model)
        except (OSError, ValueError) as error:
            raise UsageError(f"{flag} {model}: {error}") from None
        self.name = model

    def embed(self, tags: list[str], carried: csr_array, texts: Texts) -> np.ndarray:
        """Unit vectors, float32 [tags, dimensions]; the words alone decide."""
        return unit(np.asarray(self._model.encode(tags, batch_size=256, show_progress_bar=True), np.float32))

    def embed_texts(self, texts: Iterable[str], total: int) -> Iterator[np.ndarray]:
        """Unit vectors in batches, float32 [batch, dimensions]."""
        with tqdm(total=total, desc="embed instances", unit=" texts") as progress:
            for batch in batched((text[:CHARACTERS] for text in texts), TEXTS_PER_TASK):
                yield unit(np.asarray(self._model.encode(list(batch), batch_size=256), np.float32))
                progress.update(len(batch))

    def save(self, folder: Path) -> None:
        """Write the model's name."""
        write_json(folder / "embedder.json", {"kind": "sentence", "model": self.name})


class LatentEmbedder:
    """TF-IDF and SVD, fitted on up to 50,000 of the pool's texts, spread evenly.

    Args:
        vectorizer: fitted.
        components: float32 [dimensions, words].
        engine: where texts are embedded.
    """

    def __init__(self, vectorizer: TfidfVectorizer, components: np.ndarray, engine: Engine) -> None:
        self._vectorizer, self._components, self._engine = vectorizer, components, engine

    @classmethod
    def fit(cls, texts: Texts, total: int, engine: Engine) -> "LatentEmbedder":
        """Learn from the texts of `total` instances.

        Raises:
            UsageError: texts without words.
        """
        wanted = np.arange(total) % -(-total // SAMPLE) == 0
        rows = tqdm(texts(wanted), total=int(wanted.sum()), desc="learn words", unit=" records")
        sample = (text[:CHARACTERS] for text in rows)
        vectorizer = _vectorizer(min_df=2 if total >= 50 else 1)
        try:
            matrix = vectorizer.fit_transform(sample)
        except ValueError as error:
            raise UsageError(f"the pool's texts cannot be embedded: {error}") from None
        dimensions = max(1, min(DIMENSIONS, min(matrix.shape) - 1))
        svd = TruncatedSVD(dimensions, algorithm="randomized", n_iter=4, random_state=0)
        with np.errstate(invalid="ignore"):  # the variance that one text explains, which nobody asks for
            svd.fit(matrix)
        return cls(vectorizer, svd.components_.astype(np.float32), engine)

    def _vectors(self, texts: Iterable[str], total: int, what: str) -> Iterator[np.ndarray]:
        """Unit vectors of batches of texts, float32 [batch, dimensions]."""
        embed = partial(_embed_texts, vectorizer=self._vectorizer, components=self._components)
        with tqdm(total=total, desc=what, unit=" texts") as progress:
            for vectors in self._engine.map(embed, batched(texts, TEXTS_PER_TASK)):
                progress.update(len(vectors))
                yield vectors

    def embed(self, tags: list[str], carried: csr_array, texts: Texts) -> np.ndarray:
        """Unit vectors, float32 [tags, dimensions]: mean of the instances', and the tag's own, in equal parts.

        Of a tag that many instances carry, `INSTANCES_PER_TAG` or a few more are taken.
        """
        # The one array of this size: a vector of 512 bytes a tag is most of the memory of a pool with many tags.
        result = np.zeros((len(tags), len(self._components)), np.float32)
        by_instance = csr_array(carried.T)
        wanted = enough_instances(by_instance, INSTANCES_PER_TAG)
        by_instance, first = by_instance[np.flatnonzero(wanted)], 0
        for vectors in self._vectors(texts(wanted), by_instance.shape[0], "embed instances"):
            held = by_instance[first : first + len(vectors)]
            used, column = np.unique(held.indices, return_inverse=True)
            entries = (np.ones(held.nnz, np.float32), column, held.indptr)
            result[used] += csr_array(entries, shape=(len(vectors), len(used))).T @ vectors
            first += len(vectors)
        first = 0
        for own in self._vectors(tags, len(tags), "embed tags"):
            part = result[first : first + len(own)]
            part[:] = unit(unit(part) + own)
            first += len(own)
        return result

    def embed_texts(self, texts: Iterable[str], total: int) -> Iterator[np.ndarray]:
        """Unit vectors in batches, float32 [batch, dimensions]."""
        return self._vectors(texts, total, "embed instances")

    def save(self, folder: Path) -> None:
        """Write words, weights and directions."""
        words = self._vectorizer.get_feature_names_out()
        write_json(folder / "embedder.json", {"kind": "latent", "words": list(words)})
        write_arrays(folder / "embedder.npz", idf=self._vectorizer.idf_, components=self._components)


def enough_instances(carried: csr_array, each: int) -> np.ndarray:
    """bool [instances]: for every tag `each` that carry it, or all there are, from anywhere in the pool.

    Args:
        carried: [instances, tags], above 0 where an instance carries a tag.
    """
    wanted, lacks = np.zeros(carried.shape[0], bool), np.full(carried.shape[1], each).tolist()
    order = np.argsort(mixed(np.arange(carried.shape[0], dtype=np.uint64)), kind="stable")
    for first in range(0, len(order), ROWS_AT_ONCE):
        rows = order[first : first + ROWS_AT_ONCE]
        bounds = zip(rows.tolist(), carried.indptr[rows].tolist(), carried.indptr[rows + 1].tolist(), strict=True)
        for row, start, end in bounds:
            tags = carried.indices[start:end].tolist()
            if any(lacks[tag] > 0 for tag in tags):
                wanted[row] = True
                for tag in tags:
                    lacks[tag] -= 1
    return wanted


def _vectorizer(**settings) -> TfidfVectorizer:
    return TfidfVectorizer(stop_words="english", sublinear_tf=True, max_features=WORDS, dtype=np.float32, **settings)


def _embed_texts(texts: tuple[str, ...], vectorizer: TfidfVectorizer, components: np.ndarray) -> np.ndarray:
    return unit(vectorizer.transform(text[:CHARACTERS] for text in texts) @ components.T)


def load_embedder(folder: Path, engine: Engine) -> Embedder:
    """The embedder that was saved in a folder.

    Raises:
        UsageError: none there.
    """
    path = folder / "embedder.json"
    if not path.is_file():
        raise UsageError(f"{path} does not exist: run the tree step of that folder first")
    saved = json.loads(read_small(path, limit=LIST_BYTES))
    if saved["kind"] == "sentence":
        return SentenceEmbedder(saved["model"])
    arrays = read_arrays(folder / "embedder.npz")
    vectorizer = _vectorizer(vocabulary={word: column for column, word in enumerate(saved["words"])})
    vectorizer.idf_ = arrays["idf"]
    return LatentEmbedder(vectorizer, arrays["components"], engine)

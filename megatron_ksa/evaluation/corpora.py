"""Training corpora in the language of token ids, for experiments with small models."""

from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.evaluation.token_language import VOCABULARY, TokenLanguage

PARTS = 32


def _documents(task: tuple[int, int, int, int, int]) -> list[np.ndarray]:
    seed, shortest, longest, tokens, reach = task
    random, language, documents = np.random.default_rng(seed), TokenLanguage(), []
    while tokens > 0:
        size = int(np.exp(random.uniform(np.log(shortest), np.log(longest + 1))))
        documents.append(language.document(size, random, reach))
        tokens -= len(documents[-1])
    return documents


def write_corpus(prefix: Path, shortest: int, longest: int, tokens: int, reach: int, seed: int, pool: Executor) -> None:
    """An indexed dataset of documents of log-uniform lengths, unless it is there.

    Args:
        shortest, longest: tokens of a document.
        tokens: of the corpus, about.
        reach: tokens before a question that its needles stand within.
        pool: processes that make the documents; the bytes do not depend on their number.
    """
    if prefix.with_suffix(".idx").exists():
        return
    tasks = [(1000 * seed + part, shortest, longest, tokens // PARTS, reach) for part in range(PARTS)]
    with IndexedDatasetWriter(str(prefix), VOCABULARY, overwrite=True) as writer:
        for documents in pool.map(_documents, tasks):
            for document in documents:
                writer.add_document(document)

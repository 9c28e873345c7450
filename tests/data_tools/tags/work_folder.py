"""A work folder as the steps before sampling leave it (data_tools/tags/README.md), with a tokenizer."""

from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.benchmarks.tags_align import topic_pool
from megatron_ksa.data_tools.tags.files import write_arrays, write_jsonl
from megatron_ksa.data_tools.tokenizers import write_byte_level

TOPICS = ("Algebra", "Größe & <b>Maß</b>", "history", "中文")


def make_work_folder(folder: Path, instances: int = 200, seed: int = 0) -> Path:
    """Records, tree and grounding of `topic_pool` with four topics; every tenth record is a plain text."""
    pool, _ = topic_pool(instances=instances, topics=len(TOPICS), leaves=5, seed=seed)
    leaves = [np.unique(tags) for tags in pool.leaves.reshape(-1, 5)]
    count = np.zeros(len(pool.parent), np.int64)
    for tags in leaves:
        for v in tags:
            while v >= 0:
                count[v] += 1
                v = pool.parent[v]
    inner = 1 + len(TOPICS)
    tag = np.where(np.arange(len(pool.parent)) < inner, -1, np.arange(len(pool.parent)) - inner).astype(np.int32)
    names = ["root", *TOPICS, *(f"{TOPICS[i // 5]} {i % 5}" for i in range(5 * len(TOPICS)))]
    write_arrays(
        folder / "tree.npz",
        parent=pool.parent,
        depth=pool.depth.astype(np.int16),
        name=np.array(names),
        tag=tag,
        count=count,
    )
    write_arrays(
        folder / "grounding.npz", record=np.arange(0, 2 * instances, 2),
        indptr=np.concatenate([[0], np.cumsum([len(tags) for tags in leaves])]),
        leaves=np.concatenate(leaves).astype(np.int32), quality=pool.quality, difficulty=pool.difficulty,
        length=np.full(instances, 50),
    )  # fmt: skip
    vectors = np.random.default_rng(seed).normal(size=(5 * len(TOPICS), 8)).astype(np.float32)
    np.save(folder / "embeddings.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    # Every other record is not grounded: rows and lines differ.
    write_jsonl(folder / "records.jsonl", (record(i) for i in range(2 * instances)))
    write_jsonl(folder / "contaminated.jsonl", [])
    write_byte_level(folder / "tokenizer")
    return folder


def record(line: int) -> dict:
    """The record on a line."""
    common = {"id": f"r{line}", "source": f"source {line % 3}"}
    scores = {"quality": None, "difficulty": None, "tags": None}
    if line % 10 == 0:
        return {**common, "text": f"Plain text {line}. " * 3, **scores}
    messages = [
        {"role": "user", "content": f"Question {line}?"},
        {"role": "assistant", "content": f"Answer {line}! " * (1 + line % 5)},
    ]
    return {**common, "messages": messages, **scores}

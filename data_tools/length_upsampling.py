"""Length-upsampled data: documents longer than a threshold are repeated until they hold a stated share of the tokens.

Data for length extension keeps its sources and shifts weight to long documents (Fu et al. 2024, arXiv 2402.10171;
used by HARPE, arXiv 2412.07171, section 4).
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.indexed import (
    IndexedDatasetWriter,
    check_indexed_dataset,
    check_prefix,
    loss_mask_prefix,
    sequence_lengths,
)
from megatron_ksa.errors import UsageError
from megatron_ksa.locks import exclusive

MAX_REPEATS = 1000


@dataclass(frozen=True)
class UpsamplingCounts:
    """Documents and tokens, long ones and all, before and after."""

    long_documents: int
    documents: int
    long_tokens: int
    tokens: int
    long_tokens_after: int
    tokens_after: int

    @property
    def share_before(self) -> float:
        """Share of tokens in long documents, before."""
        return self.long_tokens / self.tokens

    @property
    def share_after(self) -> float:
        """Share of tokens in long documents, after."""
        return self.long_tokens_after / self.tokens_after


def plan_repeats(sizes: np.ndarray, threshold: int, share: float, random: np.random.Generator) -> np.ndarray:
    """How often each document is written: 1 for short ones, about r for long ones.

    With L tokens in long documents and R in the rest, r L / (r L + R) = share. Every long document is written floor(r)
    times, and a random part of them once more. Nothing is dropped: a share below the present one is an error.

    Args:
        sizes: int [documents], tokens.
        threshold: documents of more tokens are long.

    Returns:
        int64 [documents].

    Raises:
        UsageError: no long document, no short one, or a share that is met already.
    """
    long = sizes > threshold
    inside, outside = int(sizes[long].sum()), int(sizes[~long].sum())
    if not 0 < share < 1:
        raise UsageError(f"--share {share}: between 0 and 1")
    if not inside:
        raise UsageError(f"--threshold {threshold}: no document is longer, the longest has {int(sizes.max())} tokens")
    if inside / (inside + outside) > share:
        raise UsageError(
            f"--share {share:g}: documents above {threshold} tokens hold {inside / (inside + outside):.3f} already"
        )
    wanted = share / (1 - share) * outside
    whole = math.floor(wanted / inside)
    if whole > MAX_REPEATS:
        raise UsageError(
            f"--share {share:g}: each document above {threshold} tokens would be written {whole:,} times; at most "
            f"{MAX_REPEATS}"
        )
    repeats = np.where(long, whole, 1)
    missing = wanted - whole * inside
    for index in random.permutation(np.flatnonzero(long)):
        if sizes[index] > 2 * missing:  # leaves the share nearer than adding it would
            continue
        repeats[index] += 1
        missing -= sizes[index]
    return repeats


def upsample(
    prefix: str, output_prefix: str, threshold: int, share: float, *, seed: int = 0, overwrite: bool = False
) -> UpsamplingCounts:
    """Write the dataset, and its loss mask where it has one, with the long documents repeated, in random order.

    Raises:
        UsageError: a dataset that is missing, truncated or not of integers, an output that exists or that another run
            writes, a plan that cannot be met, a full disk.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_prefix(output_prefix)
    prefixes = [(prefix, output_prefix)]
    check_indexed_dataset(prefix)
    if Path(f"{loss_mask_prefix(prefix)}.idx").is_file():
        check_indexed_dataset(loss_mask_prefix(prefix))
        if not np.array_equal(sequence_lengths(loss_mask_prefix(prefix)), sequence_lengths(prefix)):
            raise UsageError(f"--data-path {prefix}: its loss mask was not written with it: documents differ in length")
        prefixes.append((loss_mask_prefix(prefix), loss_mask_prefix(output_prefix)))
    elif Path(f"{loss_mask_prefix(output_prefix)}.idx").exists():
        raise UsageError(f"{loss_mask_prefix(output_prefix)}.idx exists, the loss mask of another dataset: remove it")
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    sizes = ends[bounds[1:]] - ends[bounds[:-1]]
    random = np.random.default_rng(seed)
    repeats = plan_repeats(sizes, threshold, share, random)
    order = random.permutation(np.repeat(np.arange(len(sizes)), repeats))
    with exclusive(output_prefix, "tools/upsample_lengths.py") as lock, ExitStack() as stack:
        pairs = []
        for source, output in prefixes:
            read = IndexedDataset(source)
            kind = read.index.dtype
            # Every id that the source's type holds, in that type.
            size = int(np.iinfo(kind).max) + 1 if np.issubdtype(kind, np.integer) else 0
            writer = IndexedDatasetWriter(output, size, overwrite=overwrite, dtype=kind, check=lock.check)
            pairs.append((read, stack.enter_context(writer)))
        for document in tqdm(order, desc="write", unit="document"):
            for read, writer in pairs if sizes[document] else ():
                writer.add_document(np.concatenate(read[bounds[document] : bounds[document + 1]]))
        for _, writer in pairs:
            writer.prepare()
    long = sizes > threshold
    return UpsamplingCounts(
        long_documents=int(long.sum()),
        documents=len(sizes),
        long_tokens=int(sizes[long].sum()),
        tokens=int(sizes.sum()),
        long_tokens_after=int((sizes * repeats)[long].sum()),
        tokens_after=int((sizes * repeats).sum()),
    )

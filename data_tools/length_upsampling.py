"""Length-upsampled data: documents longer than a threshold are repeated until they hold a stated share of the tokens.

Data for length extension keeps its sources and shifts weight to long documents (Fu et al. 2024, arXiv 2402.10171;
used by HARPE, arXiv 2412.07171, section 4).
"""

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, check_indexed_dataset
from megatron_ksa.errors import UsageError


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
    """Write the dataset with its long documents repeated, in random order.

    Raises:
        UsageError: a dataset that is missing or truncated, an output that exists, or a plan that cannot be met.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    check_indexed_dataset(prefix)
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices
    sizes = np.add.reduceat(dataset.sequence_lengths, bounds[:-1]).astype(np.int64)
    random = np.random.default_rng(seed)
    repeats = plan_repeats(sizes, threshold, share, random)
    order = random.permutation(np.repeat(np.arange(len(sizes)), repeats))
    # The writer chooses the token type by the vocabulary: the source's own.
    vocabulary = 2**16 - 1 if DType.size(dataset.index.dtype) == 2 else 2**31
    with IndexedDatasetWriter(output_prefix, vocabulary, overwrite=overwrite) as writer:
        for document in tqdm(order, desc="write", unit="document"):
            writer.add_document(np.concatenate(dataset[bounds[document] : bounds[document + 1]]))
    long = sizes > threshold
    return UpsamplingCounts(
        long_documents=int(long.sum()),
        documents=len(sizes),
        long_tokens=int(sizes[long].sum()),
        tokens=int(sizes.sum()),
        long_tokens_after=int((sizes * repeats)[long].sum()),
        tokens_after=int((sizes * repeats).sum()),
    )

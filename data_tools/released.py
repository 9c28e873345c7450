"""The data format of the released KSA training code: tokens without an index.

    PREFIX.bin            token ids one after the other, little-endian, no document boundaries beside the tokens' own
    PREFIX.bin.meta       the name of their numpy type, such as `uint32`, and nothing else
    PREFIX_loss_mask.bin  instructions only: 0 or 1 for each token, in the type of the ids

Read in `muse/data/datasets/kai_mmap.py` of github.com/Kuaishou-OneRec/KSA at 3471317 (names, types, sizes), and in
`recipes/pretrain_kai_summary_unified.py` there: the mask is shifted together with the labels, so 1 means that the token
counts as a label, which is what this project's masks say. No data of this format is published, so these could not be
verified:

- that documents end with the tokenizer's end-of-document id, at which they are cut here;
- the byte order (the released code reads the machine's own).

The released code takes its samples of instructions at multiples of the sequence length; Megatron joins documents.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small

SUFFIX, META_SUFFIX = ".bin", ".bin.meta"
BLOCK_TOKENS = 1 << 20
# Longer documents are written in pieces of this length; it bounds the memory where a file has no end of document.
PIECE_TOKENS = 1 << 24
_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@dataclass(frozen=True)
class ReleasedData:
    """One dataset of the released format.

    Args:
        path: PREFIX.bin.
        dtype: type of an id.
        mask: PREFIX_loss_mask.bin, where there is one.
    """

    path: Path
    dtype: np.dtype
    mask: Path | None


def is_released(path: Path) -> bool:
    """Whether a file is the tokens of the released format."""
    return path.name.endswith(SUFFIX)


def open_released(path: Path) -> ReleasedData:
    """The dataset whose tokens are PREFIX.bin, after a check of its sizes.

    Raises:
        UsageError: no or another meta file, a size that is no number of tokens, a mask of another size.
    """
    prefix = path.name.removesuffix(SUFFIX)
    meta, mask = path.with_name(prefix + META_SUFFIX), path.with_name(f"{prefix}_loss_mask.bin")
    if not meta.is_file():
        raise UsageError(
            f"--input {path}: {meta} is missing, which names the type of the ids (released KSA data has it)"
        )
    name = read_small(meta, "--input", limit=64).strip()
    if name not in _TYPES:
        raise UsageError(f"--input {meta}: {name!r} is none of {', '.join(_TYPES)}")
    dtype = np.dtype(name).newbyteorder("<")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise UsageError(f"--input {path}: {size:,} bytes are no whole number of {name} ids: truncated?")
    if mask.is_file() and mask.stat().st_size != size:
        raise UsageError(
            f"--input {mask}: {mask.stat().st_size:,} bytes, while {path} has {size:,}: not written together"
        )
    return ReleasedData(path, dtype, mask if mask.is_file() else None)


def _blocks(data: ReleasedData, vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids int64 [n] and masks uint8 [n] of each part of the file."""
    start = 0
    with open(data.path, "rb") as tokens, open(data.mask, "rb") if data.mask else nullcontext() as masks:
        while len(ids := np.fromfile(tokens, data.dtype, BLOCK_TOKENS)):
            wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(wrong):
                raise UsageError(
                    f"--input {data.path}: token {start + wrong[0]:,} is {ids[wrong[0]]:,}, but --tokenizer-model has "
                    f"{vocab_size:,} tokens: another tokenizer, or another type than {data.path}.meta names"
                )
            counts = np.fromfile(masks, data.dtype, BLOCK_TOKENS) if data.mask else np.ones(len(ids), np.uint8)
            wrong = np.flatnonzero((counts != 0) & (counts != 1))
            if len(wrong) or len(counts) != len(ids):
                raise UsageError(
                    f"--input {data.mask}: a mask is 0 or 1 for every token; see token {start:,} and after"
                )
            yield ids.astype(np.int64), counts.astype(np.uint8)
            start += len(ids)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One array of ids and one of masks from those of consecutive parts."""
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([masks for _, masks in parts])


def released_documents(
    data: ReleasedData, end_of_document: int, vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids int64 [n] and masks uint8 [n] of each document, its end-of-document id included.

    A document of more than `PIECE_TOKENS` comes in pieces.

    Raises:
        UsageError: an id that the tokenizer does not have, a mask that is neither 0 nor 1.
    """
    held: list[tuple[np.ndarray, np.ndarray]] = []
    size = 0
    for ids, counts in _blocks(data, vocab_size):
        start = 0
        for end in (*(np.flatnonzero(ids == end_of_document) + 1), len(ids)):
            while start < end:
                stop = min(end, start + PIECE_TOKENS - size)
                held.append((ids[start:stop], counts[start:stop]))
                size, start = size + stop - start, stop
                if size == PIECE_TOKENS or held[-1][0][-1] == end_of_document:
                    yield _joined(held)
                    held, size = [], 0
    if held:
        yield _joined(held)

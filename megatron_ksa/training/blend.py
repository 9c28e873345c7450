"""The datasets that the data flags name, with their weights: checked before Megatron's assertions meet them."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megatron_ksa.data_tools.indexed import sequence_lengths
from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES, read_small

Blend = tuple[list[str], list[float] | None]
SPLITS = ("train", "valid", "test")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# Megatron reads 1e2 in --split as the two numbers 1 and 2.
SHARE = re.compile(r"\+?(\d+\.?\d*|\.\d+)", re.ASCII)


def check_split(split: str | None) -> None:
    """Check `--split`; Megatron takes whatever digits it finds in the text.

    Raises:
        UsageError: anything else than one to three plain numbers, none below 0 and one above.
    """
    if split is None:
        return
    parts = [part.strip() for part in split.split(",")]
    numbers = [float(part) for part in parts if SHARE.fullmatch(part)]
    if len(numbers) != len(parts) or len(parts) > len(SPLITS) or not 0 < sum(numbers) < math.inf:
        raise UsageError(
            f"--split {split[:60]}: give up to three numbers of 0 or more for training, validation and test, at least "
            f"one above 0, such as 969,30,1"
        )


def sources(args: argparse.Namespace) -> dict[str, bool]:
    """The flags that data can come from, and whether each is given."""
    return {
        "--data-path": args.data_path is not None,
        "--data-args-path": args.data_args_path is not None,
        "--train-data-path, --valid-data-path and --test-data-path": any(
            words is not None for words in _per_split(args)
        ),
        "--per-split-data-args-path": args.per_split_data_args_path is not None,
        "--mock-data": bool(args.mock_data),
    }


def _per_split(args: argparse.Namespace) -> list[list[str] | None]:
    return [args.train_data_path, args.valid_data_path, args.test_data_path]


def blends_from_args(args: argparse.Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """One blend for all splits, and one for each split, as `GPTDatasetConfig` takes them; None what is not given.

    Raises:
        UsageError: a file that is missing or cannot be read, a weight that is no number above 0, or two sources.
    """
    per_split = _per_split(args)
    used = [flag for flag, given in sources(args).items() if given]
    if len(used) > 1:
        raise UsageError(f"the data comes from {' and from '.join(used)}: give one of them")
    if args.data_path is not None:
        return _blend("--data-path", args.data_path), None
    if args.data_args_path is not None:
        return _from_file(args.data_args_path), None
    if args.per_split_data_args_path is not None:
        return None, _from_json(args.per_split_data_args_path)
    if any(words is not None for words in per_split):
        flags = (f"--{split}-data-path" for split in SPLITS)
        return None, [_blend(flag, words) for flag, words in zip(flags, per_split, strict=True)]
    return None, None


def dataset_prefixes(args: argparse.Namespace) -> list[str]:
    """Paths, without `.bin` and `.idx`, of every dataset that the data flags name.

    Raises:
        UsageError: as `blends_from_args`.
    """
    blend, per_split = blends_from_args(args)
    return [prefix for named in (blend, *(per_split or [])) if named is not None for prefix in named[0]]


def data_path_prefixes(words: list[str]) -> list[str]:
    """Paths, without `.bin` and `.idx`, of the datasets that the words of `--data-path` name.

    Raises:
        UsageError: a weight that is no number above 0, or that stands alone.
    """
    blend = _blend("--data-path", words)
    return [] if blend is None else blend[0]


def check_documents(args: argparse.Namespace) -> None:
    """Refuse a split that gets no text of a dataset: Megatron would look for its samples without end.

    Args:
        args: Megatron's arguments after its validation, which sets `--split`; its datasets are whole.

    Raises:
        UsageError: naming the dataset and the split.
    """
    blend, per_split = blends_from_args(args)
    blends, bounds = per_split or [None] * len(SPLITS), [(0.0, 1.0)] * len(SPLITS)
    if blend is not None:
        if args.split is None:  # Megatron refuses it
            return
        blends = [blend] * len(SPLITS)
        bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    for split, named, shares in zip(SPLITS, blends, bounds, strict=True):
        for prefix in [] if named is None or shares is None else named[0]:
            lengths = sequence_lengths(prefix)
            begin, end = (round(share * float(len(lengths))) for share in shares)  # as Megatron
            if lengths[begin:end].any():
                continue
            where = f"{prefix} has no text for the {split} split"
            if blend is None:
                raise UsageError(f"{where}: leave it out of --{split}-data-path or of the file that names it")
            raise UsageError(
                f"{where}: --split {args.split} gives that {end - begin:,} of its {len(lengths):,} documents: give "
                "other shares, such as 90,10,0, or more documents"
            )


def _read(flag: str, path: str) -> str:
    return read_small(Path(path), flag, limit=LIST_BYTES)


def _from_file(path: str) -> Blend:
    """A blend file: weights and prefixes, over any lines; `#` starts a comment."""
    words = [
        (word, f"{path}, line {number}")
        for number, line in enumerate(_read("--data-args-path", path).splitlines(), 1)
        for word in re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split()
    ]
    return _pairs(f"--data-args-path {path}", words)


def _from_json(path: str) -> list[Blend | None]:
    flag = f"--per-split-data-args-path {path}"
    try:
        found = json.loads(_read("--per-split-data-args-path", path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag} is no JSON: {error}") from None
    if not isinstance(found, dict) or (missing := [split for split in SPLITS if split not in found]):
        named = ", ".join(missing) if isinstance(found, dict) else "train, valid, test"
        raise UsageError(f"{flag} lacks {named}: it is an object of three lists, each of weights and prefixes or null")
    return [_blend(f"{flag}, {split}", _words(flag, split, found[split])) for split in SPLITS]


def _words(flag: str, split: str, value: object) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list) and all(isinstance(word, str | int | float) for word in value):
        return [str(word) for word in value]
    raise UsageError(f"{flag}, {split}: a list or a text of weights and prefixes is needed, not {value!r}")


def _blend(flag: str, words: list[str] | None) -> Blend | None:
    return None if words is None else _pairs(flag, [(word, f"{flag}, word {i}") for i, word in enumerate(words, 1)])


def _pairs(flag: str, words: list[tuple[str, str]]) -> Blend:
    """Prefixes alone, or a weight before each; the rule is Megatron's, the errors name the place."""
    if not words:
        raise UsageError(f"{flag} names no dataset: give prefixes, or a weight before each of them")
    weighted = len(words) % 2 == 0 and any(NUMBER.fullmatch(word) for word, _ in words[::2])
    if not weighted:
        for word, place in words if len(words) > 1 else ():
            if NUMBER.fullmatch(word):
                raise UsageError(f"{place}: {word} stands alone: give every dataset a weight, or none of them")
        return [word for word, _ in words], None
    return [word for word, _ in words[1::2]], list(_weights(words[::2]))


def _weights(words: list[tuple[str, str]]) -> Iterator[float]:
    for word, place in words:
        if not NUMBER.fullmatch(word) or not 0 < float(word) < math.inf:
            raise UsageError(f"{place}: the weight is {word}: a number above 0 is needed; leave out what is not used")
        yield float(word)

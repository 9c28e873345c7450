"""What the evaluation tools share: the checkpoint flags, models, documents, and results that appear whole."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_ksa.data_tools.indexed import check_indexed_dataset
from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small, whole_file
from megatron_ksa.platform import prepare_platform

if TYPE_CHECKING:
    from megatron_ksa.evaluation.generation import Generate

MAX_TEXT_BYTES = 100_000_000
DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser, huggingface: str = "") -> None:
    """Flags that say which model, and where results go.

    Args:
        huggingface: what the help says about Hugging Face folders, where they are taken.
    """
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder that pretrain_gpt.py --save wrote"
                        + huggingface)  # fmt: skip
    parser.add_argument("--iteration", type=int, help="iteration to load; the newest without it")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; bfloat16 on a GPU, float32 on a CPU without it"
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--trust-checkpoint", action="store_true", help="load objects of any class, which can run code")


def prepare(args: argparse.Namespace) -> dict[str, object]:
    """Check the output and prepare the platform, before Megatron is imported; what `load_model` needs to know of it.

    Raises:
        UsageError: an output that is no JSON file in a folder that exists.
    """
    if args.output.suffix != ".json" or not args.output.parent.is_dir():
        raise UsageError(f"--output {args.output}: a .json file in a folder that exists")
    return prepare_platform(["--trust-checkpoint"] * args.trust_checkpoint)


def load(args: argparse.Namespace):
    """The stored checkpoint and its model; Megatron is imported here, after the platform."""
    defaults = prepare(args)
    import torch

    from megatron_ksa.checkpoint.load import find_checkpoint, load_model

    stored = find_checkpoint(args.checkpoint, args.iteration)
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    return stored, load_model(stored, defaults, getattr(torch, dtype))


@dataclass(frozen=True)
class Decoding:
    """A model that decodes greedily: its name in results, its vocabulary, and the function."""

    name: str
    vocab_size: int
    generate: "Generate"


def load_for_decoding(args: argparse.Namespace, stops: Sequence[int] = ()) -> Decoding:
    """The model of a Megatron checkpoint or a Hugging Face folder, whichever `--checkpoint` is.

    Args:
        stops: tokens that end a text, besides those that the model's own settings name.
    """
    prepare(args)
    if not (args.checkpoint / "config.json").is_file():
        stored, model = load(args)
        from megatron_ksa.evaluation.generation import MegatronGreedy

        return Decoding(str(stored.folder), model.vocab_size, MegatronGreedy(model, stops))
    if args.iteration is not None:
        raise UsageError(
            f"--iteration {args.iteration}: {args.checkpoint} is a Hugging Face folder, which has one state"
        )
    from megatron_ksa.evaluation.generation import HuggingFaceGreedy
    from megatron_ksa.huggingface.loading import load_for_generation

    model = load_for_generation(args.checkpoint, args.dtype, trust_code=args.trust_checkpoint)
    own = model.generation_config.eos_token_id
    stops = {*stops, *(own if isinstance(own, list) else [] if own is None else [own])}
    return Decoding(str(args.checkpoint), model.config.vocab_size, HuggingFaceGreedy(model, sorted(stops)))


def stops_of(tokenizer) -> list[int]:
    """The tokenizer's end of document, where it has one."""
    try:
        return [tokenizer.end_of_document]
    except UsageError:
        return []


def lengths(text: str) -> list[int]:
    """'2k,4k,512' -> [2048, 4096, 512], sorted."""
    try:
        values = [int(part[:-1]) * 1024 if part.endswith("k") else int(part) for part in text.lower().split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 2k,4k,8k") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: lengths are positive")
    return sorted(set(values))


def indexed_documents(prefix: str, concatenate: bool) -> Sequence[np.ndarray]:
    """Documents of an indexed dataset, or all of them as one.

    Raises:
        UsageError: a dataset that is missing or truncated.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_indexed_dataset(prefix)
    dataset = IndexedDataset(prefix)
    return [np.concatenate([dataset[i] for i in range(len(dataset))])] if concatenate else dataset


def read_text(path: Path, flag: str) -> str:
    """A UTF-8 text file without a byte order mark, of at most `MAX_TEXT_BYTES`."""
    return read_small(path, flag, limit=MAX_TEXT_BYTES)


def write_json(path: Path, result: dict) -> None:
    """Write results, whole or not at all."""
    with whole_file(path) as stream:
        stream.write(json.dumps(result, indent=1) + "\n")

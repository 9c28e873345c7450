"""The model, tokenizer and end tokens of a folder: a Megatron checkpoint of any parallel layout, or a Hugging Face one.

Import this after `platform.prepare_platform`.
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ksa.checkpoint.load import TRACKER, StoredCheckpoint, find_checkpoint, load_model
from megatron_ksa.data_tools.tokenizers import Tokenizer, load_tokenizer
from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_json, writing
from megatron_ksa.model.gpt import KSAGPTModel


@dataclass(frozen=True)
class Loaded:
    """What generation needs of a folder.

    Attributes:
        name: the folder, with the iteration of a Megatron checkpoint.
        trained_length: tokens of a sequence that the model was trained on.
        end_tokens: ids that end a text.
    """

    name: str
    model: KSAGPTModel
    tokenizer: Tokenizer
    trained_length: int
    end_tokens: tuple[int, ...]


def _end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's end of document, and the ids in a Hugging Face folder's generation_config.json."""
    found: list[int] = []
    # Without one a text ends by its length or a stop string.
    with contextlib.suppress(UsageError):
        found.append(tokenizer.end_of_document)
    path = folder / "generation_config.json"
    if path.is_file():
        given = read_json(path).get("eos_token_id") or []
        found += given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(found))


def _tokenizer(given: str | None, folder: Path, stored: StoredCheckpoint) -> Tokenizer:
    """The tokenizer given, else that of the folder, else the one that the checkpoint was trained with."""
    if given is not None:
        return load_tokenizer(given)
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder))
    trained = getattr(stored.args, "tokenizer_model", None)
    if trained is None or not Path(trained).exists():
        where = "names none" if trained is None else f"was trained with {trained}, which is not there"
        raise UsageError(f"{folder} has no tokenizer and {where}: give --tokenizer-model")
    return load_tokenizer(str(trained))


def _stored(folder: Path, iteration: int | None, defaults: dict[str, object], work: Path) -> StoredCheckpoint:
    """The checkpoint in a folder; one of Hugging Face is imported into the empty folder `work` first."""
    if (folder / TRACKER).is_file():
        return find_checkpoint(folder, iteration)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--load {folder} is no checkpoint: it has neither {TRACKER} (pretrain_gpt.py --save) nor config.json "
            "(Hugging Face)"
        )
    if iteration is not None:
        raise UsageError(f"--iteration {iteration}: {folder} is a Hugging Face folder, which has one")
    from megatron_ksa.huggingface.importer import import_checkpoint
    from megatron_ksa.training.arguments import install_arguments

    with install_arguments(defaults), writing(work / "checkpoint"):
        import_checkpoint(folder, work)
    return find_checkpoint(work)


def load(
    folder: Path, defaults: dict[str, object], *, iteration: int | None = None, dtype: str | None = None,
    tokenizer: str | None = None, work: Path | None = None,
) -> Loaded:  # fmt: skip
    """The model of a folder on the GPU where there is one, whole, whatever layout it was saved in.

    Args:
        defaults: what `prepare_platform` returned.
        iteration: of a Megatron checkpoint; the newest without it.
        dtype: of the weights; bfloat16 on a GPU and float32 on a CPU without it.
        tokenizer: path of a tokenizer; by default that of the folder or of the training run.
        work: folder for the Megatron form of a Hugging Face checkpoint, which has its size and is removed; the system's
            temporary folder without it.

    Raises:
        UsageError: no checkpoint or tokenizer there, or one that cannot be loaded.
    """
    if not folder.is_dir():
        raise UsageError(f"--load {folder} is no folder")
    with tempfile.TemporaryDirectory(prefix="generate-", dir=work) as made:
        stored = _stored(folder, iteration, defaults, Path(made))
        encoder = _tokenizer(tokenizer, folder, stored)
        kind = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        model = load_model(stored, defaults, getattr(torch, kind))
    name = f"{folder}, iteration {stored.iteration}" if (folder / TRACKER).is_file() else str(folder)
    return Loaded(name, model, encoder, stored.args.seq_length, _end_tokens(folder, encoder))

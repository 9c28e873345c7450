"""Tokenizer files and token ids that an exported model takes from another Hugging Face folder."""

import shutil
from pathlib import Path

from megatron_ksa.data_tools.vocabularies import token_ids
from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_json
from megatron_ksa.huggingface.architecture import Architecture

# What a tokenizer, and generation with it, need.
FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
         "chat_template*", "generation_config.json", "additional_chat_templates/*.jinja")  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def companion_files(like: Path, more: tuple[str, ...] = ()) -> list[Path]:
    """The files to copy; folders whose names match a pattern, such as `tokenizer/`, are none of them.

    Args:
        like: the Hugging Face folder, whose files may be links into a cache.
        more: patterns of further files.

    Raises:
        UsageError: no such folder, a link to a file that is not there, or what cannot be read as a file.
    """
    if not like.is_dir():
        raise UsageError(f"--like {like} is no folder")
    found = []
    for file in sorted({file for pattern in (*FILES, *more) for file in like.glob(pattern)}):
        if file.is_dir():
            continue
        if not file.is_file():
            link = f"a link to {file.readlink()}, which is not there" if file.is_symlink() else "no regular file"
            raise UsageError(f"--like {file} is {link}")
        try:
            file.open("rb").close()
        except OSError as error:
            raise UsageError(f"--like {file} cannot be read: {error.strerror}") from None
        found.append(file)
    return found


def copy_companions(
    like: Path, output: Path, config: dict[str, object], arch: Architecture, more: tuple[str, ...] = ()
) -> None:
    """Copy the files, what links lead to in place of the links, and add the special token ids to `config`.

    Args:
        like: folder of a model with the same vocabulary.
        more: patterns of further files.

    Raises:
        UsageError: ids that the model has no rows for, files that contradict each other or cannot be read.
    """
    files = companion_files(like, more)
    template = read_json(like / "config.json")
    for key in (key for key in TOKEN_IDS if key in template):
        given = template[key]
        for id in given if isinstance(given, list) else [given]:
            if id is not None and (type(id) is not int or id >= arch.vocab_size):
                raise UsageError(f"--like {like}: {key} is {id!r}, the model has {arch.vocab_size:,} rows of text")
        config[key] = given
    largest = max((token_ids(like, "--like") or {}).values(), default=-1)
    if largest >= arch.vocab_size:
        raise UsageError(
            f"--like {like}: its tokenizer has ids up to {largest:,}, the model has {arch.vocab_size:,} rows of text: "
            f"give the folder of a model with the same vocabulary, or a larger --vocab-size"
        )
    for file in files:
        target = output / file.relative_to(like)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)

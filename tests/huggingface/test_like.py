"""`--like`: tokenizer files of another folder are copied whole, and are of the vocabulary that the model has."""

import json
import os
import shutil
from pathlib import Path

import pytest
from models import VOCABULARY, save_family

from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.companions import companion_files


@pytest.fixture(scope="module")
def models(tmp_path_factory, to_megatron) -> tuple[Path, Path]:
    """A Hugging Face folder, and its Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    save_family("llama2", folder / "hf", shard_size="1GB")
    return folder / "hf", to_megatron(folder / "hf", folder / "megatron")


@pytest.fixture
def like(models, tmp_path) -> Path:
    """A folder with a tokenizer."""
    (tmp_path / "like").mkdir()
    shutil.copy(models[0] / "config.json", tmp_path / "like")
    vocab = {f"t{i}": i for i in range(VOCABULARY - 1)}
    added = [{"id": VOCABULARY - 1, "content": "<end>"}]
    whole = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": added}
    (tmp_path / "like" / "tokenizer.json").write_text(json.dumps(whole))
    return tmp_path / "like"


@pytest.fixture
def export(models, like, to_huggingface, tmp_path):
    return lambda **settings: to_huggingface(models[1], tmp_path / "out", like=like, **settings)


def refused(export, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        export()
    assert "\n" not in str(error.value)


def test_folders_beside_the_files_are_passed_over(like, export, models, command, tmp_path):
    """A folder `tokenizer/` ended in a traceback; templates in a folder were left behind."""
    (like / "tokenizer_old").mkdir()
    (like / "tokenizer_old" / "tokenizer.json").write_text("{}")
    (like / "additional_chat_templates").mkdir()
    (like / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    out = export()
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").is_file() and not (out / "tokenizer_old").exists()


@pytest.mark.slow
def test_command_line_says_what_was_copied(like, models, command, tmp_path):
    (like / "tokenizer").mkdir()
    done = command("export", "--input", models[1], "--output", tmp_path / "out", "--like", like)
    assert done.returncode == 0 and f"copied from {like}: tokenizer.json" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("config", "vocab", "message"),
    [
        ({"eos_token_id": VOCABULARY}, {}, "eos_token_id is 96, the model has 96 rows of text"),
        ({"eos_token_id": [2, 500]}, {}, "eos_token_id is 500"),
        ({"bos_token_id": "1"}, {}, "bos_token_id is '1'"),
        ({}, {"far": VOCABULARY}, "its tokenizer has ids up to 96, the model has 96 rows of text: give"),
    ],
)
def test_ids_without_a_row_are_refused(config, vocab, message, like, export):
    """The tokenizer of another vocabulary was put beside a model that has no rows for its ids."""
    before = json.loads((like / "config.json").read_text())
    (like / "config.json").write_text(json.dumps(before | config))
    whole = json.loads((like / "tokenizer.json").read_text())
    whole["model"]["vocab"] |= vocab
    (like / "tokenizer.json").write_text(json.dumps(whole))
    refused(export, message)


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {"vocab": {"a": "b"}}}', '{"added_tokens": [5]}'])
def test_a_broken_tokenizer_is_refused(content, like, export):
    (like / "tokenizer.json").write_text(content)
    refused(export, "--like .*tokenizer.json ")


def test_what_is_no_file_is_refused(like):
    """A link whose file was missing ended in a traceback, and a named pipe would be waited for."""
    (like / "vocab.json").symlink_to("gone")
    with pytest.raises(UsageError, match=r"--like .*vocab.json is a link to gone, which is not there"):
        companion_files(like)
    os.mkfifo(like / "tokenizer.model")
    with pytest.raises(UsageError, match=r"--like .*tokenizer.model is no regular file"):
        companion_files(like)
    with pytest.raises(UsageError, match=r"--like .*nowhere is no folder"):
        companion_files(like / "nowhere")


def test_files_that_disagree_are_refused(like, export):
    """A vocab.json of another model was copied beside the tokenizer.json that the transformers library reads."""
    (like / "vocab.json").write_text(json.dumps({"t0": 0, "t2": 1}))
    refused(export, "vocab.json gives 't2' the id 1, and tokenizer.json, .*it gives 't2' the id 2; remove the file")

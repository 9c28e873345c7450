"""Tokenizers on disk: SentencePiece models and Hugging Face folders, the byte-level one included.

Only the tokenizer libraries are imported, so that worker processes start fast. Ids are those of the tokenizer that
Megatron builds from `training_flags` (compared in the tests).
"""

from pathlib import Path
from typing import Protocol

from megatron_ksa.errors import UsageError

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What preprocessing needs of a tokenizer."""

    vocab_size: int
    end_of_document: int
    training_flags: str

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without special tokens."""

    def encode_content(self, text: str) -> list[int]:
        """Token ids of what a person wrote: names of special tokens in it are text."""

    def render_chat(self, messages: list[dict], tools: list[dict] | None = None, *, asked: bool = False) -> str:
        """The tokenizer's own chat template applied to messages {"role", "content", ...}.

        Args:
            tools: what an assistant may call.
            asked: end with what the template writes before a response (`add_generation_prompt`).

        Raises:
            UsageError: the tokenizer has no template.
            ChatTemplateError: the template refuses these messages.
        """


class ChatTemplateError(Exception):
    """A chat template refuses some messages; the message tells why."""


class SentencePieceTokenizer:
    """A SentencePiece model file; documents end with its `</s>`."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UsageError(f"--tokenizer-model {path}: not a SentencePiece model ({error})") from None
        self.vocab_size = self._model.get_piece_size()
        self.end_of_document = self._model.eos_id()
        self.training_flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {path}"
        self.encode = self.encode_content = self._model.encode
        self._path = path

    def render_chat(self, messages: list[dict], tools: list[dict] | None = None, *, asked: bool = False) -> str:
        """A SentencePiece model has no chat template."""
        raise UsageError(f"--template: {self._path}, a SentencePiece model, has no chat template; choose another")

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._path


class HuggingFaceTokenizer:
    """A folder with `tokenizer.json`; documents end with the `eos_token` of its `tokenizer_config.json`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"--tokenizer-model {folder}: {error}") from None
        if self._tokenizer.eos_token_id is None:
            raise UsageError(f"--tokenizer-model {folder}: name an eos_token in its tokenizer_config.json")
        self.vocab_size = len(self._tokenizer)
        self.end_of_document = self._tokenizer.eos_token_id
        self.training_flags = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"
        self._folder = folder

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def encode_content(self, text: str) -> list[int]:
        """Token ids of what a person wrote: names of special tokens in it are text."""
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False, split_special_tokens=True)

    def render_chat(self, messages: list[dict], tools: list[dict] | None = None, *, asked: bool = False) -> str:
        """The tokenizer's own chat template applied to the messages."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise UsageError(f"--template: the tokenizer {self._folder} has no chat template; choose another")
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=asked
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ChatTemplateError(" ".join(str(error).split())) from None

    @property
    def fast(self):
        """The `transformers` tokenizer."""
        return self._tokenizer


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer at a path: a SentencePiece `.model` file, a Hugging Face folder, or its `tokenizer.json`.

    Raises:
        UsageError: nothing there, or nothing that loads.
    """
    path = Path(model)
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UsageError(f"--tokenizer-model {model}: the folder has no tokenizer.json")
        return HuggingFaceTokenizer(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    raise UsageError(f"--tokenizer-model {model}: no such file or folder; tools/train_tokenizer.py makes one")


def write_byte_level(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes and an end of document, as a Hugging Face folder."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = FastTokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # A document's own "<|endoftext|>" is text; only preprocessing ends documents.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, split_special_tokens=True)
    fast.save_pretrained(folder)


def train_sentencepiece(texts, output_prefix: Path, vocab_size: int, threads: int) -> None:
    """Train a SentencePiece BPE model with byte fallback that keeps white space, written to `output_prefix`.model.

    Args:
        texts: iterable of str, the sample to train on.

    Raises:
        UsageError: a vocabulary that the sample cannot fill.
    """
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(output_prefix),
            model_type="bpe",
            vocab_size=vocab_size,
            num_threads=threads,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(f"--vocab-size {vocab_size}: {error}") from None

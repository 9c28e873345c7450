"""Tokenizers on disk: SentencePiece models and Hugging Face folders, the byte-level one included.

Only the tokenizer libraries are imported, so that worker processes start fast. Ids are those of the tokenizer that
Megatron builds from `training_flags` (compared in the tests).

Documents are encoded with `encode_content`, where nothing that a person wrote becomes a control token: names of special
tokens, and of other tokens that were added in the form of markers such as `<|im_end|>` or `[SEP]`, are text there.
"""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from megatron_ksa.data_tools.content_encoder import ContentEncoder, encoded_or_none
from megatron_ksa.data_tools.plain_encoding import ChatTemplateError, NoTokenError, plain_encoding, without_losses
from megatron_ksa.data_tools.vocabularies import TOKENIZER, token_ids
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

# A text that tells tokenizers apart.
PROBE = "The cat, 12345 cafés;\nnext  LINE's end"
END_OF_DOCUMENT = "<|endoftext|>"
# Added tokens of this form mean something to a model, whether or not their tokenizer calls them special.
_MARKER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_LONGEST_SENTENCE = 1 << 20


class Tokenizer(Protocol):
    """What preprocessing needs of a tokenizer.

    `vocab_size` counts its tokens; every id is below it. `unknown` is the id that stands for what the tokenizer cannot
    write, or None. `training_flags` are those of `pretrain_gpt.py`. `imports` are the modules that loading it imports.
    """

    imports: ClassVar[tuple[str, ...]]
    vocab_size: int
    unknown: int | None
    training_flags: str

    @property
    def end_of_document(self) -> int:
        """Id that ends a document.

        Raises:
            UsageError: the tokenizer has none.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of markup: names of special tokens mean those tokens."""

    def encode_content(self, text: str) -> list[int]:
        """Token ids of what a person wrote: names of special tokens in it are text.

        Raises:
            ContentError: the tokenizer has no tokens for this text.
        """

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; a character that is cut through is shown as a replacement character."""

    def render_chat(self, messages: list[dict], tools: list[dict] | None = None, *, asked: bool = False) -> str:
        """The tokenizer's own chat template applied to messages {"role", "content", ...}.

        Args:
            tools: what an assistant may call.
            asked: end with what the template writes before a response (`add_generation_prompt`).

        Raises:
            UsageError: the tokenizer has no template, or one that cannot be read.
            ChatTemplateError: the template refuses these messages.
        """


def _check_ids(path: Path, largest: int, vocab_size: int) -> None:
    """Refuse ids that a model of this vocabulary has no embedding for, and that a dataset would store as others."""
    if largest >= vocab_size:
        raise UsageError(
            f"--tokenizer-model {path}: it has {vocab_size:,} tokens, but ids up to {largest:,}; training builds "
            f"embeddings for {vocab_size:,}: number the added tokens without gaps"
        )


class SentencePieceTokenizer:
    """A SentencePiece model file; documents end with its `</s>`."""

    imports: ClassVar[tuple[str, ...]] = ("sentencepiece.sentencepiece_model_pb2",)

    def __init__(self, path: Path) -> None:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
            model: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
            content = model.FromString(path.read_bytes())
        except (RuntimeError, OSError, DecodeError) as error:
            raise UsageError(f"--tokenizer-model {path}: not a SentencePiece model ({error})") from None
        self.vocab_size = self._model.get_piece_size()
        self.training_flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {path}"
        self.encode = self._model.encode
        self.unknown = self._model.unk_id()
        self._end, self._path = self._model.eos_id(), path
        kinds = model.SentencePiece
        control = {id: piece.piece for id, piece in enumerate(content.pieces) if piece.type == kinds.CONTROL}
        for id, piece in enumerate(content.pieces):
            if piece.type == kinds.USER_DEFINED and (id == self._end or _MARKER.fullmatch(piece.piece)):
                # An unused piece keeps its id, and no text becomes it.
                piece.type = kinds.UNUSED
                control[id] = piece.piece
        try:
            processor = SentencePieceProcessor(model_proto=content.SerializeToString())
        except RuntimeError as error:
            raise UsageError(f"--tokenizer-model {path}: not a SentencePiece model ({error})") from None
        self.encode_content = ContentEncoder(processor.encode, self._byte, control)

    def _byte(self, name: str) -> int | None:
        id = self._model.piece_to_id(name)
        return id if self._model.is_byte(id) else None

    @property
    def end_of_document(self) -> int:
        """Id of `</s>`; a model may have none."""
        if self._end < 0:
            raise UsageError(
                f"--tokenizer-model {self._path} has no end-of-document piece (eos_id is {self._end}): train one with "
                "--eos_id, or pass --no-append-eod to tools/preprocess_data.py"
            )
        return self._end

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return self._model.decode(ids)

    def render_chat(self, messages: list[dict], tools: list[dict] | None = None, *, asked: bool = False) -> str:
        """A SentencePiece model has no chat template."""
        raise UsageError(f"--template: {self._path}, a SentencePiece model, has no chat template; choose another")

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._path


def _without_dropout(tokenizer: "FastTokenizer") -> "FastTokenizer":
    """The tokenizer, changed in place: BPE dropout would give other tokens in every run."""
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


class HuggingFaceTokenizer:
    """A folder with `tokenizer.json`; documents end with the `eos_token` of its `tokenizer_config.json`."""

    imports: ClassVar[tuple[str, ...]] = ("transformers.models.auto.tokenization_auto",)

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        token_ids(folder, "--tokenizer-model")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the libraries have no kind of their own for files that are broken
            said = " ".join(str(error).split())[:500]
            raise UsageError(f"--tokenizer-model {folder} cannot be loaded: {type(error).__name__}: {said}") from None
        _without_dropout(self._tokenizer.backend_tokenizer)
        self.vocab_size = len(self._tokenizer)
        _check_ids(folder, max(self._tokenizer.get_vocab().values(), default=-1), self.vocab_size)
        self.unknown: int | None = None
        self.training_flags = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"
        self._folder = folder
        self.encode_content = self._content_encoder()

    def _content_encoder(self) -> ContentEncoder:
        from tokenizers import Tokenizer as FastTokenizer

        whole = json.loads(self._tokenizer.backend_tokenizer.to_str())
        self._check_class(_without_dropout(FastTokenizer.from_file(str(self._folder / TOKENIZER))))
        # The class may split texts otherwise than the file: Llama's loses the space that a text starts with.
        description = json.loads((self._folder / TOKENIZER).read_text(encoding="utf-8"))
        whole |= {"normalizer": description.get("normalizer"), "pre_tokenizer": description.get("pre_tokenizer")}
        whole = without_losses(whole)
        control = dict(zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=True))
        for token in whole["added_tokens"]:
            # White space beside a token in a text is text.
            token["lstrip"] = token["rstrip"] = False
            token["special"] = token["special"] or token["id"] in control or bool(_MARKER.fullmatch(token["content"]))
            if token["special"]:
                control[token["id"]] = token["content"]
        plain = FastTokenizer.from_str(json.dumps(whole))
        plain.encode_special_tokens = True
        # What the model writes: `unk_token` of tokenizer_config.json does not change that.
        model = whole["model"]
        unknown = model["unk_id"] if "unk_id" in model else plain.token_to_id(model.get("unk_token") or "")
        if unknown is not None and unknown != self._tokenizer.eos_token_id:
            self.unknown = unknown
            control.pop(unknown, None)
        return ContentEncoder(lambda text: plain_encoding(plain, text).ids, plain.token_to_id, control)

    def _check_class(self, file: "FastTokenizer") -> None:
        """Refuse a class that makes other tokens than the file of the same folder does."""
        if encoded_or_none(lambda text: plain_encoding(file, text).ids, PROBE) != encoded_or_none(self.encode, PROBE):
            raise UsageError(
                f"--tokenizer-model {self._folder}: transformers makes a {type(self._tokenizer).__name__} of it, which "
                f"gives other tokens than its {TOKENIZER}: give tokenizer_class PreTrainedTokenizerFast in "
                "tokenizer_config.json, and no model_type of another family in config.json"
            )

    @property
    def end_of_document(self) -> int:
        """Id of the `eos_token`; a tokenizer may have none."""
        if self._tokenizer.eos_token_id is None:
            raise UsageError(
                f"--tokenizer-model {self._folder}: name an eos_token in its tokenizer_config.json, or pass "
                "--no-append-eod to tools/preprocess_data.py"
            )
        return self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of markup: names of special tokens mean those tokens.

        Raises:
            NoTokenError: a part of the text has no token.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # the library has no kind of its own
            raise NoTokenError(error) from None

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return cast(str, self._tokenizer.decode(ids))  # a list of lists would give a list

    def render_chat(self, messages: list[dict], tools: list[dict] | None = None, *, asked: bool = False) -> str:
        """The tokenizer's own chat template applied to the messages."""
        from jinja2 import TemplateError, TemplateSyntaxError

        if self._tokenizer.chat_template is None:
            raise UsageError(f"--template: the tokenizer {self._folder} has no chat template; choose another")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=asked
            )
        except TemplateSyntaxError as error:
            raise UsageError(
                f"--template: the chat template of {self._folder}, line {error.lineno}: {error.message}"
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ChatTemplateError(" ".join(str(error).split())) from None
        return str(text)

    @property
    def fast(self):
        """The `transformers` tokenizer."""
        return self._tokenizer


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer at a path: a SentencePiece `.model` file, a Hugging Face folder, or its `tokenizer.json`.

    Raises:
        UsageError: nothing there, nothing that loads, or ids at or above the number of tokens.
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


def train_sentencepiece(texts: Iterable[str], output_prefix: Path, vocab_size: int, threads: int) -> None:
    """Train a SentencePiece BPE model with byte fallback that keeps white space.

    Args:
        texts: the sample to train on; longer texts than a sentence may be are cut.
        output_prefix: the model is `output_prefix`.model, and appears when it is whole.

    Raises:
        UsageError: a vocabulary that the sample cannot fill, or a disk that is full.
    """
    import sentencepiece

    # Characters have up to four bytes; the trainer passes over longer sentences without a word.
    step = _LONGEST_SENTENCE // 4
    sentences = (text[at : at + step] for text in texts for at in range(0, len(text), step))
    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=made,
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
            max_sentence_length=_LONGEST_SENTENCE,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(f"--vocab-size {vocab_size}: {error}") from None
    # The trainer itself does not notice a full disk, and leaves a model that is cut.
    with whole_file(output_prefix.with_name(f"{output_prefix.name}.model"), "wb") as stream:
        stream.write(made.getvalue())


def tokens_of(tokenizer: Tokenizer, text: str, what: str) -> list[int]:
    """`encode` of a text that a user gives, for programs that end where it cannot be encoded.

    Args:
        what: names the text in the error.

    Raises:
        UsageError: half of a surrogate pair, which JSON can escape and a command line's bytes become; a part of the
            text has no token.
    """
    try:
        text.encode("utf-8")
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is no UTF-8 text: {error.reason} at character {error.start}") from None
    except NoTokenError as error:
        raise UsageError(f"{what}: {error}") from None


def known_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of ids that a model wrote; embeddings are often padded beyond the tokenizer, which has no text for those."""
    return tokenizer.decode([each for each in ids if each < tokenizer.vocab_size])

"""A whole text to tokens at once, with the characters that each token stands for.

Tokens of a text are not the tokens of its parts: a word may span a seam, and some tokenizers put a space before each
part. So a conversation is encoded as one text, and what a person wrote in it must not become a control token all the
same. Where a content holds the name of one, the same tokenizer is used with its control tokens under other names: the
markup gets those names, the content keeps its own, which then are text.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_ksa.data_tools.plain_encoding import ChatTemplateError, plain_encoding, without_losses
from megatron_ksa.data_tools.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

# Control tokens get characters of the last private plane, which texts do not have.
FIRST_ALIAS = 0x100000
_NAME_OF_PIECE = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text.

    Args:
        ids: int32 [tokens].
        begin, end: int64 [tokens], first character of each token and the one after its last. A character of several
            tokens belongs to all or, with empty ranges, to the last of them.
    """

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    def overlap(self, spans: list[tuple[int, int]]) -> np.ndarray:
        """bool [tokens], whether a token has a character in one of the spans."""
        inside = np.zeros(len(self.ids), bool)
        last = np.maximum(self.end, self.begin + 1)
        for first, after in spans:
            inside |= (self.begin < after) & (last > first)
        return inside


class _Encoder(Protocol):
    """One tokenizer under its own or other names of control tokens."""

    def encode(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Ids, first characters and ends."""


class _HuggingFace:
    def __init__(self, description: dict, *, split_special_tokens: bool = False) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self._tokenizer = FastTokenizer.from_str(json.dumps(without_losses(description)))
        self._tokenizer.encode_special_tokens = split_special_tokens

    def encode(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Ids, first characters and ends."""
        encoding = plain_encoding(self._tokenizer, text)
        offsets = encoding.offsets
        return encoding.ids, [first for first, _ in offsets], [end for _, end in offsets]


class _SentencePiece:
    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_proto=model)

    def encode(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Ids, first characters and ends; the library counts bytes."""
        pieces = self._model.encode(text, return_type="proto").pieces
        lengths = np.fromiter((len(character.encode("utf-8")) for character in text), np.int64, len(text))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        begin, end = (
            np.searchsorted(starts, [getattr(piece, name) for piece in pieces]).tolist() for name in ("begin", "end")
        )
        return [piece.id for piece in pieces], begin, end


def _renamed_description(description: dict, names: dict[str, str]) -> dict:
    """A tokenizer's description with other names for some added tokens; ids stay."""
    changed = json.loads(json.dumps(description))
    for token in changed["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = changed["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return changed


class WholeText:
    """Encodes whole texts with a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._renamed: _Encoder
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._init_hugging_face(tokenizer)
        elif isinstance(tokenizer, SentencePieceTokenizer):
            self._init_sentencepiece(tokenizer)
        else:
            raise TypeError(f"no whole-text encoding for a {type(tokenizer).__name__}")
        longest_first = sorted(self.names, key=len, reverse=True)
        self._any_name = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _init_hugging_face(self, tokenizer: HuggingFaceTokenizer) -> None:
        fast = tokenizer.fast
        description = json.loads(fast.backend_tokenizer.to_str())
        split = bool(fast.split_special_tokens)
        special = set(fast.all_special_tokens)
        added = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
        added |= {token["content"]: token["id"] for token in description["added_tokens"] if token["content"] in special}
        # A tokenizer that splits the names of special tokens has none that a text could become.
        self.names = {} if split else {name: chr(FIRST_ALIAS + i) for i, name in enumerate(sorted(added))}
        self._control = set() if split else set(added.values())
        self._plain: _Encoder = _HuggingFace(description, split_special_tokens=split)
        self._renamed = _HuggingFace(_renamed_description(description, self.names), split_special_tokens=split)

    def _init_sentencepiece(self, tokenizer: SentencePieceTokenizer) -> None:
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
        model, kind = proto.FromString(tokenizer.path.read_bytes()), proto.SentencePiece.USER_DEFINED
        markers = [
            (id, piece)
            for id, piece in enumerate(model.pieces)
            if piece.type == kind and _NAME_OF_PIECE.fullmatch(piece.piece)
        ]
        self._plain = _SentencePiece(model.SerializeToString())
        self.names = {piece.piece: chr(FIRST_ALIAS + i) for i, (_, piece) in enumerate(markers)}
        self._control = {id for id, _ in markers}
        for _, piece in markers:
            piece.piece = self.names[piece.piece]
        self._renamed = _SentencePiece(model.SerializeToString())

    def has_name(self, text: str) -> bool:
        """Whether a text holds the name of a control token."""
        return self._any_name.search(text) is not None

    def hide_names(self, text: str, stand_in: dict[str, str]) -> str:
        """The text with each name of a control token replaced by what `stand_in` has for it."""
        return self._any_name.sub(lambda found: stand_in[found[0]], text)

    def encode(self, text: str, as_text: list[tuple[int, int]] | None = None) -> Tokens:
        """Tokens of the text.

        Args:
            as_text: spans, rising, in which the names of control tokens are text; elsewhere they mean the tokens.

        Raises:
            ChatTemplateError: a text that has no UTF-8, or that this tokenizer reads as a control token all the same.
        """
        try:
            # A lone surrogate, which JSON can escape, has no bytes to tokenise.
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ChatTemplateError(f"invalid UTF-8 ({error.reason})") from None
        if not as_text:
            ids, begin, end = self._plain.encode(text)
            return Tokens(np.array(ids, np.int32), np.array(begin, np.int64), np.array(end, np.int64))
        return self._encode_with_text(text, as_text)

    def _encode_with_text(self, text: str, as_text: list[tuple[int, int]]) -> Tokens:
        if any(chr(FIRST_ALIAS) <= character < chr(FIRST_ALIAS + len(self.names)) for character in text):
            raise ChatTemplateError(
                "a content has characters of the last private plane and the name of a control token"
            )
        spans, parts, places, at = list(as_text), [], [], 0
        control = 0
        for found in self._any_name.finditer(text):
            while spans and spans[0][1] <= found.start():
                spans.pop(0)
            if spans and spans[0][0] < found.end():
                if not spans[0][0] <= found.start() or found.end() > spans[0][1]:
                    raise ChatTemplateError(f"{found[0]!r} is half markup and half content")
                continue
            parts += [text[at : found.start()], self.names[found[0]]]
            places += [*range(at, found.start()), found.start()]
            at, control = found.end(), control + 1
        parts.append(text[at:])
        places += [*range(at, len(text)), len(text)]
        ids, begin, end = self._renamed.encode("".join(parts))
        if sum(id in self._control for id in ids) != control:
            raise ChatTemplateError("a content has a text that this tokenizer reads as a control token")
        place = np.array(places, np.int64)
        first, last = np.array(begin, np.int64), np.array(end, np.int64)
        # The end of an alias is the end of the name it stands for: the place of the character after it.
        return Tokens(np.array(ids, np.int32), place[first], np.where(last > first, place[last], place[first]))

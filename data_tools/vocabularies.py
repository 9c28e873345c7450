"""Token ids in the files of a tokenizer folder, which should all say the same.

`tokenizer.json` is the one that counts: the transformers library, and with it Megatron and this project, read it and
pass over `tokenizer.model`, `vocab.json` and `added_tokens.json` beside it.
"""

from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_json

TOKENIZER = "tokenizer.json"
# The largest tokenizer.json that is published has 35 MB.
MAX_BYTES = 500_000_000


def token_ids(folder: Path, flag: str) -> dict[str, int] | None:
    """Every token of `tokenizer.json` with its id; None where there is no such file, or of a kind without ids.

    Args:
        flag: what named the folder, for errors.

    Raises:
        UsageError: a file that is broken, or files of the folder that give a token different ids.
    """
    if not (folder / TOKENIZER).is_file():
        return None
    whole = read_json(folder / TOKENIZER, flag, MAX_BYTES)
    model, added = whole.get("model"), whole.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        # Unigram models have a list of pieces with their scores.
        base = {piece[0]: id for id, piece in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab or {})
        special = {token["content"]: token["id"] for token in added}
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise UsageError(f"{flag} {folder / TOKENIZER} is no tokenizer: {error!r}") from None
    tokens = {**base, **special}
    if not all(isinstance(id, int) for id in tokens.values()):
        raise UsageError(f"{flag} {folder / TOKENIZER} is no tokenizer: ids are integers")
    _compare(folder, tokens, set(special.values()), flag)
    return tokens


def _compare(folder: Path, tokens: dict[str, int], renamed: set[int], flag: str) -> None:
    """Compare the other files, apart from ids that `tokenizer.json` gives to added tokens: some models rename those."""
    by_id = {id: token for token, id in tokens.items()}
    for name, read in (("tokenizer.model", _pieces), ("vocab.json", _vocabulary), ("added_tokens.json", _vocabulary)):
        path = folder / name
        other = read(path, flag) if path.is_file() else {}
        for token, id in other.items():
            here = tokens.get(token)
            # A token of its own in added_tokens.json is added to the others.
            alike = here == id or id in renamed or (here is None and id not in by_id and name.startswith("added"))
            if not alike:
                said = f"it has no {token!r}" if here is None else f"it gives {token!r} the id {here}"
                raise UsageError(
                    f"{flag} {folder}: {name} gives {token!r} the id {id}, and {TOKENIZER}, which the transformers "
                    f"library reads, says otherwise: {said}; remove the file that is wrong"
                )


def _vocabulary(path: Path, flag: str) -> dict[str, int]:
    return read_json(path, flag, MAX_BYTES)


def _pieces(path: Path, flag: str) -> dict[str, int]:
    """Pieces of a SentencePiece model; none of another format that goes by the same name (Llama 3's ranks)."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        # The class is made when the module is imported.
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    except (DecodeError, OSError):
        return {}
    return {piece.piece: id for id, piece in enumerate(model.pieces)}

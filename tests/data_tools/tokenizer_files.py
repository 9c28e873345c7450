"""Tokenizers of every kind that the data tools read, small enough to be made in a test."""

import io
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SAMPLE = [f"Line {i} of a text with words, numbers {i * i} and a <table> of [things].\n" for i in range(400)]


def sentencepiece_model(path: Path, **options: object) -> Path:
    """A SentencePiece BPE model that loses nothing, unless the options say otherwise."""
    made = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
        "character_coverage": 1.0, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE), model_writer=made, **{**settings, **options}
    )
    path.write_bytes(made.getvalue())
    return path


def byte_level_tokenizer(folder: Path, added: list[AddedToken | str] = (), **options: object) -> Path:
    """A Hugging Face folder of the 256 bytes, with more tokens; names of special tokens in a text mean those tokens.

    This is how GPT-2, Llama 3 and Qwen tokenizers behave when they are asked for nothing else.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|endoftext|>", **options})
    fast.save_pretrained(folder)
    return folder


def llama_tokenizer(folder: Path) -> Path:
    """A Hugging Face folder like Llama 2's: spaces as U+2581, one before the text, other characters as bytes."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for character in "▁abcdefghijklmnopqrstuvwxyz":
        vocab[character] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder

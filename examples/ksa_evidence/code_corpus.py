"""Real code as an indexed dataset, from Debian's source packages: text that no language of ours was made for.

    python examples/ksa_evidence/code_corpus.py --output data/code --tokens 12000000

Source packages come from Debian's archive by `apt-get` with lists of its own; a SentencePiece model is trained on them.
Ids begin at --first-id, so that a model can read this text beside the language of token ids, whose ids lie below. The
last files are held out: PREFIX_validation.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.evaluation.token_language import VOCABULARY
from megatron_ksa.files import whole_file, writing

PACKAGES = ("redis", "sqlite3", "python3.11", "lua5.4", "nginx", "git", "zstd", "curl", "postgresql-15", "tcl8.6")
ENDINGS = (".c", ".h", ".py", ".lua", ".tcl", ".sql", ".sh", ".pl")
# Generated tables and minified files teach nothing: longer lines than this are not code that a person wrote.
LONGEST_LINE = 400
HELD_OUT = 0.03


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="prefix of the datasets and the tokenizer")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="Debian source packages")
    parser.add_argument("--mirror", help="archive and release, such as 'URI bookworm'; this machine's without it")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="tokens to write, at most")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer")
    parser.add_argument("--first-id", type=int, default=VOCABULARY, help="id of the first piece")
    parser.add_argument("--seed", type=int, default=0, help="of the order of files")
    return parser.parse_args()


def mirror() -> str:
    """Address and release of the archive that this machine installs from.

    Raises:
        UsageError: apt knows no archive of Debian.
    """
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(ORIGIN)", "Created-By: Packages"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    for line in lines:
        uri, codename, *origin = line.split() or ("", "")
        if origin == ["Debian"] and "-" not in codename:
            return f"{uri} {codename}"
    raise UsageError("apt knows no archive of Debian on this machine: give --mirror 'URI RELEASE'")


def download(args: argparse.Namespace, folder: Path) -> list[Path]:
    """Upstream archives of the source packages.

    Raises:
        UsageError: apt-get failed.
    """
    lists = folder / "lists" / "partial"
    lists.mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    sources.write_text(f"deb-src {args.mirror or mirror()} main\n", encoding="utf-8")
    options = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Etc::SourceList={sources}",
               "-o", "Dir::Etc::SourceParts=/dev/null"]  # fmt: skip
    for words in (["update"], ["source", "--download-only", *args.packages]):
        done = subprocess.run(
            ["apt-get", "-qq", *options, *words], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UsageError(f"apt-get {words[0]} failed: {done.stderr.strip().splitlines()[-1:]}; see --mirror")
    return sorted(path for path in folder.glob("*.tar.*") if ".debian." not in path.name and path.suffix != ".asc")


def code_files(archives: list[Path]) -> Iterator[str]:
    """Texts of the source files inside the archives."""
    for archive in archives:
        with tarfile.open(archive) as opened:
            for member in opened:
                if not member.isfile() or not member.name.endswith(ENDINGS) or not 500 < member.size < 500_000:
                    continue
                try:
                    text = opened.extractfile(member).read().decode("utf-8")
                except UnicodeDecodeError:
                    continue
                if max(map(len, text.splitlines()), default=0) <= LONGEST_LINE:
                    yield text


def train_tokenizer(texts: list[str], output: Path, vocab_size: int):
    """A SentencePiece model that keeps blanks and line ends, and spells unknown characters in bytes."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line + "\n" for text in texts for line in text.splitlines()), model_writer=made,
        vocab_size=vocab_size, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, split_by_whitespace=True,
        user_defined_symbols=["\n", "\t"], input_sentence_size=400_000, shuffle_input_sentence=True,
        minloglevel=2,
    )  # fmt: skip
    with whole_file(output.with_name(f"{output.name}.model"), "wb") as stream:
        stream.write(made.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def main() -> None:
    """Download, train the tokenizer, write; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        folder = args.output.with_name(args.output.name + "_sources")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            texts = list(code_files(download(args, folder)))
        random.Random(args.seed).shuffle(texts)
        model = train_tokenizer(texts, args.output, args.vocab_size)
        with whole_file(args.output.with_suffix(".json")) as stream:
            json.dump({"vocabulary": args.first_id + args.vocab_size, "packages": list(args.packages)}, stream)
        vocabulary, held_out = args.first_id + args.vocab_size, round(len(texts) * HELD_OUT)
        for suffix, part, limit in (("_validation", texts[:held_out], 500_000), ("", texts[held_out:], args.tokens)):
            prefix, written, files = f"{args.output}{suffix}", 0, 0
            with IndexedDatasetWriter(prefix, vocabulary, overwrite=True) as writer:
                for text in part:
                    ids = [args.first_id + piece for piece in (*model.encode(text), model.eos_id())]
                    writer.add_document(ids)
                    written, files = written + len(ids), files + 1
                    if written >= limit:
                        break
            print(f"{prefix}: {files:,} files, {written:,} tokens, ids {args.first_id} to {vocabulary - 1}")


if __name__ == "__main__":
    main()

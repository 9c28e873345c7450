"""Real pools with known labels, from packages: what `tags_objective` judges selections on.

    python -m megatron_ksa.data_tools.benchmarks.tags_pools --out DIR [--pools reasoning-a wordnet ...]

- reasoning-a, reasoning-b, reasoning-c: tasks with answers of `pip install reasoning-gym`, each pool half of its about
  100 kinds: every second one, the rest, and a half by chance. Label: the kind. True tags: the kind and its family.
- wordnet: glosses of nouns (`apt-get download wordnet-base`). Label: the ancestor on the sixth level. True tags: the
  three concepts above.
- verbs: glosses of verbs by WordNet file (the label), tagged with the verbs above.
- foldoc: entries of a dictionary of computing (`apt-get download dict-foldoc`). Label: the first of its categories.
  True tags: the categories and up to three entries that it refers to.
- fortunes: short texts (`apt-get download fortunes`). Label and only true tag: the file.
- debian: descriptions of packages of Debian's lists, one a source. Label: the section. True tags: debtags.
- sections: descriptions of packages without debtags. Label and only true tag: the section.
- webster: entries of a dictionary (`apt-get download dict-gcide`). Label: the first of its fields, such as Botany. True
  tags: its fields.
- sayings: short texts in eight languages (`apt-get download fortunes-bg fortunes-br ...`). Label and only true tag: the
  language with the file.
- mixed: tasks of the kinds of reasoning-b with another seed, verbs, and descriptions without debtags, whose only tag is
  the section.
- reasoning-words: the texts and scores of reasoning-c. True tags: the kind and the words of its name.
- several-words and others: made up (`tags_several`).

Labels of real texts are as frequent as rank^-1 as far as their texts reach. A score is drawn for every text: normal
with standard deviation 1.5 around 6.5 plus its label's own offset of standard deviation 0.7, between 1 and 10. Each
pool is a `pool.jsonl` of records with `label`, `tags` and `quality`.
"""

import argparse
import gzip
import importlib
import json
import re
import subprocess
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.benchmarks.tags_several import SEVERAL, several
from megatron_ksa.data_tools.tags.files import read_jsonl, write_jsonl
from megatron_ksa.errors import UsageError, usage_errors_exit

REASONING = ("reasoning-a", "reasoning-b", "reasoning-c")
POOLS = (
    *REASONING, "wordnet", "verbs", "debian", "sections", "foldoc", "fortunes", "mixed", "webster", "sayings",
    "reasoning-words", *SEVERAL,
)  # fmt: skip
LANGUAGES = ("bg", "br", "cs", "de", "es", "it", "pl", "ru")
INSTANCES = 12_000
SECONDS_A_KIND = 20
WORDNET_LEVEL = 5
QUALITY, LABEL_SPREAD, NOISE = 6.5, 0.7, 1.5


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def reasoning(part: int, count: int, seed: int, only: set[str] | None = None) -> Iterator[dict]:
    """Tasks of half of the kinds, up to `count` a kind.

    Args:
        part: 0 or 1 for the first or second of each pair of kinds, 2 for a half by chance.
        only: those of these kinds; all by default.
    """
    try:
        gym = importlib.import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise UsageError("the reasoning pools need a package: pip install reasoning-gym") from None
    kinds = sorted(gym.factory.DATASETS)
    if part == 2:
        kinds = sorted(np.random.default_rng(part).permutation(kinds)[: len(kinds) // 2].tolist())
    else:
        kinds = kinds[part::2]
    for kind in (kind for kind in kinds if only is None or kind in only):
        start = time.monotonic()
        try:
            tasks = gym.create_dataset(kind, size=count, seed=seed)
        except AssertionError:
            continue  # a composite of other kinds
        family = gym.factory.DATASETS[kind][0].__module__.split(".")[1]
        for number in range(count):
            if time.monotonic() - start > SECONDS_A_KIND:
                break
            task = tasks[number]
            turns = [("user", task["question"]), ("assistant", str(task["answer"]))]
            messages = [{"role": role, "content": text} for role, text in turns]
            yield {"messages": messages, "label": kind, "tags": [kind.replace("_", " "), family]}


def _synsets(path: Path) -> dict[int, tuple[list[str], list[int], str, str]]:
    """Words, offsets of hypernyms, gloss and lexicographer file of each synset of a WordNet data file."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields, _, gloss = line.partition(" | ")
        parts = fields.split()
        count = int(parts[3], 16)
        words = [word.replace("_", " ") for word in parts[4 : 4 + 2 * count : 2]]
        pointers = parts[5 + 2 * count :]
        above = [int(pointers[n + 1]) for n in range(0, len(pointers) - 3, 4) if pointers[n] in ("@", "@i")]
        found[int(parts[0])] = words, above, gloss.strip(), parts[1]
    return found


def _path(synsets: dict, offset: int) -> list[int]:
    """From the root to a synset, by first hypernyms."""
    path = [offset]
    while synsets[path[-1]][1]:
        path.append(synsets[path[-1]][1][0])
    return path[::-1]


def nouns(folder: Path) -> Iterator[dict]:
    """Glosses of nouns below the sixth level."""
    synsets = _synsets(folder / "data.noun")
    for offset, (words, _, gloss, _) in synsets.items():
        path = _path(synsets, offset)
        if len(path) > WORDNET_LEVEL + 1:
            tags = [synsets[each][0][0] for each in path[-4:-1]]
            yield {"text": f"{words[0]}: {gloss}", "label": synsets[path[WORDNET_LEVEL]][0][0], "tags": tags}


def verbs(folder: Path) -> Iterator[dict]:
    """Glosses of verbs by lexicographer file, tagged with the verbs above."""
    synsets = _synsets(folder / "data.verb")
    for offset, (words, _, gloss, file) in synsets.items():
        path = _path(synsets, offset)
        yield {
            "text": f"{words[0]}: {gloss}",
            "label": f"verb {file}",
            "tags": [synsets[each][0][0] for each in path[-3:]],
        }


def unpacked(package: str, work: Path) -> Path:
    """The files of a Debian package, fetched where they are not there."""
    folder = work / package
    if not folder.exists():
        done = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, check=False)
        archives = sorted(work.glob(f"{package}_*.deb"))
        if done.returncode or not archives:
            raise UsageError(f"this pool needs `apt-get download {package}`, which failed")
        subprocess.run(["dpkg-deb", "-x", archives[0], folder], check=True)
    return folder / "usr" / "share"


def foldoc(path: Path) -> Iterator[dict]:
    """Entries that have a category; the text has neither categories nor the marks of references."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as stream:
        blocks = re.split(r"\n\n(?=\S)", stream.read())
    for block in blocks:
        entry = re.match(r"([^\n]+)\n(?:\S[^\n]*\n)*\n +<([a-z ,]+)>(.*)", block, re.S)
        if entry:
            categories = [category.strip() for category in entry[2].split(",")]
            body = re.sub(r"\s+", " ", entry[3])
            references = [reference for reference in re.findall(r"{([^{}]+)}", body) if "http" not in reference]
            text = f"{entry[1]}: {re.sub('[{}]', '', body).strip()}"
            yield {"text": text, "label": categories[0], "tags": [*categories, *references[:3]]}


def fortunes(folder: Path) -> Iterator[dict]:
    """Texts of more than 5 words, by file."""
    for path in sorted(path for path in folder.iterdir() if not path.suffix):
        for text in re.split(r"^%$", path.read_text(encoding="utf-8", errors="replace"), flags=re.M):
            if len(text.split()) > 5:
                yield {"text": text.strip(), "label": path.name, "tags": [path.name.replace("-", " ")]}


def webster(path: Path) -> Iterator[dict]:
    """Entries that name a field; the text is without the names and the marks of sources."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as stream:
        blocks = re.split(r"\n\n(?=\S)", stream.read())
    for block in blocks:
        fields = re.findall(r"\(([A-Z][A-Za-z\"\\]{2,12}\.)\)", block)
        text = re.sub(r"\[[^\]]*\]|\([A-Z][A-Za-z\"\\]{2,12}\.\)|[{}]", "", block)
        if fields and len(text.split()) > 5:
            yield {"text": re.sub(r"\s+", " ", text).strip(), "label": fields[0], "tags": list(dict.fromkeys(fields))}


def sayings(work: Path) -> Iterator[dict]:
    """Texts of more than 5 words of several languages, by file."""
    for language in LANGUAGES:
        folder = unpacked(f"fortunes-{language}", work) / "games" / "fortunes"
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.suffix):
            label = f"{language} {path.name}"
            for text in re.split(r"^%$", path.read_text(encoding="utf-8", errors="replace"), flags=re.M):
                if len(text.split()) > 5:
                    yield {"text": text.strip(), "label": label, "tags": [label]}


def packages(work: Path) -> list[dict]:
    """Debian's packages: source, section, debtags and English description, one for each description."""
    lists, cache = work / "lists", work / "cache"
    options = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}", "-o", "Acquire::Languages=en"]
    if not any(lists.glob("*Translation-en*")):
        for folder in (lists / "partial", cache / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["apt-get", *options, "update"], capture_output=True, check=False).returncode:
            raise UsageError("the Debian pools need `apt-get update`, which failed")
    texts: dict[str, str] = {}
    for path in sorted(lists.glob("*Translation-en*")):
        content = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path], capture_output=True, check=True).stdout
        for block in content.decode("utf-8", "replace").split("\n\n"):
            digest = re.search(r"^Description-md5: (\w+)", block, re.M)
            text = re.search(r"^Description-en: (.*(?:\n .*)*)", block, re.M)
            if digest and text:
                texts[digest[1]] = re.sub(r"\n (?:\.$)?", "\n", text[1], flags=re.M).strip()
    available = subprocess.run(["apt-cache", *options, "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict] = {}
    for block in available.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): ?(.*(?:\n .*)*)", block, re.M))
        description = texts.get(fields.get("Description-md5", ""))
        if description and "Section" in fields:
            tags = [tag.strip() for tag in fields.get("Tag", "").replace("\n", "").split(",") if tag.strip()]
            source = fields.get("Source", fields["Package"]).split()[0]
            label = fields["Section"].rpartition("/")[2]
            found.setdefault(description, {"text": description, "label": label, "tags": tags, "source": source})
    # Packages of one source are near-copies: one of each.
    return list({row["source"]: row for row in found.values()}.values())


def debian(work: Path, tagged: bool) -> Iterator[dict]:
    """Descriptions with debtags, or those without."""
    for row in packages(work):
        tags = [
            tag.partition("::")[2].replace("-", " ")
            for tag in row["tags"]
            if not tag.startswith(("role::", "special::"))
        ]
        if bool(tags) == tagged:
            yield {"text": row["text"], "label": row["label"], "tags": tags or [row["label"]]}


def by_words(folder: Path) -> Iterator[dict]:
    """Rows of a pool of tasks, tagged with the kind and the words of its name."""
    for row in read_jsonl(folder / "pool.jsonl"):
        words = row["label"].split("_")
        own = {key: row[key] for key in ("messages", "label", "quality")}
        yield own | {"tags": list(dict.fromkeys([" ".join(words), *words]))}


def rows_of(pool: str, work: Path) -> list[dict]:
    """Every text that a pool could have."""
    if pool in REASONING:
        part = REASONING.index(pool)
        return list(reasoning(part, 400, 1 if part < 2 else 3))
    if pool == "foldoc":
        return list(foldoc(unpacked("dict-foldoc", work) / "dictd" / "foldoc.dict.dz"))
    if pool == "fortunes":
        return list(fortunes(unpacked("fortunes", work) / "games" / "fortunes"))
    if pool == "debian":
        return list(debian(work, tagged=True))
    if pool == "sections":
        return list(debian(work, tagged=False))
    if pool == "webster":
        return list(webster(unpacked("dict-gcide", work) / "dictd" / "gcide.dict.dz"))
    if pool == "sayings":
        return list(sayings(work))
    wordnet = unpacked("wordnet-base", work) / "wordnet"
    if pool == "wordnet":
        return list(nouns(wordnet))
    if pool == "verbs":
        return list(verbs(wordnet))
    return [*reasoning(1, 150, 2), *verbs(wordnet), *debian(work, tagged=False)]


def drawn(rows: Iterable[dict], generator: np.random.Generator, instances: int = INSTANCES) -> list[dict]:
    """Rows with scores, in any order, labels as frequent as rank^-1; labels of fewer than 8 rows are left out.

    Args:
        instances: how many, where labels have rows enough.
    """
    by_label = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    labels = generator.permutation(sorted(label for label, found in by_label.items() if len(found) >= 8))
    wanted = instances / (1.0 + np.arange(len(labels))) / (1 / (1.0 + np.arange(len(labels)))).sum()
    chosen = []
    for label, count in zip(labels, wanted, strict=True):
        found, offset = by_label[label], generator.normal(0, LABEL_SPREAD)
        for number in generator.permutation(len(found))[: max(8, round(count))]:
            score = float(np.clip(round(generator.normal(QUALITY + offset, NOISE)), 1, 10))
            chosen.append({**found[number], "quality": score})
    return [chosen[k] for k in generator.permutation(len(chosen)).tolist()]


def make_pool(pool: str, work: Path) -> Path:
    """Write `pool.jsonl` of one pool into its folder, unless it is there; returns the folder."""
    folder = work / pool
    if not (folder / "pool.jsonl").exists():
        generator = np.random.default_rng(_seed(pool))
        if pool == "reasoning-words":
            rows = list(by_words(make_pool("reasoning-c", work)))
        elif pool in SEVERAL:
            rows = drawn(several(SEVERAL[pool], generator), generator, SEVERAL[pool].instances)
        else:
            rows = drawn(rows_of(pool, work), generator)
        write_jsonl(folder / "pool.jsonl", ({"id": n, "source": pool, **row} for n, row in enumerate(rows)))
    return folder


def draw_scores(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Other scores for a pool, float64 [instances], drawn as `make_pool` draws them.

    Args:
        labels: int64 [instances].
    """
    offset = generator.normal(0, LABEL_SPREAD, int(labels.max()) + 1)
    return np.clip(np.round(generator.normal(QUALITY + offset[labels], NOISE)), 1, 10)


def labels_of(folder: Path) -> dict[str, str]:
    """Label of each record of a pool by its id."""
    with open(folder / "pool.jsonl", encoding="utf-8") as stream:
        rows = map(json.loads, stream)
        return {f"{row['source']}/{row['id']}": row["label"] for row in rows}


def main() -> None:
    """Make the pools; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, help="folder of the pools; what is there stays")
        parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS), help="which (default: all)")
        args = parser.parse_args()
        for pool in args.pools:
            folder = make_pool(pool, args.out)
            labels = list(labels_of(folder).values())
            print(f"{pool}: {len(labels):,} instances, {len(set(labels))} labels", flush=True)


if __name__ == "__main__":
    main()

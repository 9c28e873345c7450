"""The pool of `tags_pays_real`: tasks with answers, generated ones and real texts, and tasks that are held out.

- Tasks of `pip install reasoning-gym`, the kinds of the pool reasoning-b of `tags_pools`. Label: the kind. True tags:
  the kind and its family.
- Glosses of verbs of WordNet (`apt-get download wordnet-base`) and which kind of verb it is. True tags: verbs above.
- Descriptions of Debian's packages without debtags (`apt-get update`) and which section. True tag: the section.
- Entries of a dictionary of computing (`apt-get download dict-foldoc`) and their first category. True tags: the
  categories and up to three entries that it refers to.

The label of a text is its source with the answer. A question occurs once, so that none that is held out is in the pool.
Of each label 8 tasks are held out for the balanced set, 20 for a target that is evaluated, and 20 for the target that
the alignment sees; labels of fewer than 56 tasks are left out. Labels of the pool are as frequent as rank^-1 as far as
their tasks reach; scores are drawn as `tags_pools` draws them.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.benchmarks.tags_pools import debian, drawn, foldoc, reasoning, unpacked, verbs
from megatron_ksa.data_tools.tags.files import write_jsonl

NAME = "tasks"
REASONING_PART, REASONING_TASKS, REASONING_SEED = 1, 400, 1
SETS = {"balanced": 8, "target": 20, "aligned": 20}
FEWEST = 8
# WordNet's lexicographer files of verbs, from number 29 on.
VERBS = (
    "body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation", "emotion",
    "motion", "perception", "possession", "social", "stative", "weather",
)  # fmt: skip
FIRST_VERBS = 29


def asked(source: str, question: str, texts: Iterable[tuple[dict, str]]) -> Iterator[dict]:
    """Tasks made of texts: a row of `tags_pools` and its answer each."""
    for row, answer in texts:
        turns = [("user", f"{row['text']}\n{question}"), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        yield {"messages": messages, "label": f"{source} {answer}", "tags": row["tags"], "kind_of": source}


def tasks(work: Path) -> Iterator[dict]:
    """Every task, by source."""
    for row in reasoning(REASONING_PART, REASONING_TASKS, REASONING_SEED):
        yield {**row, "kind_of": "reasoning"}
    of_verbs = ((row, VERBS[int(row["label"].split()[1]) - FIRST_VERBS]) for row in verbs(_wordnet(work)))
    yield from asked("verb", "Which kind of verb is it?", of_verbs)
    sections = ((row, row["label"]) for row in debian(work, tagged=False))
    yield from asked("section", "Which section of Debian is it in?", sections)
    entries = foldoc(unpacked("dict-foldoc", work) / "dictd" / "foldoc.dict.dz")
    yield from asked("computing", "Which category of computing is it in?", ((row, row["label"]) for row in entries))


def _wordnet(work: Path) -> Path:
    return unpacked("wordnet-base", work) / "wordnet"


def split(rows: Iterable[dict], generator: np.random.Generator) -> tuple[list[dict], list[dict]]:
    """Tasks of the pool, and those that are held out with the name of their `set`; each question once."""
    by_label, seen = defaultdict(list), set()
    for row in rows:
        question = row["messages"][0]["content"]
        if question not in seen:
            seen.add(question)
            by_label[row["label"]].append(row)
    pool, held_out = [], []
    for label in sorted(by_label):
        found = by_label[label]
        if len(found) < sum(SETS.values()) + FEWEST:
            continue
        order = generator.permutation(len(found)).tolist()
        for name, count in SETS.items():
            held_out += [{**found[number], "set": name} for number in order[:count]]
            order = order[count:]
        pool += [found[number] for number in order]
    return pool, held_out


def make_tasks(work: Path) -> Path:
    """Write `held_out.jsonl` and `pool.jsonl` into the pool's folder, unless they are there; returns it."""
    folder = work / NAME
    if not (folder / "pool.jsonl").exists():
        generator = np.random.default_rng(zlib.crc32(NAME.encode()))
        pool, held_out = split(tasks(work), generator)
        write_jsonl(folder / "held_out.jsonl", ({"id": n, **row} for n, row in enumerate(held_out)))
        rows = drawn(pool, generator)
        write_jsonl(folder / "pool.jsonl", ({"id": n, "source": NAME, **row} for n, row in enumerate(rows)))
    return folder

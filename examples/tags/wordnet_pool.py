"""A second real pool with known topics: WordNet's nouns with their glosses, each with its lexicographer file, as JSONL.

Needs Debian's or Ubuntu's `apt`, which fetches the package wordnet-base (WordNet 3.0). Glosses of fewer than 15 words
are left out: they hold too few phrases for the offline tagger.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from debian_pool import fetch_lists

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_file, writing

# Lexicographer files 4 to 28 of lexnames(5WN); 3 holds the few nouns above all of them.
FILES = (
    "act animal artifact attribute body cognition communication event feeling food group location motive object person "
    "phenomenon plant possession process quantity relation shape state substance time"
).split()
FIRST_FILE = 4
WORDS = 15


def fetch_nouns(folder: Path) -> Path:
    """WordNet's `data.noun`, unpacked below a folder.

    Raises:
        UsageError: apt or dpkg is absent or fails.
    """
    options = fetch_lists(folder)
    try:
        subprocess.run(
            ["apt-get", *options, "download", "wordnet-base"], cwd=folder, check=True, capture_output=True, text=True
        )
        package = next(folder.glob("wordnet-base*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, folder / "wordnet"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise UsageError(f"{error.cmd[0]}: {error.stderr.strip()}") from None
    return folder / "wordnet" / "usr" / "share" / "wordnet" / "data.noun"


def nouns(path: Path) -> Iterator[dict]:
    """One record for each noun synset with a long gloss: id, source (the lexicographer file), text (wndb(5WN))."""
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if line.startswith(" "):
                continue
            data, _, gloss = line.partition("|")
            fields = data.split()
            number, count = int(fields[1]) - FIRST_FILE, int(fields[3], 16)
            if number >= 0 and len(gloss.split()) >= WORDS:
                words = ", ".join(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
                yield {"id": fields[0], "source": FILES[number], "text": f"{words}: {gloss.strip()}"}


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
        parser.add_argument("--most", type=int, default=600, help="records of a topic (default: 600)")
        args = parser.parse_args()
        folder = (args.output.parent / "apt").absolute()
        with writing(folder):
            records = list(nouns(fetch_nouns(folder)))
        random.Random(0).shuffle(records)
        taken: Counter[str] = Counter()
        with whole_file(args.output) as stream:
            for record in records:
                if taken[record["source"]] < args.most:
                    taken[record["source"]] += 1
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"{args.output}: {taken.total():,} records, {len(taken)} topics")


if __name__ == "__main__":
    sys.exit(main())

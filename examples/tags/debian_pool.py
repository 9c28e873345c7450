"""A real pool with known topics: descriptions of Debian packages, each with its archive section, as JSONL.

Needs Debian's or Ubuntu's `apt`; only the lists of packages are fetched, into a folder of their own. Packages of one
source have near-equal descriptions, so one is kept a source and section.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_file, writing

# Sections that tell what a package is made of, not what it is about.
UNTOPICAL = {
    "libs",
    "libdevel",
    "oldlibs",
    "debug",
    "metapackages",
    "misc",
    "introspection",
    "non-free-firmware",
    "localization",
    "doc",
}


def fetch_lists(folder: Path) -> list[str]:
    """Fetch package lists with English descriptions into a folder; returns apt's options that use them.

    Raises:
        UsageError: apt is absent or cannot fetch.
    """
    folder = folder.absolute()
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = [
        "-o",
        f"Dir::State::Lists={folder}/lists",
        "-o",
        f"Dir::Cache={folder}/cache",
        "-o",
        "Acquire::Languages=en",
    ]
    try:
        subprocess.run(["apt-get", *options, "update"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError("apt-get is not here: this pool needs Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        raise UsageError(f"apt-get update: {error.stderr.strip() or error.stdout.strip()}") from None
    return options


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Fields of each stanza of a control file; lines that continue a field are joined to it."""
    for block in text.split("\n\n"):
        fields, name = {}, None
        for line in block.split("\n"):
            if line[:1] in (" ", "\t") and name is not None:
                fields[name] += "\n" + line[1:]
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def descriptions(options: list[str], folder: Path) -> dict[str, str]:
    """English description of each Description-md5."""
    found = {}
    for path in sorted((folder / "lists").glob("*Translation-en*")):
        listing = subprocess.run(
            ["/usr/lib/apt/apt-helper", "cat-file", str(path)], check=True, capture_output=True, text=True
        )
        for fields in stanzas(listing.stdout):
            if "Description-en" in fields:
                lines = ("" if line.strip() == "." else line for line in fields["Description-en"].split("\n"))
                found[fields["Description-md5"]] = "\n".join(lines)
    return found


def packages(options: list[str], folder: Path) -> Iterator[dict]:
    """One record for each source and topical section: id, source (the section), text."""
    text = descriptions(options, folder)
    available = subprocess.run(["apt-cache", *options, "dumpavail"], check=True, capture_output=True, text=True)
    seen = set()
    for fields in stanzas(available.stdout):
        section = fields.get("Section", "").rpartition("/")[2]
        origin = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        body = text.get(fields.get("Description-md5", ""))
        if body and section and section not in UNTOPICAL and (origin, section) not in seen:
            seen.add((origin, section))
            yield {"id": fields["Package"], "source": section, "text": body}


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
        parser.add_argument(
            "--least", type=int, default=100, help="sections of fewer records are left out (default: 100)"
        )
        parser.add_argument("--most", type=int, default=400, help="records of a section, the first ones (default: 400)")
        args = parser.parse_args()
        folder = args.output.parent / "apt"
        with writing(folder):
            records = sorted(packages(fetch_lists(folder), folder), key=lambda record: record["id"])
        sizes, taken = Counter(record["source"] for record in records), Counter()
        with whole_file(args.output) as stream:
            for record in records:
                section = record["source"]
                if sizes[section] >= args.least and taken[section] < args.most:
                    taken[section] += 1
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"{args.output}: {taken.total():,} records, {len(taken)} topics")


if __name__ == "__main__":
    sys.exit(main())

"""Writes `data_tools/tags/taggers/english.json`: English words that are hardly ever nouns, by WordNet's counts of use.

    python examples/tags/word_classes.py --folder DIR

A tag is a noun phrase. A word counts as a verb, adjective or adverb if WordNet 3.0's texts with marked senses have it
at least `RATIO` times as often so as they have it as a noun. Of verbs the inflected forms count too, unless WordNet has
the form as a noun (`seed`). A gerund is kept as a noun (`building`, `parsing`) if the texts use it so, or use its verb
seldom: `taking` and `putting` are not. Needs apt, which fetches the package wordnet-base.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from wordnet_pool import fetch_nouns

from megatron_ksa.data_tools.tags.taggers.words import inflected
from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.files import whole_file

RATIO = 2
# Uses of a verb beyond which its gerund is a verb, where no text has it as a noun.
COMMON = 20
OUTPUT = Path(__file__).resolve().parents[2] / "data_tools" / "tags" / "taggers" / "english.json"
# ss_type of a sense key (senseidx(5WN)); a satellite is an adjective.
TYPES = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}
NOTICE = (
    'Drawn from WordNet 3.0, Copyright 2006 by Princeton University. All rights reserved. Permission to use, '
    'copy, modify and distribute this software and database and its documentation for any purpose and without fee '
    'or royalty is hereby granted, provided that you agree to comply with the following copyright notice and '
    'statements, including the disclaimer, and that the same appear on ALL copies of the software, database and '
    'documentation, including modifications that you make for internal use or for distribution. THIS SOFTWARE AND '
    'DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS OR '
    'IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES '
    'OF MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE '
    'OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS. The name '
    'of Princeton University or Princeton may not be used in advertising or publicity pertaining to distribution '
    'of the software and/or database. Title to copyright in this software, database and any associated '
    'documentation shall at all times remain with Princeton University and LICENSEE agrees to preserve same.'
)  # fmt: skip


def uses(folder: Path) -> dict[str, Counter]:
    """For each word in lower case how often it is used as what."""
    found: dict[str, Counter] = {}
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        key, _, count = line.split()
        lemma, _, rest = key.partition("%")
        if lemma.isalpha():
            found.setdefault(lemma.lower(), Counter())[TYPES[rest[0]]] += int(count)
    return found


def lemmas(folder: Path, kind: str) -> set[str]:
    """Every word that WordNet has as a noun, verb, adj or adv."""
    lines = (folder / f"index.{kind}").read_text(encoding="utf-8").splitlines()
    return {line.split(" ", 1)[0] for line in lines if not line.startswith(" ")}


def classes(folder: Path) -> dict[str, list[str]]:
    """Words of each class, sorted."""
    nouns, verbs = lemmas(folder, "noun"), lemmas(folder, "verb")
    found: dict[str, set[str]] = {"verb": set(), "adjective": set(), "adverb": set()}
    counted = uses(folder)
    for word, count in counted.items():
        for kind, members in found.items():
            if count[kind] >= max(1, RATIO * count["noun"]) and count[kind] == max(count.values()):
                members.add(word)
    irregular: dict[str, list[str]] = {}
    for line in (folder / "verb.exc").read_text(encoding="utf-8").splitlines():
        form, *of = line.split()
        for verb in of:
            irregular.setdefault(verb, []).append(form)
    # What `inflected` cannot know.
    forms = {form for verb in found["verb"] & verbs for form in irregular.get(verb, ()) if form.isalpha()}
    regular = {form: verb for verb in found["verb"] for form in inflected(verb)}
    gerunds = {form for form in {*forms, *regular} if form.endswith("ing")}
    of = {form: verb for verb in found["verb"] for form in irregular.get(verb, ())} | regular
    as_verbs = {
        form for form in gerunds
        if not counted.get(form, Counter())["noun"] and counted[of[form]]["verb"] > COMMON
    }  # fmt: skip
    return {
        **{kind: sorted(members) for kind, members in found.items()},
        "irregular_verb_forms": sorted(forms - nouns - gerunds),
        "gerunds": sorted(as_verbs),
        "nouns_like_verb_forms": sorted(form for form in regular if form in nouns and form not in gerunds),
    }  # fmt: skip


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--folder", type=Path, required=True, help="for apt's lists and the package")
        args = parser.parse_args()
        found = classes(fetch_nouns(args.folder).parent)
        with whole_file(OUTPUT) as stream:
            words = {kind: " ".join(members) for kind, members in found.items()}
            stream.write(json.dumps({"licence": NOTICE, **words}, indent=1) + "\n")
        print(f"{OUTPUT}: " + ", ".join(f"{len(members):,} {kind}" for kind, members in found.items()))


if __name__ == "__main__":
    sys.exit(main())

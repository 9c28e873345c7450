"""Raw instruction data of a few topics as a user would bring it, with some lines that cannot be used."""

import json
import random
from pathlib import Path

TOPICS = {
    "baking": "bread dough yeast oven flour starter crumb crust proofing kneading hydration baguette",
    "chess": "opening gambit rook knight endgame checkmate castling pawn bishop tournament blitz stalemate",
    "sailing": "harbour anchor rudder mainsail jib tacking keel mooring regatta spinnaker windward hull",
    "genetics": "genome mutation allele chromosome sequencing protein plasmid ribosome enzyme transcription codon",
}
BROKEN = (
    b'{"instruction": "half',
    b'["a list"]',
    b'\xff\xfe{"text": 1}',
    b'{"text": "  "}',
    b'{"title": "no known field"}',
)


def topic_records(count: int, seed: int = 0) -> list[dict]:
    """Alpaca records of the topics in turn, every tenth the one before it again with one word changed."""
    generator, records = random.Random(seed), []
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        words = generator.choices(TOPICS[topic].split(), k=40)
        record = {
            "id": number,
            "instruction": f"Tell me about {topic}: {' '.join(words[:6])}.",
            "output": " ".join(words),
        }
        if number % 10 == 9:
            record = {**records[-1], "id": number, "output": records[-1]["output"] + " indeed"}
        records.append(record | {"quality": 1 + number % 10, "source": f"set {number % 3}"})
    return records


def write_pool(path: Path, count: int = 80, seed: int = 0) -> Path:
    """The records with the broken lines among them; returns the path."""
    lines = [json.dumps(record).encode() for record in topic_records(count, seed)]
    for place, line in enumerate(BROKEN):
        lines.insert(7 * place, line)
    path.write_bytes(b"\n".join([*lines, lines[-1]]) + b"\n")  # the last id comes twice
    return path

"""The three numbers that decide who sees whom in KSA attention."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KSAGeometry:
    """Chunk size C, summary tokens per chunk S, and window W in past chunks (KSA report, arXiv 2604.24432).

    S = 0, or no summary rows in a call, is the window alone: a text query sees its own chunk up to itself and the W
    chunks before, and nothing of what is older.
    """

    chunk_size: int
    summary_tokens: int
    window_chunks: int

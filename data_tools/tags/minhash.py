"""Shingles and MinHash signatures of many texts at once.

A text is a run of words: letters and digits, a run of operators, or one character of a script that puts no blanks
between words. A shingle is five words in a row, as a 64-bit hash. A signature holds for each of 128 permutations the
smallest value over the text's shingles; two signatures agree in a share of places that estimates the Jaccard
similarity of the two sets of shingles (Broder 1997). Signatures are cut into bands, and texts that share the hash of a
band are candidates (locality-sensitive hashing). Signatures are rensa's, and `benchmarks/tags_minhash.py` compares with
datasketch's.
"""

import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

SHINGLE_WORDS = 5
PERMUTATIONS = 128
SEED = 1
# A pair at the threshold shares no band with at most this probability.
MISSED = 0.005
# rensa gives signatures as lists of numbers, which take ten times an array's memory.
TEXTS_AT_ONCE = 4096
WORDS_REMEMBERED = 1 << 20

# Thai, Lao, Myanmar, Khmer, kana, CJK ideographs with their extensions.
_WITHOUT_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
OPERATORS = "+\\-*/%=<>&|^~@#$\u00b1\u00d7\u00f7\u2190-\u22ff"
_WORD = re.compile(rf"[{_WITHOUT_BLANKS}]|[^\W{_WITHOUT_BLANKS}]+|[{OPERATORS}]+|!(?==)|(?<!\w)!(?=\w)")

_generator = np.random.default_rng(SEED)
_POSITIONS = _generator.integers(0, 1 << 64, SHINGLE_WORDS, np.uint64) | np.uint64(1)


class _Hashes(dict):
    """64-bit hash of each word seen, from 1; forgets all when it holds too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= WORDS_REMEMBERED:
            self.clear()
        value = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") | 1
        self[word] = value
        return value


_hashes = _Hashes()


def words(text: str) -> list[str]:
    """Words of a text in lower case and compatible Unicode form (NFKC)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.lower())


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 values with every bit depending on every bit (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingles(texts: Iterable[list[str]], size: int = SHINGLE_WORDS) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every run of `size` words; a shorter text is one run. A text without words has none.

    Args:
        texts: words of each text.
        size: at most `SHINGLE_WORDS` times any whole number.

    Returns:
        uint64 [shingles], in order, with repeats; and int64 [texts + 1], each text's bounds among them.
    """
    flat: list[int] = []
    lengths: list[int] = []
    padding = [0] * (size - 1)
    for text in texts:
        flat.extend(map(_hashes.__getitem__, text))
        flat.extend(padding)
        lengths.append(len(text))
    values, length = np.array(flat, np.uint64), np.array(lengths, np.int64)
    counts = np.where(length > 0, np.maximum(length - size + 1, 1), 0)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    starts = np.cumsum(length + size - 1) - (length + size - 1)
    first = np.repeat(starts - bounds[:-1], counts) + np.arange(bounds[-1])
    result = np.zeros(len(first), np.uint64)
    for place in range(size):
        # A number of its own for each place: the order of words counts.
        result = (result ^ values[first + place]) * _POSITIONS[place % SHINGLE_WORDS]
    return mixed(result), bounds


def without(values: np.ndarray, bounds: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shingles that are not among `left_out` (uint64, sorted); a text that would keep none keeps all of its own."""
    if not len(left_out) or not len(values):
        return values, bounds
    stays = ~is_among(values, left_out)
    kept = np.concatenate([[0], np.cumsum(stays)])
    bare = np.flatnonzero(kept[bounds[1:]] == kept[bounds[:-1]])
    for text in bare:
        stays[bounds[text] : bounds[text + 1]] = True
    kept = np.concatenate([[0], np.cumsum(stays)])
    return values[stays], kept[bounds]


def is_among(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """bool [values], whether each is in `table`, uint64 and sorted."""
    if not len(table):
        return np.zeros(len(values), bool)
    return table[np.minimum(np.searchsorted(table, values), len(table) - 1)] == values


def signatures(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """MinHash signatures: uint32 [texts, 128]; all ones for a text without shingles.

    Args:
        values, bounds: as `shingles` gives them.
    """
    from rensa import RMinHash

    result = np.empty((len(bounds) - 1, PERMUTATIONS), np.uint32)
    for first in range(0, len(result), TEXTS_AT_ONCE):
        part = bounds[first : first + TEXTS_AT_ONCE + 1]
        found = RMinHash.digest_matrix_from_flat_token_hashes(
            values[part[0] : part[-1]], (part - part[0]).astype(np.uint64), PERMUTATIONS, SEED
        )
        result[first : first + TEXTS_AT_ONCE] = found.to_rows()
    return result


def bands_for(similarity: float) -> tuple[int, int]:
    """Bands and places of a band: the longest bands that miss a pair of that similarity with at most `MISSED`."""
    for places in range(16, 1, -1):
        bands = PERMUTATIONS // places
        if (1 - similarity**places) ** bands <= MISSED:
            return bands, places
    return PERMUTATIONS, 1


def band_keys(found: np.ndarray, similarity: float) -> np.ndarray:
    """uint64 [bands, texts], hash of each band of the signatures, uint32 [texts, 128]."""
    bands, places = bands_for(similarity)
    parts = found[:, : bands * places].reshape(len(found), bands, places).astype(np.uint64)
    keys = np.zeros((len(found), bands), np.uint64)
    for place in range(places):
        keys = mixed(keys * np.uint64(0x9E3779B97F4A7C15) + parts[:, :, place])
    return np.ascontiguousarray(keys.T)


def distinct(values: np.ndarray, bounds: np.ndarray, text: int) -> np.ndarray:
    """The set of one text's shingles: uint64, sorted."""
    return np.unique(values[bounds[text] : bounds[text + 1]])


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sets, sorted without repeats; two empty sets are equal."""
    if not len(one) and not len(other):
        return 1.0
    shared = np.count_nonzero(is_among(one, other))
    return shared / (len(one) + len(other) - shared)

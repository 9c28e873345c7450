"""What the functions of the Hopper kernels hand on to each other, by name.

NamedTuples, since these are what both Triton 3.6 and 3.8 take in compiled code (`gluon.aggregate` is not in 3.6): a
field is a number, a pointer, a block of shared memory, a descriptor or a compile-time constant.
"""

from typing import Any, NamedTuple


class Constants(NamedTuple):
    """Compile-time numbers: KSA's C and S, query heads of a K/V head, channels of a head and of a tile (BD, padded),
    queries and keys of one consumer's tile, buffers of the ring, whether the kernel serves summary queries too, and
    whether there are documents.

    To be built in the call that takes it: an assignment in compiled code turns its fields into run-time numbers.
    """

    C: Any
    S: Any
    GROUP: Any
    D: Any
    BD: Any
    BM: Any
    BN: Any
    STAGES: Any
    HAS_SUMMARIES: Any
    HAS_DOCUMENTS: Any


class QuerySizes(NamedTuple):
    """Sizes for a kernel whose work items are queries.

    Numbers of text queries, text keys and summaries; global positions of the first query and of the first text key;
    chunk of the first summary; window in chunks.
    """

    nq: Any
    nk: Any
    ns: Any
    query_start: Any
    key_start: Any
    chunk_start: Any
    window: Any


class KeySizes(NamedTuple):
    """Sizes for a kernel whose work items are keys of one kind, text or summaries.

    Numbers of text queries, of summary queries (0 where it serves none) and of keys; global position of the first
    query; position of the first text key, or chunk of the first summary; window in chunks.
    """

    nq: Any
    summary_queries: Any
    num_keys: Any
    query_start: Any
    offset: Any
    window: Any


class Schedule(NamedTuple):
    """Work items: tiles of each head, heads of the whole batch, heads that take turns, parts of the queries."""

    tiles: Any
    all_heads: Any
    together: Any
    splits: Any = 1


class Strides(NamedTuple):
    """Strides of a tensor [B, rows, heads, D] in elements; those of the last dimension are 1."""

    batch: Any
    row: Any
    head: Any


class Documents(NamedTuple):
    """int32 [B, positions]: where each position's document starts (or stops, in dK/dV), and the batch's stride."""

    p: Any
    stride: Any


class Queue(NamedTuple):
    """Two work items on their way from the producer to the consumers: barriers and shared memory."""

    full: Any
    empty: Any
    items: Any


class KeyRing(NamedTuple):
    """A ring of key and value tiles: barriers "filled" and "left by both consumers" of each, and shared memory."""

    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    k: Any
    v: Any


class QueryRing(NamedTuple):
    """A ring of tiles of queries with dO, lse to base 2 and delta: barriers as in `KeyRing`, and shared memory."""

    full: Any
    empty: Any
    q: Any
    do: Any
    lse2: Any
    delta: Any


class QueryDescriptors(NamedTuple):
    """Tensor descriptors of what `QueryRing` holds."""

    q: Any
    do: Any
    lse2: Any
    delta: Any


class KeyDescriptors(NamedTuple):
    """Tensor descriptors of keys and values of the text and of the summaries."""

    k: Any
    v: Any
    ks: Any
    vs: Any


class SummaryKeys(NamedTuple):
    """Pointers to keys and values of the summaries, their strides, and the number of chunks that have summaries."""

    k: Any
    v: Any
    k_strides: Any
    v_strides: Any
    chunks: Any


class SummaryQueries(NamedTuple):
    """Pointers to q of the summary queries and, in the backward pass, to their dO (else None), and strides of both."""

    q: Any
    do: Any
    q_strides: Any
    do_strides: Any


class SummaryResults(NamedTuple):
    """Pointers to what dQ's kernel writes of the summary queries: dQ, and lse to base 2 and delta with the stride of a
    head's row.
    """

    dq: Any
    lse2: Any
    delta: Any
    stride: Any


class KeyOrder(NamedTuple):
    """The order in which a work item's key tiles pass through the ring (`gluon_common.key_tiles`).

    Tiles before `cut` are of text, those before `summaries_end` of summaries, the others of text again; text and
    summary: `tile_ranges` of each kind.
    """

    cut: Any
    summaries_end: Any
    text: Any
    summary: Any

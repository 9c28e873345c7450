"""The summary queries in the Hopper kernels: a consumer serves those of the chunks that its text queries are in.

Each summary query has C + S keys, too few for a tile of matrix products: plain arithmetic, on the tile of keys beside
the text queries, which a consumer reads last and keeps until its summary queries are done. A thread holds 8 channels
of all keys of a chunk; blocks are [chunks, rows of a chunk, channels]. With p = softmax(scale * q . k):

    dp = dO . v      delta = sum(p * dp)      ds = p * (dp - delta)      dq = scale * ds k

What summary queries add to dK and dV is left to the kernel for dK and dV, which gets lse and delta from here.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _chunk_rows(
    p, first, chunks, stride_n, ROWS: gl.constexpr, CHUNKS: gl.constexpr, D: gl.constexpr, BD: gl.constexpr
):
    """The ROWS rows of each of CHUNKS chunks from `first` on: [CHUNKS, rows padded to a power of two, BD]."""
    PADDED: gl.constexpr = gl.constexpr(1 << (ROWS - 1).bit_length())
    layout: gl.constexpr = gl.BlockedLayout([1, PADDED, 8], [256 // BD, 1, BD // 8], [gl.num_warps(), 1, 1], [2, 1, 0])
    o_c = first + gl.arange(0, CHUNKS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    o_r = gl.arange(0, PADDED, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    o_d = gl.arange(0, BD, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    o_n = o_c[:, None] * ROWS + o_r[None, :]
    m_n = (o_c < chunks)[:, None] & (o_r < ROWS)[None, :]
    p_rows = p + o_n[:, :, None].to(gl.int64) * stride_n + o_d[None, None, :]
    return gl.load(p_rows, mask=m_n[:, :, None] & (o_d < D)[None, None, :], other=0.0)


@gluon.jit
def _head(p, i_b, i_h, strides):
    """First row of a head."""
    return p + i_b.to(gl.int64) * strides.batch + i_h.to(gl.int64) * strides.head


@gluon.jit
def load_summaries(keys, queries, first, i_b, i_h, i_g, constants):
    """Rows of the summaries of the chunks in text rows [first, first + BM), from keys: SummaryKeys and queries:
    SummaryQueries.

    Returns K, V, q and dO (q again in the forward pass), the first of the chunks, and the number of all.
    """
    C: gl.constexpr = constants.C
    S: gl.constexpr = constants.S
    D: gl.constexpr = constants.D
    BD: gl.constexpr = constants.BD
    CHUNKS: gl.constexpr = constants.BM // C
    chunks = keys.chunks
    chunk = first // C
    b_ks = _chunk_rows(_head(keys.k, i_b, i_g, keys.k_strides), chunk, chunks, keys.k_strides.row, S, CHUNKS, D, BD)
    b_vs = _chunk_rows(_head(keys.v, i_b, i_g, keys.v_strides), chunk, chunks, keys.v_strides.row, S, CHUNKS, D, BD)
    p_q = _head(queries.q, i_b, i_h, queries.q_strides)
    b_q = _chunk_rows(p_q, chunk, chunks, queries.q_strides.row, S, CHUNKS, D, BD)
    b_do = b_q
    if queries.do is not None:
        p_do = _head(queries.do, i_b, i_h, queries.do_strides)
        b_do = _chunk_rows(p_do, chunk, chunks, queries.do_strides.row, S, CHUNKS, D, BD)
    return b_ks, b_vs, b_q, b_do, chunk, chunks


@gluon.jit
def chunk_keys(s_rows, PART: gl.constexpr, C: gl.constexpr, BM: gl.constexpr):
    """Keys or values beside a consumer's queries, [BM // C, C, BD]: a tile of BM rows, or half of one of 2 * BM."""
    BN: gl.constexpr = s_rows.shape[2]
    BD: gl.constexpr = s_rows.shape[3]
    layout: gl.constexpr = gl.BlockedLayout([1, C, 8], [256 // BD, 1, BD // 8], [gl.num_warps(), 1, 1], [2, 1, 0])
    s_chunks = s_rows.reshape([BN // C, C, BD])
    if BN == BM:
        return s_chunks.load(layout)
    return s_chunks.slice(PART * (BM // C), BM // C).load(layout)


@gluon.jit
def _row(b_rows, i_s, layout: gl.constexpr):
    """Row i_s of each chunk, float32 [chunks, BD] as a slice of `layout` along its rows."""
    given: gl.constexpr = b_rows.type.layout
    o_r = gl.arange(0, b_rows.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, given)))
    b_row = gl.sum(gl.where((o_r == i_s)[None, :, None], b_rows.to(gl.float32), 0.0), axis=1)
    return gl.convert_layout(b_row, gl.SliceLayout(1, layout))


@gluon.jit
def _dots(b_row, b_keys):
    """Products of each chunk's row [chunks, BD] with its keys [chunks, rows, BD]: [chunks, rows]."""
    b_row = gl.convert_layout(b_row, gl.SliceLayout(1, b_keys.type.layout))
    return gl.sum(b_row[:, None, :] * b_keys.to(gl.float32), axis=2)


@gluon.jit
def _weighted(b_weights, b_keys, layout: gl.constexpr):
    """Sums of each chunk's keys by weights [chunks, rows]: [chunks, BD] as a slice of `layout`."""
    b_sum = gl.sum(b_weights[:, :, None] * b_keys.to(gl.float32), axis=1)
    return gl.convert_layout(b_sum, gl.SliceLayout(1, layout))


@gluon.jit
def _probabilities(
    b_row, b_k, b_ks, i_s, chunk, chunks, p_start, scale_log2, C: gl.constexpr, HAS_DOCUMENTS: gl.constexpr
):
    """p over the text [chunks, C] and over the summaries [chunks, S], and the log-sum-exp to base 2 [chunks]."""
    text: gl.constexpr = gl.SliceLayout(2, b_k.type.layout)
    summary: gl.constexpr = gl.SliceLayout(2, b_ks.type.layout)
    b_text = _dots(b_row, b_k) * scale_log2
    b_summary = _dots(b_row, b_ks) * scale_log2
    if HAS_DOCUMENTS:
        # The summaries belong to the document of the chunk's last token.
        o_c = chunk + gl.arange(0, b_k.shape[0], layout=gl.SliceLayout(1, text))
        o_t = o_c[:, None] * C + gl.arange(0, C, layout=gl.SliceLayout(0, text))[None, :]
        b_start = gl.load(p_start + o_c * C + C - 1, mask=o_c < chunks, other=0)
        b_text = gl.where(o_t >= b_start[:, None], b_text, float("-inf"))
    o_r = gl.arange(0, b_ks.shape[1], layout=gl.SliceLayout(0, summary))
    b_summary = gl.where((o_r <= i_s)[None, :], b_summary, float("-inf"))
    b_max = gl.maximum(gl.max(b_text, axis=1), gl.convert_layout(gl.max(b_summary, axis=1), gl.SliceLayout(1, text)))
    b_text = gl.exp2(b_text - b_max[:, None])
    b_summary = gl.exp2(b_summary - gl.convert_layout(b_max, gl.SliceLayout(1, summary))[:, None])
    b_sum = gl.sum(b_text, axis=1) + gl.convert_layout(gl.sum(b_summary, axis=1), gl.SliceLayout(1, text))
    b_scale = 1.0 / b_sum
    b_summary *= gl.convert_layout(b_scale, gl.SliceLayout(1, summary))[:, None]
    return b_text * b_scale[:, None], b_summary, b_max + gl.log2(b_sum)


@gluon.jit
def _store(p, b_row, i_s, chunk, chunks, stride_n, S: gl.constexpr, D: gl.constexpr):
    """Store a row [chunks, BD] of each chunk as that of its summary i_s."""
    layout: gl.constexpr = b_row.type.layout
    o_c = chunk + gl.arange(0, b_row.shape[0], layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, b_row.shape[1], layout=gl.SliceLayout(0, layout))
    p_rows = p + (o_c * S + i_s)[:, None].to(gl.int64) * stride_n + o_d[None, :]
    gl.store(p_rows, b_row.to(p.dtype.element_ty), mask=(o_c < chunks)[:, None] & (o_d < D)[None, :])


@gluon.jit
def attend_summaries(b_k, b_v, loaded, p_start, p_out, stride_n, scale_log2, constants):
    """Store the outputs of summary queries, from `chunk_keys` and `load_summaries`.

    p_out: first row of their head. p_start: first positions of documents, of their sequence.
    """
    b_ks, b_vs, b_q, b_do, chunk, chunks = loaded
    S: gl.constexpr = constants.S
    layout: gl.constexpr = b_k.type.layout
    for i_s in range(S):
        b_row = _row(b_q, i_s, layout)
        b_text, b_summary, b_lse2 = _probabilities(
            b_row, b_k, b_ks, i_s, chunk, chunks, p_start, scale_log2, constants.C, constants.HAS_DOCUMENTS
        )
        b_out = _weighted(b_text, b_v, layout) + _weighted(b_summary, b_vs, layout)
        _store(p_out, b_out, i_s, chunk, chunks, stride_n, S, constants.D)


@gluon.jit
def summary_dq(b_k, b_v, loaded, p_start, p_dq, p_lse2, p_delta, stride_n, scale, scale_log2, constants):
    """Store dQ of summary queries, their log-sum-exp to base 2 and delta; arguments as in `attend_summaries`."""
    b_ks, b_vs, b_q, b_do, chunk, chunks = loaded
    S: gl.constexpr = constants.S
    layout: gl.constexpr = b_k.type.layout
    text: gl.constexpr = gl.SliceLayout(2, layout)
    summary: gl.constexpr = gl.SliceLayout(2, b_ks.type.layout)
    for i_s in range(S):
        b_row = _row(b_q, i_s, layout)
        b_text, b_summary, b_lse2 = _probabilities(
            b_row, b_k, b_ks, i_s, chunk, chunks, p_start, scale_log2, constants.C, constants.HAS_DOCUMENTS
        )
        b_row = _row(b_do, i_s, layout)
        b_dtext = _dots(b_row, b_v)
        b_dsummary = _dots(b_row, b_vs)
        b_delta = gl.sum(b_text * b_dtext, axis=1)
        b_delta += gl.convert_layout(gl.sum(b_summary * b_dsummary, axis=1), gl.SliceLayout(1, text))
        b_dtext = b_text * (b_dtext - b_delta[:, None])
        b_dsummary = b_summary * (b_dsummary - gl.convert_layout(b_delta, gl.SliceLayout(1, summary))[:, None])
        b_dq = (_weighted(b_dtext, b_k, layout) + _weighted(b_dsummary, b_ks, layout)) * scale
        _store(p_dq, b_dq, i_s, chunk, chunks, stride_n, S, constants.D)
        o_c = chunk + gl.arange(0, b_k.shape[0], layout=gl.SliceLayout(1, text))
        gl.store(p_lse2 + o_c * S + i_s, b_lse2, mask=o_c < chunks)
        gl.store(p_delta + o_c * S + i_s, b_delta, mask=o_c < chunks)

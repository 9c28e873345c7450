"""KSA's features checked before it is timed: documents, segments, head dimensions, dtypes, windows, groups."""

import torch

from megatron_ksa.kernels.benchmarks.check import errors
from megatron_ksa.kernels.benchmarks.registry import Shape
from megatron_ksa.kernels.ksa_attention import reference, triton_joint, triton_text
from megatron_ksa.kernels.ksa_attention.geometry import KSAGeometry

# A window that holds every past chunk.
CAUSAL = KSAGeometry(8, 1, 2**24)

# Shape, cuts between documents, and (first query, (first text key, keys), (first chunk, chunks)) of a segment.
ON_GPU = {
    "mha": (Shape(1000, 4, 4, 128, 1, 8, 1, 16), None, None),
    "gqa-batch-S2-documents": (Shape(900, 8, 2, 64, 2, 8, 2, 16), [1, 333, 610], None),
    "mqa-dim96": (Shape(777, 4, 1, 96, 1, 16, 1, 4), None, None),
    "gqa-dim64-documents": (Shape(700, 4, 2, 64, 1, 8, 1, 16), [333], None),
    "dim256-documents": (Shape(600, 2, 2, 256, 1, 8, 1, 8), [250], None),
    "causal": (Shape(1000, 2, 2, 128, 1, 8, 1, 128), None, None),
    "no-window": (Shape(501, 2, 2, 128, 1, 5, 3, 0), None, None),
    "segment": (Shape(500, 4, 2, 128, 2, 8, 1, 16), [300, 700], (512, (384, 628), (3, 100))),
    "float16": (Shape(1000, 4, 2, 128, 1, 8, 1, 16, "float16"), [500], None),
    "float32": (Shape(500, 2, 1, 128, 1, 8, 1, 16, "float32"), [300], None),
    "window-documents": (Shape(900, 8, 2, 128, 2, 8, 0, 16), [1, 333, 610], None),
    "window-dim64-batch": (Shape(700, 4, 4, 64, 2, 8, 0, 4), None, None),
    "window-segment": (Shape(500, 4, 2, 128, 2, 8, 0, 16), [300, 700], (512, (384, 628), (3, 100))),
    "table-shape": (Shape(4096, 8, 2, 128, 1, 8, 1, 128), None, None),
}
INTERPRETED = {
    "documents": (Shape(37, 2, 1, 16, 1, 4, 1, 3, "float32"), [20], None),
    "segment": (Shape(30, 2, 2, 16, 1, 4, 1, 3, "float32"), None, (24, (12, 42), (1, 12))),
}


def check_feature(
    shape: Shape, cuts: list[int] | None, segment: tuple | None, device: str
) -> dict[str, tuple[float, float]]:
    """Errors and limits of the text op, and of the op over `[text | summaries]` rows where there is no segment."""
    geometry = shape.geometry
    query_start, (key_start, nk), (chunk_start, nc) = segment or (0, (0, shape.n), (0, shape.n // shape.chunk_size))
    starts = None
    if cuts is not None:
        starts = torch.zeros(shape.batch, query_start + shape.n, dtype=torch.int32, device=device)
        for cut in cuts:
            starts[:, cut:] = cut
    offsets = {"query_start": query_start, "key_start": key_start, "chunk_start": chunk_start}
    sizes = [(shape.n, shape.heads), *[(nk, shape.groups)] * 2, *[(nc * shape.summary_tokens, shape.groups)] * 2]
    found = errors(
        ("out", "lse", "dq", "dk", "dv", "dk_summary", "dv_summary"),
        lambda *rows: triton_text.text_attention(*rows, geometry, document_start=starts, **offsets),
        lambda *rows: reference.text_attention(*rows, geometry, document_start=starts, **offsets),
        [shape.random(rows, heads, device) for rows, heads in sizes],
    )
    # Two backward passes must give the same bits.
    found["repeat"] = (found["repeat"][0], 0.0)
    if segment is not None:
        return found
    joint = errors(
        ("out", "dq", "dk", "dv"),
        lambda *rows: (triton_joint.attention(*rows, geometry, text_rows=shape.n, document_start=starts),),
        lambda *rows: (reference.attention(*rows, geometry, text_rows=shape.n, document_start=starts),),
        [shape.random(shape.rows, heads, device) for heads in (shape.heads, shape.groups, shape.groups)],
    )
    joint["repeat"] = (joint["repeat"][0], 0.0)
    return found | {f"joint {name}": entry for name, entry in joint.items()}


def check(device: str) -> dict[str, dict]:
    """Errors and limits of every case; a case that raises has its error instead."""
    found = {}
    for name, (shape, cuts, segment) in (INTERPRETED if device == "cpu" else ON_GPU).items():
        try:
            found[name] = check_feature(shape, cuts, segment, device)
        except Exception as error:  # a compiler that refuses one case must not hide the others
            found[name] = {"error": repr(error)[:500]}
    return found

"""Candidate tiles of a sweep by kernel, head dimension and dtype, without those that cannot fit on the GPU."""

from megatron_ksa.kernels.ksa_attention.triton_config import Tile, padded_head_dim

# By padded head dimension: queries, keys, warps, stages, and 1 for the warp-specialised kernel of Hopper. dK/dV takes
# 32 queries at least: the copy engine writes their statistics to multiples of 128 bytes.
HALF = {
    64: {
        "forward": [
            (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 3),
            (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 4, 1), (64, 128, 4, 2, 1), (64, 128, 4, 3, 1),
            (64, 256, 4, 2, 1),
        ],
        "dq": [
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3),
            (128, 128, 8, 2), (64, 64, 4, 3, 1), (64, 128, 4, 2, 1), (64, 128, 4, 3, 1),
        ],
        "dkv": [
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 4, 2),
            (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2, 1), (64, 64, 4, 3, 1), (128, 64, 4, 2, 1),
        ],
    },
    128: {
        "forward": [
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 3),
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 4), (64, 32, 4, 4),
            (64, 128, 4, 2, 1), (64, 128, 4, 3, 1), (64, 64, 4, 3, 1),
        ],
        "dq": [
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 128, 8, 2), (128, 32, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2, 1), (64, 64, 4, 3, 1),
        ],
        "dkv": [
            (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (32, 128, 8, 3),
            (32, 128, 8, 4), (32, 64, 4, 3), (64, 64, 8, 3), (64, 64, 4, 2, 1), (64, 64, 4, 3, 1),
        ],
    },
    256: {
        "forward": [
            (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3), (128, 32, 8, 2),
            (128, 32, 8, 3), (128, 64, 8, 2), (64, 32, 4, 3, 1), (64, 64, 4, 2, 1),
        ],
        "dq": [(64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2), (128, 32, 8, 2), (128, 16, 8, 3)],
        "dkv": [(32, 32, 4, 2), (64, 32, 4, 2), (32, 64, 8, 2), (32, 64, 8, 3), (64, 64, 8, 2)],
    },
}  # fmt: skip
SINGLE = {
    64: [(32, 32, 4, 2), (16, 32, 4, 2), (32, 16, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)],
    128: [(32, 32, 4, 2), (16, 32, 4, 2), (32, 16, 4, 2), (32, 32, 8, 2), (64, 32, 8, 2)],
    256: [(16, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1), (32, 32, 8, 1)],
}
REGISTERS = 255


def shared_bytes(kernel: str, tile: Tile, head_dim: int) -> int:
    """Shared memory of a kernel on bf16 or fp16: rows that stay, and a tile of streamed rows for each stage.

    Barriers, statistics of rows and scratch space come on top: up to 3 KiB where triton 3.6 compiled for capability
    9.0. Kernels with fewer than 64 rows of results, which do without asynchronous products, took less.
    """
    row = padded_head_dim(head_dim) * 2
    pair = 1 + tile.specialised
    if kernel.startswith("dkv"):
        # K and V stay; Q and dO pass. Specialised kernels write results, float32 at most, by way of shared memory.
        return pair * (2 + 2 * tile.specialised) * tile.keys * row + tile.stages * 2 * tile.queries * row
    # Q stays, with dO in dQ; the specialised kernels have a place for results too, and one for O.
    kept = {"forward": 1, "dq": 2}[kernel] * (1 + tile.specialised)
    return pair * kept * tile.queries * row + tile.stages * 2 * tile.keys * row


def accumulators(kernel: str, tile: Tile, head_dim: int) -> int:
    """Float32 numbers that each thread holds at once in results and scores (P and dP in the backward pass)."""
    dim, scores = padded_head_dim(head_dim), tile.queries * tile.keys
    if kernel.startswith("dkv"):
        numbers = 2 * tile.keys * dim + 2 * scores
    else:
        numbers = tile.queries * dim + (1 if kernel == "forward" else 2) * scores
    return numbers // (tile.warps * 32)


def candidates(kernel: str, head_dim: int, element_bytes: int, shared_limit: int | None, hopper: bool) -> list[Tile]:
    """Tiles worth compiling for a kernel.

    Args:
        shared_limit: bytes of shared memory of a program; None where nothing needs to fit (the interpreter).
        hopper: whether warp-specialised kernels are among them.
    """
    dim = max(64, padded_head_dim(head_dim))
    if element_bytes == 4:
        # Small, and far from any limit.
        return [Tile(*numbers) for numbers in SINGLE[dim]]
    tiles = [Tile(*numbers) for numbers in HALF[dim][kernel.split("_")[0]]]
    if shared_limit is not None:
        tiles = [tile for tile in tiles if shared_bytes(kernel, tile, head_dim) <= shared_limit]
    few = [tile for tile in tiles if accumulators(kernel, tile, head_dim) <= REGISTERS]
    return [tile for tile in few if hopper or not tile.specialised]

"""What a user might pick instead of KSA: NSA and MoBA of flash-linear-attention, and FlashAttention 4.

All are optional: an op whose package is not installed, or that does not take a shape, is recorded as skipped with its
reason. Written against fla-core 0.6.0 (NSA and MoBA, whose local parts call FlashAttention 2) and flash-attn-4
4.0.0b36. NSA and MoBA choose blocks of keys by score; they are checked at lengths at which they choose every block, so
that no near tie decides. Times are those of random inputs, whose choices spread evenly over the past.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from megatron_ksa.kernels.benchmarks.attention import attention_case
from megatron_ksa.kernels.benchmarks.attention_features import CAUSAL
from megatron_ksa.kernels.benchmarks.registry import Case, Op, Shape
from megatron_ksa.kernels.ksa_attention import KSAGeometry, reference

# NSA's sizes (arXiv 2502.11089, and defaults of fla's layer): 16 blocks of 64 keys are chosen; window of 512 tokens.
NSA_BLOCK, NSA_BLOCKS, NSA_WINDOW, NSA_GROUP = 64, 16, 512, 16
# MoBA's (arXiv 2502.13189, scaling experiments): 3 blocks of 512 keys, the query's own among them.
MOBA_BLOCK, MOBA_BLOCKS = 512, 3


def imported(module: str, package: str) -> ModuleType | str:
    """A module, or why there is none.

    Args:
        package: what to install, as pip names it.
    """
    try:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install {package}"
        return importlib.import_module(module)
    except Exception as error:  # a package may be of another version, or lack something of its own
        return f"{module} cannot be imported ({type(error).__name__}: {str(error)[:150]}): pip install {package}"


def lacking(modules: dict[str, str], device: str) -> str | None:
    """Why modules cannot run on a device, given the package of each, or None."""
    if device == "cpu":
        return "needs a GPU"
    return next((found for found in (imported(*item) for item in modules.items()) if isinstance(found, str)), None)


def _flash_attention_2() -> str | None:
    """Why FlashAttention 2 cannot be called, or None; flash-attn-4 alone leaves a package of the same name."""
    module = imported("flash_attn", "flash-attn")
    if isinstance(module, str):
        return module
    return None if hasattr(module, "flash_attn_func") else "flash_attn has no FlashAttention 2: pip install flash-attn"


def nsa_pairs(n: int, window: int) -> int:
    """Query-key pairs of NSA in a sequence: chosen blocks, means of past blocks, and window."""
    i = torch.arange(n)
    chosen = (i // NSA_BLOCK + 1).clamp(max=NSA_BLOCKS) - 1
    pairs = chosen * NSA_BLOCK + i % NSA_BLOCK + 1 + (i + 1) // NSA_BLOCK
    return int(pairs.sum() + (i + 1).clamp(max=window).sum())


def moba_pairs(n: int) -> int:
    """Query-key pairs of MoBA in a sequence: the query's block up to itself, and whole past blocks."""
    i = torch.arange(n)
    return int((i % MOBA_BLOCK + 1 + (i // MOBA_BLOCK).clamp(max=MOBA_BLOCKS - 1) * MOBA_BLOCK).sum())


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the reference, [B, n, Hq, D]."""
    return reference.text_attention(q, k, v, k[:, :0], v[:, :0], CAUSAL)[0]


def nsa_definition(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """NSA where every block is chosen: causal attention, attention to means of past blocks, and window, added up.

    Args:
        q: [B, n, Hq, D], n at most NSA_BLOCK * NSA_BLOCKS.
        k, v: [B, n, Hkv, D].
        window: tokens, or 0 for no window.

    Returns:
        [B, n, Hq, D]: the sum of the three with gates of 1.
    """
    n, whole = q.shape[1], q.shape[1] // NSA_BLOCK * NSA_BLOCK
    k_mean, v_mean = (rows[:, :whole].unflatten(1, (-1, NSA_BLOCK)).mean(2) for rows in (k, v))
    # A block counts from its last token on: a summary of KSA, with a chunk of one block and a window of nothing, but
    # one token earlier. The query at i is therefore placed at i + 1, and sees no text.
    blocks, _ = reference.text_attention(
        q, k[:, :0], v[:, :0], k_mean, v_mean, KSAGeometry(NSA_BLOCK, 1, 0), query_start=1
    )
    out = causal(q, k, v) + blocks
    if window:
        near = KSAGeometry(1, 0, window - 1)
        out = out + reference.attention(q, k, v, near, text_rows=n)
    return out


def _nsa(shape: Shape, device: str) -> Case:
    nsa = imported("fla.ops.nsa", "fla-core")
    window = 0 if _flash_attention_2() else NSA_WINDOW
    gates = torch.ones(shape.batch, shape.n, shape.heads, dtype=shape.torch_dtype, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        options = {"block_counts": NSA_BLOCKS, "block_size": NSA_BLOCK, "window_size": window}
        return (nsa.parallel_nsa(q, k, v, gates, gates, gates, **options),)

    def expected(*rows: Tensor) -> tuple[Tensor]:
        return (nsa_definition(*rows, window),)

    return attention_case(
        shape, shape.n, run, expected, nsa_pairs(shape.n, window), device, block_tokens=NSA_BLOCK,
        chosen_blocks=NSA_BLOCKS, window_tokens=window,
    )  # fmt: skip


def _nsa_missing(shape: Shape, device: str) -> str | None:
    group = shape.heads // shape.groups
    if group < NSA_GROUP or group.bit_count() != 1:
        return f"NSA's kernels need a power of two from {NSA_GROUP} query heads on for each K/V head, not {group}"
    return lacking({"fla.ops.nsa": "fla-core einops"}, device)


def _moba(shape: Shape, device: str) -> Case:
    moba = imported("fla.ops.moba", "fla-core")
    lengths = torch.tensor([0, shape.n], dtype=torch.int32, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        # It takes as many K/V heads as query heads.
        k, v = (rows.repeat_interleave(shape.heads // shape.groups, dim=2) for rows in (k, v))
        return (moba.parallel_moba(q, k, v, lengths, shape.n, MOBA_BLOCK, MOBA_BLOCKS),)

    return attention_case(
        shape, shape.n, run, lambda *rows: (causal(*rows),), moba_pairs(shape.n), device, block_tokens=MOBA_BLOCK,
        chosen_blocks=MOBA_BLOCKS,
    )  # fmt: skip


def _moba_missing(shape: Shape, device: str) -> str | None:
    if shape.batch > 1:
        return f"MoBA takes one sequence, not a batch of {shape.batch}"
    return lacking({"fla.ops.moba": "fla-core einops"}, device) or _flash_attention_2()


def _flash_4(shape: Shape, device: str) -> Case:
    flash = imported("flash_attn.cute", "flash-attn-4")

    def run(*rows: Tensor) -> tuple[Tensor]:
        out = flash.flash_attn_func(*rows, causal=True)
        return (out[0] if isinstance(out, tuple) else out,)

    pairs = shape.n * (shape.n + 1) // 2
    return attention_case(shape, shape.n, run, lambda *rows: (causal(*rows),), pairs, device)


def _flash_4_missing(shape: Shape, device: str) -> str | None:
    return lacking({"flash_attn.cute": "--pre flash-attn-4"}, device)


def _lengths(*shapes: Shape) -> Callable[[str], list[Shape]]:
    return lambda device: list(shapes)


NSA = Op(
    "nsa", "native sparse attention, fla's kernels, forward with the choice of blocks", _nsa,
    _lengths(Shape(1000, 16, 1), Shape(1024, 32, 2)), poisoned=False, missing=_nsa_missing,
)  # fmt: skip
MOBA = Op(
    "moba", "mixture of block attention, fla's, K/V heads repeated", _moba,
    _lengths(Shape(1000, 4, 4), Shape(1536, 4, 2)), poisoned=False, missing=_moba_missing,
)  # fmt: skip
FLASH_4 = Op(
    "flash_attention_4", "full causal attention by FlashAttention 4 (CuTe)", _flash_4,
    _lengths(Shape(2051, 4, 4), Shape(2051, 4, 2)), poisoned=False, missing=_flash_4_missing,
)  # fmt: skip
BASELINES = (NSA, MOBA, FLASH_4)

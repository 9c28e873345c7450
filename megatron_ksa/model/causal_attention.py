"""Causal attention of whole sequences by torch's fused kernels: full layers, and windows over the whole sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_text_attention

# torch's own order takes FlashAttention 2 first on some versions, which cuDNN's kernels for Hopper outrun. The backend
# that forms n x n scores is not among them.
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def _takes_own_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> Tensor:
    """Causal attention without n x n scores on any device.

    On a GPU cuDNN's kernel, FlashAttention where cuDNN does not take the shape; this project's kernel beyond 16 bits,
    which neither takes.

    Args:
        q: [n, batch, heads, head_dim].
        k, v: [n, batch, K/V heads, head_dim].

    Returns:
        [n, batch, heads, head_dim].
    """
    if _takes_own_kernel(q):
        q, k, v = (rows.transpose(0, 1) for rows in (q, k, v))
        geometry, none = KSAGeometry(1, 1, q.shape[1]), k[:, :0]
        return ksa_text_attention(q, k, v, none, none, geometry, softmax_scale=softmax_scale)[0].transpose(0, 1)
    # [batch, heads, n, head_dim]
    q, k, v = (rows.permute(1, 2, 0, 3) for rows in (q, k, v))
    options = {"is_causal": True, "scale": softmax_scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options).permute(2, 0, 1, 3)
    with sdpa_kernel(FUSED, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options).permute(2, 0, 1, 3)


def causal_backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Name of the kernel that `causal_attention` takes for tensors as it takes them."""
    if _takes_own_kernel(q):
        return "ksa_text_attention"
    q, k, v = (rows.permute(1, 2, 0, 3) for rows in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(FUSED if q.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=grouped)
    return SDPBackend(choice).name.lower()

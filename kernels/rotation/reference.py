"""RMS norm of query and key heads and their rotation in plain PyTorch: what the Triton kernels are compared with.

For a head x of D channels at position m, with the frequencies f_0 .. f_(d/2-1) of its K/V group in turns per position:

    y = x / sqrt(mean(x^2) + eps) * g                                         (with a weight; else y = x)
    out[a_i] = y[a_i] cos(2 pi f_i m) - y[b_i] sin(2 pi f_i m)
    out[b_i] = y[b_i] cos(2 pi f_i m) + y[a_i] sin(2 pi f_i m)                i = 0 .. d/2 - 1
    out[j]   = y[j]                                                           j >= d

with pairs (a_i, b_i) = (i, i + d/2), or (2i, 2i + 1) when interleaved; d <= D is even. g is the weight, or 1 + weight.
Frequencies are integers in units of 2^-64 turn: the product with a position wraps around by itself, so that angles
are exact at any position below 2^31.
"""

import math

import torch
from torch import Tensor

TURN = 2.0**64


def fixed_point(inv_freq: Tensor) -> Tensor:
    """Inverse frequencies in radians per position as `rotate` takes them.

    Args:
        inv_freq: float64 [...].

    Returns:
        int64 [...], in units of 2^-64 turn, modulo whole turns.
    """
    turns = inv_freq.double() / (2 * math.pi)
    return ((turns - torch.floor(turns + 0.5)) * TURN).round().to(torch.int64)


def angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotation angles in (-pi, pi].

    Args:
        positions: int [rows, batch or 1].
        frequencies: int64 [K/V groups or 1, d/2].

    Returns:
        float64 [rows, batch or 1, K/V groups or 1, d/2].
    """
    return (positions.long()[..., None, None] * frequencies).double() * (2 * math.pi / TURN)


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * g over the last dimension; g is the weight, or 1 + weight when zero-centred."""
    gain = weight.to(x.dtype) + 1 if zero_centered else weight.to(x.dtype)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _rotate(x: Tensor, theta: Tensor, interleaved: bool) -> Tensor:
    """Rotate the leading channels of [rows, batch, heads, D] by [rows, batch or 1, heads or 1, d/2] angles."""
    half = theta.shape[-1]
    cos, sin = theta.cos().to(x.dtype), theta.sin().to(x.dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(half, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads as a projection gives them, group after group its query heads, its key and its value.

    Args:
        query: [rows, batch, Hq, D].
        key, value: [rows, batch, Hkv, D].

    Returns:
        [rows, batch, Hkv, (Hq / Hkv + 2) * D].
    """
    return torch.cat([query.unflatten(2, (key.shape[2], -1)).flatten(3), key, value], dim=-1)


def rotate(
    parts: list[Tensor],
    queries: int,
    weights: list[tuple[Tensor, Tensor] | None],
    positions: Tensor,
    frequencies: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate query and key heads of consecutive parts of the rows, and join the parts.

    Args:
        parts: projected heads as `mix` lays them out, [rows of the part, batch, Hkv, (queries + 2) * D].
        queries: query heads of a K/V group, Hq / Hkv.
        weights: for each part, the norm weights [D] of queries and keys, or None for no norm.
        positions: int [rows of all parts, batch or 1], from 0 to 2^31 - 1.
        frequencies: int64 [Hkv or 1, d/2], see `fixed_point`; query head h takes those of K/V head h // queries.
        eps: added to the mean square.
        zero_centered: weights are added to 1.
        interleaved: rotate neighbouring channels instead of halves.

    Returns:
        query [rows, batch, Hq, D], key and value [rows, batch, Hkv, D] in the parts' dtype, the value as it is; sums
        and products are float32 or better.
    """
    theta = angles(positions, frequencies)
    dim = parts[0].shape[-1] // (queries + 2)
    split = [part.split([queries * dim, dim, dim], dim=-1) for part in parts]
    results = []
    for index, count in enumerate((queries, 1)):
        rows = []
        for heads, pair in zip(split, weights, strict=True):
            part = heads[index].unflatten(-1, (count, dim)).flatten(2, 3)
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            rows.append(part if pair is None else rms_norm(part, pair[index], eps, zero_centered))
        by_head = theta.repeat_interleave(count, dim=2) if len(frequencies) > 1 else theta
        results.append(_rotate(torch.cat(rows), by_head, interleaved).to(parts[0].dtype))
    return *results, torch.cat([value for *_, value in split])

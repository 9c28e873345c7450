"""Rotary angles: Megatron's for one base, each head's own base for several, on every tensor-parallel rank."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from single_process import build_model, process_groups, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.layout.rows import RowLayout, document_starts_from_cu_seqlens, row_positions
from megatron_ksa.rotary.embedding import PositionedRotaryEmbedding

LENGTH, CHANNELS, HEADS, GROUPS = 50, 16, 8, 4
BASES = (1e4, 3e5, 1e6, 4.54e6)


def positions(length=LENGTH):
    """int64 [length, 1]"""
    return torch.arange(length)[:, None]


def rotate(heads, angles, interleaved=False):
    """Megatron's unfused rotation of [rows, batch, heads, channels]."""
    process_groups()
    config = transformer_config(rotary_interleaved=interleaved)
    return apply_rotary_pos_emb(heads, angles, config)


def queries_and_keys():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(LENGTH, 2, HEADS, CHANNELS, generator=generator)
    return q, torch.randn(LENGTH, 2, GROUPS, CHANNELS, generator=generator)


@pytest.mark.parametrize("count", [1, GROUPS])
@pytest.mark.parametrize("base", [10000, 5e5])
@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("factor", [None, 3.0])
def test_equal_bases_are_megatrons_rotary_embedding(count, base, percent, interleaved, factor):
    process_groups()
    megatron = RotaryEmbedding(CHANNELS, percent, interleaved, factor, base, use_cpu_initialization=True)
    expected = megatron(LENGTH)
    ours = PositionedRotaryEmbedding(
        (base,) * count, int(CHANNELS * percent), HEADS, interleaved=interleaved, seq_len_interpolation_factor=factor
    )
    angles = ours(positions())
    for name, rows, got in zip("qk", queries_and_keys(), angles, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected.expand_as(got)), name
        assert torch.equal(rotate(rows, got, interleaved), rotate(rows, expected, interleaved)), name


@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_model_angles_are_megatrons_with_llama3_scaling(percent, interleaved):
    """Positions reach past the 8192 that the scaling rule knows, with a base whose slow channels are scaled."""
    config = transformer_config(kv_channels=CHANNELS, rotary_interleaved=interleaved)
    settings = dict(rotary_percent=percent, rotary_base=500000, rope_scaling=True, rope_scaling_factor=8.0)
    model = build_model(KSAConfig(), config, **settings)
    megatron = RotaryEmbedding(
        CHANNELS, percent, interleaved, None, 500000, rope_scaling=True, use_cpu_initialization=True
    )
    plain = RotaryEmbedding(CHANNELS, percent, interleaved, None, 500000, use_cpu_initialization=True)
    expected = megatron(9000)
    assert not torch.equal(expected, plain(9000))
    for angles in model.rotary(positions(9000)):
        assert torch.equal(angles, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_head_has_the_base_of_its_group(interleaved):
    q, k = queries_and_keys()
    ours = PositionedRotaryEmbedding(BASES, CHANNELS, HEADS, interleaved=interleaved)
    q_angles, k_angles = ours(positions())
    q_out, k_out = rotate(q, q_angles, interleaved), rotate(k, k_angles, interleaved)
    for group, base in enumerate(BASES):
        angles, _ = PositionedRotaryEmbedding((base,), CHANNELS, HEADS, interleaved=interleaved)(positions())
        assert torch.equal(k_out[:, :, group], rotate(k, angles, interleaved)[:, :, group])
        heads = slice(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        assert torch.equal(q_out[:, :, heads], rotate(q, angles, interleaved)[:, :, heads])


def test_angles_are_the_formula_in_float64():
    """theta = b^(-2 i / d) * m, to float32's accuracy of the angle."""
    _, angles = PositionedRotaryEmbedding(BASES, CHANNELS, HEADS)(positions(40000))
    i = torch.arange(CHANNELS // 2, dtype=torch.float64)
    theta = torch.tensor(BASES, dtype=torch.float64)[:, None] ** (-2 * i / CHANNELS)
    expected = positions(40000).double()[..., None, None] * theta
    torch.testing.assert_close(angles[..., : CHANNELS // 2].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(angles[..., : CHANNELS // 2], angles[..., CHANNELS // 2 :])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_slices_of_tensor_parallel_ranks_make_up_the_whole(tp_size):
    whole = PositionedRotaryEmbedding(BASES, CHANNELS, HEADS)(positions())
    ranks = [
        PositionedRotaryEmbedding(BASES, CHANNELS, HEADS, tp_rank=rank, tp_size=tp_size)(positions())
        for rank in range(tp_size)
    ]
    for q_angles, k_angles in ranks:
        assert q_angles.shape[2] == HEADS // tp_size and k_angles.shape[2] == GROUPS // tp_size
    for expected, slices in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat(slices, dim=2), expected)


@pytest.mark.parametrize("tp_size", [4, 8])
def test_more_ranks_than_groups(tp_size):
    """Megatron gives neighbouring ranks copies of one K/V head: both take the base of that head."""
    bases = BASES[:2]
    whole_q, whole_k = PositionedRotaryEmbedding(bases, CHANNELS, HEADS)(positions())
    ranks = [
        PositionedRotaryEmbedding(bases, CHANNELS, HEADS, tp_rank=rank, tp_size=tp_size)(positions())
        for rank in range(tp_size)
    ]
    assert torch.equal(torch.cat([q for q, _ in ranks], dim=2), whole_q)
    expected = whole_k.repeat_interleave(tp_size // len(bases), dim=2)
    assert torch.equal(torch.cat([k for _, k in ranks], dim=2), expected)


@pytest.mark.parametrize("bases", [BASES, (1e4,)])
def test_positions_pick_rows_of_the_table(bases):
    """Documents restart at 0 and a summary row takes the position of a text row; two sequences differ."""
    rotary, layout = PositionedRotaryEmbedding(bases, CHANNELS, HEADS), RowLayout(chunk_size=4, summary_tokens=2)
    starts = torch.cat([document_starts_from_cu_seqlens(torch.tensor(c)) for c in ([0, 13, 15, 30], [0, 22, 30])])
    rows = row_positions(layout, 30, starts, torch.device("cpu"))
    assert rows.shape == (30 + 7 * 2, 2)
    assert rows[:30, 0].tolist() == [*range(13), *range(2), *range(15)]
    for angles, table in zip(rotary(rows), rotary(positions()), strict=True):
        assert torch.equal(angles, table[rows, 0])


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_casting_the_model_leaves_the_angles_alone(cast):
    """Inverse frequencies were a buffer: Megatron's Float16Module made them, and the positions, 16-bit numbers."""
    model = build_model(KSAConfig(), transformer_config(), bases=(1e4, 5e5))
    expected = model.rotary(positions(5000))
    for angles, before in zip(cast(model).rotary(positions(5000)), expected, strict=True):
        assert angles.dtype == torch.float32
        assert torch.equal(angles, before)


def test_nothing_of_it_is_in_the_checkpoint():
    assert not PositionedRotaryEmbedding(BASES, CHANNELS, HEADS).state_dict()

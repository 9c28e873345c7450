"""The recompute that fits: least in time of everything that fits, by the model of time and memory."""

import dataclasses

import pytest

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.recompute import CHEAP, EVERY, FULL, NONE, Recompute
from megatron_ksa.cost.memory import stage_memory
from megatron_ksa.cost.recompute_fit import GIB, choices, layer_seconds, least, recompute_seconds
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout
from megatron_ksa.errors import UsageError

KSA = KSAConfig(enabled=True, window_chunks="([128]*3+[1024])*6")
SHAPE = ModelShape(
    ksa=KSA, num_layers=24, hidden=2048, ffn=6144, heads=16, kv_heads=16, head_dim=128, vocabulary=151936, qk_norm=True
)
# What torch reports of an H100 of 80 GB.
H100 = 79.18 * GIB


def layout(length: int, **changes) -> TrainingLayout:
    """One GPU without a distributed optimizer."""
    plain = dict(loss=LossConfig(), distributed_optimizer=False, fused_rotation=True, fused_gradient=True)
    return TrainingLayout(text_length=length, **{**plain, **changes})


def memory(recompute: Recompute, plan: TrainingLayout, stage: int = 0) -> float:
    return stage_memory(SHAPE, dataclasses.replace(plan, recompute=recompute), stage).total


def test_nothing_is_recomputed_where_everything_fits():
    assert least(SHAPE, layout(8192), 0, H100).recompute == NONE


@pytest.mark.parametrize("length", [32768, 65536, 131072])
def test_no_recompute_that_fits_takes_less_time(length):
    """Against every number of whole layers with every part of what the other layers can compute again."""
    plan, budget = layout(length), H100 - 4 * GIB
    chosen = least(SHAPE, plan, 0, budget)
    assert chosen.memory.total == memory(chosen.recompute, plan) <= budget
    parts = [tuple(name for place, name in enumerate(CHEAP) if bits >> place & 1) for bits in range(8)]
    others = [(modules, cheap) for modules in ((), ("mlp",)) for cheap in parts]
    for whole in range(24):
        for modules, cheap in others:
            other = Recompute(whole, modules=modules, cheap=cheap)
            if modules and "activation" in cheap:
                continue
            if memory(other, plan) <= budget:
                assert recompute_seconds(SHAPE, plan, 0, other) >= chosen.seconds * (1 - 1e-9), str(other)


def test_less_room_takes_more_time():
    plan, last = layout(32768), -1.0
    for gib in (120, 90, 78, 72, 64, 56, 48, 45):
        choice = least(SHAPE, plan, 0, gib * GIB)
        assert choice.memory.total <= gib * GIB and choice.seconds > last
        last = choice.seconds
    assert choice.slowdown < 1 / 3 + 1e-9


def test_a_long_chain_of_layers_keeps_one_input_for_several():
    """With every layer recomputed apart, 96 inputs of layers are more than a unit of several layers has."""
    shape = dataclasses.replace(SHAPE, num_layers=96, ksa=dataclasses.replace(KSA, window_chunks="128"))
    plan = layout(131072, context_parallel=8, data_parallel=64, distributed_optimizer=True)
    apart = stage_memory(shape, dataclasses.replace(plan, recompute=FULL), 0).total
    choice = least(shape, plan, 0, apart - GIB / 2)
    assert choice.recompute.whole == EVERY and choice.recompute.unit > 1


def test_stages_choose_for_themselves():
    """The first stage holds the activations of as many micro-batches as there are stages, the last of one."""
    plan = layout(32768, pipeline_parallel=4, num_micro_batches=16)
    chosen = [least(SHAPE, plan, stage, 40 * GIB) for stage in range(4)]
    assert chosen[0].seconds > chosen[1].seconds > chosen[2].seconds and chosen[3].seconds < chosen[2].seconds


def test_parts_of_what_is_cheap():
    """Layers that can compute less again recompute more of them whole."""
    plan, budget = layout(32768), H100 - 4 * GIB
    whole = [least(SHAPE, plan, 0, budget, cheap=cheap).recompute.whole for cheap in (CHEAP, ("norms",), ())]
    assert whole == sorted(whole) and whole[0] < whole[2]
    quick = [choice.recompute for choice in choices(SHAPE, plan, 0, budget, thorough=False)]
    assert len(quick) == 4 and quick[-1] == FULL


def test_nothing_that_fits_is_one_line():
    with pytest.raises(
        UsageError, match=r"^no recompute fits: with every layer recomputed the model needs 66\.\d\d GiB"
    ):
        least(SHAPE, layout(131072), 0, 60 * GIB)
    with pytest.raises(UsageError, match="pipeline stage 1 of 2 needs"):
        least(SHAPE, layout(131072, pipeline_parallel=2), 1, GIB)


def test_seconds_are_those_of_the_operations():
    """A layer's forward pass against a third of the model's count of operations, at one rate and no traffic."""
    from megatron_ksa.cost.flops import visible_pairs
    from megatron_ksa.cost.recompute_fit import Rates

    layer, plan = KSA.layers(24, 8192)[0], layout(8192)
    seconds = layer_seconds(SHAPE, layer, plan, Rates(1.0, 1.0, float("inf")))
    weights = 2048 * 2048 * 4 + 3 * 2048 * 6144
    pairs = visible_pairs(8192, 8, 1, 128)
    assert seconds["whole"] == pytest.approx(2 * 9216 * weights + 4 * pairs * 2048)
    assert seconds["mlp"] == 2 * 9216 * 3 * 2048 * 6144 and seconds["norms"] == 0

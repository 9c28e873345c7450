"""The memory model against the GPU's code path on fake tensors, at the sizes of real models."""

import dataclasses

import pytest
from gpu_on_fakes import gpu_path, peaks, ranks_of_two  # noqa: F401 (fixtures)

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.loss import LossConfig
from megatron_ksa.config.recompute import CHEAP, EVERY, FULL, NONE, Recompute
from megatron_ksa.cost.memory import backward_working, loss_working, saved_activations
from megatron_ksa.cost.shapes import ModelShape, TrainingLayout

# Four layers of the 1.9B model, the last with a window over 8,192 tokens.
SIZES = {
    "num_layers": 4, "hidden_size": 2048, "ffn_hidden_size": 6144, "num_attention_heads": 16, "num_query_groups": 16,
    "kv_channels": 128,
}  # fmt: skip
KSA = KSAConfig(enabled=True, window_chunks="[128]*3+[1024]")
WORDS = 151936
RECOMPUTES = [
    NONE, Recompute(cheap=("norms",)), Recompute(cheap=("heads",)), Recompute(cheap=("activation",)),
    Recompute(cheap=CHEAP), Recompute(1, cheap=CHEAP), Recompute(modules=("core_attn",)), Recompute(modules=("mlp",)),
    Recompute(2, modules=("mlp",), cheap=("norms", "heads")), Recompute(3), FULL, Recompute(EVERY, 2),
]  # fmt: skip
# KSA settings; changes of configuration, shape and layout; further arguments of `peaks`.
KINDS = {
    "ksa": (KSA, {}, {}, {}, {}),
    "hybrid": (dataclasses.replace(KSA, layer_pattern="kwlf", summary_tokens=2), {}, {}, {}, {}),
    "full": (KSAConfig(), {}, {}, {}, {}),
    "grouped": (KSA, {"num_query_groups": 4, "ffn_hidden_size": 2048}, {"kv_heads": 4, "ffn": 2048}, {}, {}),
    "no head norm": (KSA, {"qk_layernorm": False}, {"qk_norm": False}, {}, {}),
    "summary": (KSA, {}, {}, {"train": "summary"}, {"train": "summary"}),
    "distil": (KSA, {}, {}, {"train": "summary", "distills": True}, {"train": "summary", "distill": True}),
}


def expected(ksa: KSAConfig, length: int, recompute: Recompute, changes: dict, **layout) -> tuple[int, int, int]:
    """What the model says of `peaks`."""
    sizes = dict(num_layers=4, hidden=2048, ffn=6144, heads=16, kv_heads=16, head_dim=128, vocabulary=WORDS)
    shape = ModelShape(ksa=ksa, **{**sizes, "qk_norm": True, **changes})
    plan = TrainingLayout(
        text_length=length, recompute=recompute, fused_rotation=True, fused_gradient=True,
        **{"loss": LossConfig(1024), **layout},
    )  # fmt: skip
    saved = saved_activations(shape, plan, 0)
    return saved, saved + loss_working(shape, plan), saved + backward_working(shape, plan, 0)


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [*(("ksa", one) for one in RECOMPUTES), *((kind, one) for kind in KINDS for one in (NONE, RECOMPUTES[-1]))],
    ids=str,
)
def test_peaks_are_those_of_the_code(gpu_path, kind, recompute):  # noqa: F811
    """Saved tensors were summed with the largest logits and a whole layer, which never exist together: up to 16 %
    too much, and the layer's own gradients were missing.
    """
    ksa, config, changes, layout, model = KINDS[kind]
    found = peaks(ksa, 16384, recompute, {**SIZES, **config}, loss=LossConfig(1024), vocab_size=WORDS, **model)
    assert found == pytest.approx(expected(ksa, 16384, recompute, changes, **layout), rel=2e-3)


@pytest.mark.parametrize(("recompute", "ffn"), [(NONE, 6144), (FULL, 6144), (FULL, 512)], ids=str)
@pytest.mark.parametrize("pattern", ["k", "w", "f"])
def test_peaks_under_context_parallelism(gpu_path, ranks_of_two, pattern, recompute, ffn):  # noqa: F811
    """The MLP's backward pass is the fullest moment, or attention's beside a narrow MLP."""
    ksa, length = dataclasses.replace(KSA, layer_pattern=pattern), 65536
    sizes = {**SIZES, "context_parallel_size": 2, "ffn_hidden_size": ffn}
    ranks = [peaks(ksa, length, recompute, sizes, loss=LossConfig(1024), vocab_size=WORDS) for _ in ranks_of_two]
    found = tuple(map(max, *ranks))
    assert found == pytest.approx(expected(ksa, length, recompute, {"ffn": ffn}, context_parallel=2), rel=1e-3)

"""Summary parameters of a model that starts from a dense one."""

import torch
from compare import assert_close
from single_process import build_model, random_tokens

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.model.summary_parameters import copy_shared_parameters


def test_summary_projections_and_norms_start_as_the_shared_ones():
    """The weight between them then changes nothing."""
    ksa = KSAConfig(
        enabled=True, chunk_size=4, window_chunks="1", layer_pattern="kklf", independent_qk_norm=True,
        independent_layernorm=True,
    )  # fmt: skip
    model = build_model(ksa).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tokens, positions = random_tokens(1, 32), torch.arange(32)[None]

    def logits(a: float) -> torch.Tensor:
        model.set_summary_coefficient(a)
        with torch.no_grad():
            return model(tokens, positions)

    assert not torch.allclose(logits(1.0), logits(0.25))
    copy_shared_parameters(model)
    assert_close("logits", logits(1.0), logits(0.25))
    layer = model.decoder.layers[0].input_layernorm
    assert torch.equal(layer.summary.weight, layer.text.weight)

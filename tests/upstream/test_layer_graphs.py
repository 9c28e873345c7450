"""What Megatron's CUDA graphs of layers are told to keep, as far as a machine without a GPU can tell."""

import pytest
import torch
from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ksa.model.norm import Norm, ResidualNorm


@pytest.fixture
def observed():
    """Megatron looks at what Python functions save, as while it records graphs."""
    _CudagraphGlobalRecord._enable_saved_tensors_observer()
    yield
    _CudagraphGlobalRecord._disable_saved_tensors_observer()


@pytest.mark.parametrize("kind", [Norm, ResidualNorm])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_megatron_sees_what_torchs_norms_save(observed, kind, normalization):
    """It gave the memory of these rows to other layers: gradients were 4 % off on a GPU, and nothing said so."""
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, normalization=normalization)
    norm = kind(config, 32)
    torch.manual_seed(0)
    rows = torch.randn(6, 2, 32)
    plain = rows.clone().requires_grad_()
    expected = norm(plain)
    expected.square().sum().backward()
    assert not hasattr(plain, "cg_buffer_metadata")

    config.cuda_graph_impl = "local"
    kept, whole = (rows.clone().requires_grad_() for _ in range(2))
    actual = norm(kept)
    actual.square().sum().backward()
    assert kept.cg_buffer_metadata.is_saved_for_backward
    assert torch.equal(actual, expected) and torch.equal(kept.grad, plain.grad)
    # A layer that text alone passes through hands a view on.
    norm(whole[:4])
    assert whole.cg_buffer_metadata.is_saved_for_backward

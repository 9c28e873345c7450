"""The embedding's gradient, added to its buffer by rows: torch's, whatever words occur how often."""

import pytest
import torch
import triton
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from single_process import process_groups, transformer_config
from triton.language import standard

from megatron_ksa.kernels import dispatch, embedding_gradient
from megatron_ksa.upstream import embedding
from megatron_ksa.upstream.patches import apply

INTERPRETED = not isinstance(standard.sum, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(
    "add_rows",
    [embedding_gradient._reference, pytest.param(embedding_gradient._add_rows, marks=needs_kernels)],
    ids=["reference", "triton"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "words", "size"), [(40, 3, 24), (17, 100, 600), (8, 1, 16), (1, 5, 8), (0, 5, 8)])
def test_rows_are_added_to_their_words(add_rows, dtype, count, words, size):
    """A word of 16 rows and more than one block of them, words that do not occur, and one that ends at the last row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(words, (count,), generator=generator).to(DEVICE)
    rows = torch.randn(count, size, generator=generator).to(DEVICE, dtype)
    total = torch.randn(words, size, generator=generator).to(DEVICE)
    expected = total.double().index_add(0, ids, rows.double())
    add_rows(ids, rows, total)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_buffer_gets_torchs_gradient(monkeypatch, scatters, shared):
    """Two micro-batches; an embedding that is the output layer too is left to Megatron."""
    process_groups()
    calls = []
    add = embedding.add_rows
    monkeypatch.setattr(embedding, "add_rows", lambda *given: calls.append(given) or add(*given))
    # The flag asks for apex's kernel, which nothing here calls.
    config = transformer_config()
    config.gradient_accumulation_fusion = True
    results = []
    for apart in ({"embedding"}, ()):
        dispatch.take_apart(apart)
        torch.manual_seed(0)
        group = process_groups().tp
        module = VocabParallelEmbedding(
            11, 8, init_method=torch.nn.init.normal_, reduce_scatter_embeddings=scatters, config=config, tp_group=group
        )
        module.weight.shared_embedding = shared
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
        with apply(embedding.PATCHES):
            model.zero_grad_buffer()
            for seed in range(2):
                ids = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(seed))
                rows = model(ids)
                rows.square().sum().backward()
            model.finish_grad_sync()
        results.append((rows.detach(), module.weight.main_grad.clone()))
    dispatch.take_apart(())
    assert len(calls) == (0 if shared else 2)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)

"""The zig-zag split of a sequence over context-parallel ranks."""

import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_ksa.layout.zigzag import ZigZag


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_restore_undoes_take(size, dim):
    whole = torch.randn(24, 24, 2)
    parts = torch.cat([ZigZag(rank, size).take(whole, dim) for rank in range(size)], dim)
    assert_close("restored", ZigZag(0, size).restore(parts, dim), whole)
    assert_close("by rank", ZigZag(0, size).by_rank(whole, dim), parts)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_takes_what_megatron_gives_it(rank, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    tokens = torch.arange(48).view(2, 24)
    batch = get_batch_on_this_cp_rank({"tokens": tokens}, is_hybrid_cp=False)
    assert torch.equal(ZigZag(rank, 3).take(tokens, dim=1), batch["tokens"])

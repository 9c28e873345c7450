"""The whole model on two context-parallel ranks: what a forward pass sends, and the logits of one rank."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from processes import run_processes
from single_process import VOCABULARY, build_model, random_tokens, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.layout.zigzag import ZigZag
from megatron_ksa.model.gpt import KSAGPTModel
from megatron_ksa.platform import activate_cpu_platform

KSA = KSAConfig(enabled=True, chunk_size=4, summary_tokens=2, window_chunks="1", layer_pattern="kklf")
LENGTHS = [10, 37, 17]


def inputs():
    """Tokens and positions of a packed sequence, int64 [1, 64] each."""
    return random_tokens(1, 64), torch.cat([torch.arange(length) for length in LENGTHS])[None]


def two_ranks():
    """This rank's logits, and how often a forward pass gathered positions."""
    activate_cpu_platform()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    torch.manual_seed(0)
    config = transformer_config(context_parallel_size=2, cp_comm_type="p2p")
    model = KSAGPTModel(config, KSA, 64, vocab_size=VOCABULARY, reset_documents=True, pg_collection=groups).eval()
    gather, gathered = dist.all_gather, Counter()

    def counted(parts, own, **kwargs):
        gathered[own.dtype] += 1
        return gather(parts, own, **kwargs)

    dist.all_gather = counted
    split = ZigZag(dist.get_rank(), 2)
    with torch.no_grad():
        logits = model(*(split.take(part, dim=1) for part in inputs()))
    return {"logits": logits, "gathered": gathered[torch.int32]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_processes(two_ranks, 2, tmp_path_factory.mktemp("ranks"))


def test_documents_are_gathered_once(ranks):
    """Where documents start was found twice a forward pass: a second all-gather of the positions."""
    assert [rank["gathered"] for rank in ranks] == [1, 1]


def test_ranks_give_the_logits_of_one(ranks):
    model = build_model(KSA, reset_documents=True).eval()
    with torch.no_grad():
        expected = model(*inputs())
    assert_close("logits", ZigZag(size=2).restore(torch.cat([rank["logits"] for rank in ranks], dim=1), 1), expected)

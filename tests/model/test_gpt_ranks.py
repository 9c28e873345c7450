"""The whole model on two ranks, without the trainer: what context parallelism sends, rows between pipeline stages."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from processes import run_processes
from single_process import VOCABULARY, build_model, random_tokens, transformer_config

from megatron_ksa import KSAConfig, KSAGPTModel, activate_cpu_platform, pipeline_rows, prepare_config
from megatron_ksa.layout.zigzag import ZigZag
from megatron_ksa.upstream.patches import Patch, apply, signature

pytestmark = pytest.mark.slow
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
    gathered = Counter()

    def counting(gather):
        def counted(parts, own, **kwargs):
            gathered[own.dtype] += 1
            return gather(parts, own, **kwargs)

        return counted

    count = Patch("torch.distributed:all_gather", counting, why="calls are counted", expects=signature(dist.all_gather))
    split = ZigZag(dist.get_rank(), 2)
    with torch.no_grad(), apply([count]):
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


def two_stages():
    """Losses on the last stage of two, where stages tell each other their shapes, and where the schedule knows them."""
    activate_cpu_platform()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    groups, losses = ProcessGroupCollection.use_mpu_process_groups(), []
    tokens, positions = inputs()
    model_parallel_cuda_manual_seed(0)

    def forward_step(_, model):
        return model(tokens, positions, labels=tokens), lambda out: (out.mean(), {"loss": out.mean().detach()})

    for rows in (None, pipeline_rows(KSA, 64)):
        stages = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
        config = prepare_config(transformer_config(**stages), KSA, 64, decoder_seq_length=rows)
        torch.manual_seed(0)
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        ends = {"pre_process": first, "post_process": last, "pg_collection": groups}
        model = KSAGPTModel(config, KSA, 64, vocab_size=VOCABULARY, **ends)
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=2,
            seq_length=64,
            micro_batch_size=1,
            decoder_seq_length=rows,
        )
        gradient = sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None)
        losses.append(([result["loss"] for result in results], gradient, config.variable_seq_lengths))
    return losses


def test_pipeline_stages_of_another_loop(tmp_path):
    """Megatron's schedule makes room for text rows alone unless it is told, or stages tell each other."""
    (first, _), (last, last_told) = run_processes(two_stages, 2, tmp_path)
    assert first[2] and last[2] and not last_told[2]
    assert len(last[0]) == 2 and torch.equal(torch.stack(last[0]), torch.stack(last_told[0]))
    assert first[1] > 0 and last[1] == last_told[1] > 0

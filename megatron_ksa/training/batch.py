"""Batches of a pretraining step: read on tensor-parallel rank 0, broadcast, cut for context parallelism."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from torch import Tensor

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


@dataclass
class Batch:
    """Tensors of one micro-batch; those that a pipeline stage does not need are None.

    tokens, labels and position_ids are int64 [batch, n], loss_mask float32 [batch, n], attention_mask bool
    [batch, 1, n, n] (Megatron's own attention only).
    """

    tokens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None


def get_batch(data_iterator: Iterator | None, args: argparse.Namespace, vp_stage: int | None = None) -> Batch:
    """The next micro-batch of this rank.

    Where documents are reset every pipeline stage needs their positions, so every stage reads the data.
    """
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    if not (first or last or args.reset_position_ids):
        return Batch()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Tensor | None] = {}
    if tp_rank == 0:
        read = next(data_iterator)
        batch = {key: None if read.get(key) is None else read[key].cuda(non_blocking=True) for key in KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=args.mtp_num_layers is not None,
        pipeline_model_parallel_size=1 if args.reset_position_ids else args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    if args.context_parallel_size > 1:
        cp_group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    return Batch(**{key: batch.get(key) for key in KEYS})

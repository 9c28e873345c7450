"""A minimal Megatron-Core training loop with KSA, without this project's trainer: five marked lines are KSA's.

    pip install -e '.[train]'
    python examples/library/megatron_loop.py --steps 60 --save /tmp/loop
    torchrun --nproc-per-node 2 examples/library/megatron_loop.py --tensor-parallel 2

It follows Megatron-Core's example `run_simple_mcore_train_loop.py`: process groups, a model wrapped for data
parallelism, Megatron's schedule, an optimizer, a distributed checkpoint. The data are sequences that count upwards from
a random token, which a model learns in a minute. It runs on GPUs with NCCL, and on a CPU with gloo.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_ksa import activate_cpu_platform

BACKEND = "gloo" if activate_cpu_platform() else "nccl"  # KSA 1: before Megatron is imported

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ksa import KSAConfig, KSAGPTModel, prepare_config
from megatron_ksa.platform.ports import free_port

LENGTH, BATCH, VOCABULARY = 64, 8, 100
KSA = KSAConfig(enabled=True, chunk_size=8, window_chunks="2", layer_pattern="kkkf")  # KSA 2


def start_processes(tensor_parallel: int) -> None:
    """Join the other processes of torchrun, or stay alone; make Megatron's process groups."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": str(free_port())}).items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(BACKEND)
    parallel_state.initialize_model_parallel(tensor_parallel)
    model_parallel_cuda_manual_seed(123)


def make_model(tensor_parallel: int) -> KSAGPTModel:
    """A small model on this process's device."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tensor_parallel,
        transformer_impl="local",
        hidden_dropout=0.0,
        attention_dropout=0.0,  # KSA 3: Megatron's default of 0.1 is refused
    )
    config = prepare_config(config, KSA, LENGTH)  # KSA 4
    torch.manual_seed(123)
    # KSA 5; it was: GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, position_embedding_type="rope")
    model = KSAGPTModel(config, KSA, LENGTH, vocab_size=VOCABULARY)
    return model.cuda()


def counting(seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of sequences that count upwards, modulo the vocabulary; int64 [batch, n] each."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        words = (start + torch.arange(LENGTH + 1)) % VOCABULARY
        yield {
            "tokens": words[:, :-1].cuda(),
            "labels": words[:, 1:].cuda(),
            "position_ids": torch.arange(LENGTH).expand(BATCH, -1).cuda(),
        }


def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """What Megatron's schedule calls for each micro-batch: token losses [batch, n], and what averages them."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, mean_loss


def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of the token losses, in nats; loss and logits have the text length, so that nothing changes here."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach()}


def train(model: DistributedDataParallel, steps: int) -> None:
    """Adam on one micro-batch a step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    run_schedule, batches = get_forward_backward_func(), counting(parallel_state.get_data_parallel_rank())
    for step in range(1, steps + 1):
        model.zero_grad_buffer()
        (result,) = run_schedule(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
        )
        finalize_model_grads([model])
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        optimizer.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step:4d}/{steps} | loss {result['loss'].item():.4f} nats", flush=True)


def save(model: KSAGPTModel, folder: Path) -> None:
    """Write a distributed checkpoint, and read it back into the model."""
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(prefix=""), str(folder))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(prefix=""), str(folder)))
    if torch.distributed.get_rank() == 0:
        print(f"saved and loaded {folder}", flush=True)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--save", type=Path, help="folder for a checkpoint, empty or new")
    options = parser.parse_args()
    start_processes(options.tensor_parallel)
    model = make_model(options.tensor_parallel)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(config=model.config, ddp_config=settings, module=model)
    train(wrapped, options.steps)
    if options.save:
        save(model, options.save)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

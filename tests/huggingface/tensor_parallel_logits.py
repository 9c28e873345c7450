"""Logits of Megatron checkpoints at tensor-parallel size 2; run by torchrun, two processes.

Usage: tensor_parallel_logits.py TOKENS.pt OUTPUT.pt CHECKPOINT...; the first rank writes {checkpoint: logits}.
"""

import sys
from pathlib import Path

import torch

from megatron_ksa.platform import prepare_platform


def main() -> None:
    defaults = prepare_platform([])
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ksa.checkpoint import load

    tokens, output, *folders = map(Path, sys.argv[1:])
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    load.ALONE["tensor_model_parallel_size"] = 2
    found = {}
    for folder in folders:
        model = load.load_model(load.find_checkpoint(folder), defaults, torch.float32)
        with torch.no_grad():
            part = model(torch.load(tokens), None)
        found[str(folder)] = tensor_parallel.gather_from_tensor_model_parallel_region(part)
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)


if __name__ == "__main__":
    main()

"""`pretrain_gpt.py` that also writes every iteration's loss and gradient norm, at full precision, as JSON.

Usage: recorded_pretrain.py RUNS.json [SECONDS], a list of {"record": path, "flags": [...]}. The runs go one after the
other in one set of processes, each as in processes of its own; the last rank, which has the loss, writes the records.
After so many SECONDS each rank writes its stacks to stacksRANK.txt beside RUNS.json.
"""

import faulthandler
import json
import os
import sys
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import pretrain_gpt  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402


def forget_run() -> None:
    """Drop what a run leaves in Megatron's globals, but for the processes' connection."""
    from megatron.core import parallel_state, rerun_state_machine
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    parallel_state.destroy_model_parallel()
    rerun_state_machine.destroy_rerun_state_machine()
    destroy_num_microbatches_calculator()
    destroy_global_vars()
    for stage in FullCudaGraphWrapper.cuda_graph:
        FullCudaGraphWrapper.cuda_graph[stage] = FullCudaGraphWrapper.result[stage] = None
        FullCudaGraphWrapper.curr_iteration[stage] = 0
        StaticBufferLoader.static_buffers[stage] = []
    if "transformer_engine.pytorch" in sys.modules:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()


def main() -> None:
    description, *limit = sys.argv[1:]
    if limit:
        stacks = Path(description).with_name(f"stacks{os.environ['RANK']}.txt").open("w")
        faulthandler.dump_traceback_later(float(limit[0]), file=stacks)
    runs = json.loads(Path(description).read_text())
    prepare_platform(runs[0]["flags"])
    import torch

    from megatron_ksa.model import prepare
    from megatron_ksa.upstream.patches import apply
    from megatron_ksa.upstream.trainer import TRAINING_LOG

    # What is compared here is what decides about it.
    prepare.REFUSES_UNCHECKED = False
    for run in runs:
        steps = {}

        def recording(log, record=Path(run["record"]), steps=steps):
            @wraps(log)
            def recorded(loss_dict, *args, **kwargs):
                iteration, grad_norm = args[2], args[6]
                if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                    others = {name: value.item() for name, value in loss_dict.items() if name != "lm loss"}
                    steps[iteration] = {"loss": loss_dict["lm loss"].item(), "grad_norm": float(grad_norm), **others}
                    record.write_text(json.dumps(steps))
                return log(loss_dict, *args, **kwargs)

            return recorded

        sys.argv = [sys.argv[0], *run["flags"]]
        with apply([TRAINING_LOG.given(recording)]):
            pretrain_gpt.main()
        forget_run()


if __name__ == "__main__":
    main()

"""What a run leaves in Megatron's globals, for processes that train more than once."""

import sys


def forget_run() -> None:
    """Reset these globals, so that the next run begins as in a new process; torch.distributed stays initialised."""
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

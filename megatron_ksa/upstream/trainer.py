"""Functions of Megatron's trainer that this project wraps: `pretrain` has no callbacks for them."""

from functools import wraps

from megatron_ksa.upstream.patches import Patch

# `given(wrap)`, as for most of the patches below: `wrap` gets Megatron's function and returns what is called instead.
LOAD_CHECKPOINT = Patch(
    "megatron.training.training:load_checkpoint",
    lambda original, wrap: wrap(original),
    why="a dense checkpoint starts a KSA model, and norms have two names",
    expects="(ddp_model, optimizer, opt_param_scheduler, load_arg='load', strict=True, checkpointing_context=None, "
    "skip_load_to_model_and_opt=False, tp_group=None, pp_group=None, dp_cp_group=None, dp_group=None, "
    "expt_dp_group=None, rng_state_key_prefix='')",
)
# `given(adapt)`: changes the state of Megatron's own GPT model, {name: sharded tensor}, when a checkpoint is read.
SHARDED_STATE = Patch(
    "megatron.core.models.gpt.gpt_model:GPTModel.sharded_state_dict",
    lambda original, adapt: wraps(original)(lambda *args, **options: adapt(original(*args, **options))),
    why="a checkpoint has other names for what the model asks for",
    expects="(self, prefix='', sharded_offsets=tuple, metadata=None)",
)
SAVE_CHECKPOINT = Patch(
    "megatron.training.training:save_checkpoint",
    lambda original, wrap: wrap(original),
    why="a full disk ends a save in a traceback that names neither the folder nor the checkpoint that is left",
    expects="(iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
    "checkpointing_context=None, pipeline_rank=None, expert_rank=None, tensor_rank=None, pipeline_parallel=None, "
    "expert_parallel=None, non_persistent_ckpt=False, train_data_iterator=None, preprocess_common_state_dict_fn=None, "
    "release=False, tp_group=None, pp_group=None, dp_cp_group=None, dp_group=None, expt_dp_group=None, "
    "rng_state_key_prefix='')",
)
FINALIZE_SAVE = Patch(
    "megatron.training.training:maybe_finalize_async_save",
    lambda original, wrap: wrap(original),
    why="an asynchronous save that fails on a full disk ends in a traceback that names neither folder nor checkpoint",
    expects="(blocking=False, terminate=False)",
)
TRAIN_STEP = Patch(
    "megatron.training.training:train_step",
    lambda original, wrap: wrap(original),
    why="iterations are measured, what CUDA graphs read is written between them, and FP8 finds its first scales",
    expects="(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, forward_backward_func, "
    "iteration=None, pg_collection=None, p2p_communicator=None)",
)
TRAINING_LOG = Patch(
    "megatron.training.training:training_log",
    lambda original, wrap: wrap(original),
    why="losses and gradient norms are recorded at full precision",
    expects="(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, "
    "grad_norm, params_norm, num_zeros_in_grad, max_attention_logit, pg_collection=None, is_first_iteration=False, "
    "seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None)",
)
OPTIMIZER_STEP = Patch(
    "megatron.core.optimizer.optimizer:ChainedOptimizer.step",
    lambda original, wrap: wrap(original),
    why="the optimizer's part of an iteration is measured",
    expects="(self)",
)
PATCHES = (LOAD_CHECKPOINT, SAVE_CHECKPOINT, FINALIZE_SAVE, SHARDED_STATE, TRAIN_STEP, TRAINING_LOG, OPTIMIZER_STEP)

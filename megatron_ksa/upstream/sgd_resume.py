"""Resume of `--optimizer sgd`: Megatron 0.19.2 gives SGD no function that makes the state which a checkpoint fills."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from megatron_ksa.upstream.patches import Patch


def allocate_momentum(sgd: torch.optim.Optimizer, config: Any = None) -> None:
    """Give each parameter a momentum of zeros, where the optimizer has momentum: its first step is the same."""
    for group in sgd.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            sgd.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.data))


def _resumable(build: Callable) -> Callable:
    @wraps(build)
    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        for part in getattr(built, "chained_optimizers", [built]):
            # SGD of torch, Transformer Engine or apex: their groups have a momentum.
            groups = getattr(getattr(part, "optimizer", None), "param_groups", ())
            if getattr(part, "init_state_fn", 0) is None and all("momentum" in group for group in groups):
                part.init_state_fn = allocate_momentum
        return built

    return get_megatron_optimizer


PATCHES = (
    Patch(
        "megatron.training.training:get_megatron_optimizer",
        _resumable,
        why="a run with --optimizer sgd does not resume",
        expects="(config, model_chunks, config_overrides=None, use_gloo_process_groups=True, pg_collection=None, "
        "dump_param_to_param_group_map=None)",
    ),
)

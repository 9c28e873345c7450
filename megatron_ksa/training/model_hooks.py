"""Flags that act on a model between its construction and DDP, in a part of Megatron that a configured model skips.

Megatron 0.19.2 builds a model from its configuration without `get_model`, where these flags stand.
"""

import argparse
from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule

Hook = Callable[[list[MegatronModule]], list[MegatronModule]]


def model_hooks(args: argparse.Namespace) -> list[Hook]:
    """What to do with a model's stages before they are wrapped."""
    hooks: list[Hook] = []
    if args.freeze_all_layers:
        hooks.append(freeze)
    if args.use_cpu_initialization and not args.use_torch_fsdp2:
        hooks.append(to_device)
    return hooks


def freeze(stages: list[MegatronModule]) -> list[MegatronModule]:
    """`--freeze-all-layers`: no parameter is trained, and routers keep the biases of their experts."""
    for stage in stages:
        stage.requires_grad_(False)
        for module in stage.modules():
            if hasattr(module, "frozen_expert_bias"):
                module.frozen_expert_bias = True
    return stages


def to_device(stages: list[MegatronModule]) -> list[MegatronModule]:
    """`--use-cpu-initialization`: weights are made on the CPU, and trained on the GPU."""
    return [stage.cuda(torch.cuda.current_device()) for stage in stages]

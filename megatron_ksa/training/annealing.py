"""Annealing beside CUDA graphs: the coefficient is written between iterations, and the graphs read it."""

import argparse
from collections.abc import Callable
from functools import wraps

from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron_ksa.config.ksa import KSAConfig


def is_annealed_in_graphs(args: argparse.Namespace, ksa: KSAConfig) -> bool:
    """Whether a CUDA graph repeats the forward pass of a model whose coefficient changes."""
    return args.cuda_graph_impl != "none" and ksa.enabled and ksa.anneal_start is not None


def annealed(train_step: Callable, args: argparse.Namespace, ksa: KSAConfig) -> Callable:
    """Megatron's `train_step` that first sets every model chunk's coefficient for the iteration.

    A forward step cannot set it: where a graph repeats the iteration, its Python does not run.
    """

    @wraps(train_step)
    def step(forward_step: Callable, data: object, model: list[MegatronModule], *rest, **options) -> tuple:
        for chunk in unwrap_model(model):
            chunk.set_summary_coefficient(ksa.summary_coefficient(args.curr_iteration))
        return train_step(forward_step, data, model, *rest, **options)

    return step

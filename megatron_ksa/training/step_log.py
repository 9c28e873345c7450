"""What the trainer's log line and TensorBoard show of a step beyond the losses that the last stage knows."""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ksa.config.ksa import LayerKind
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.model.gpt import KSAGPTModel

ATTENTION = "attention loss"
COSINE = "attention cosine"
COEFFICIENT = "summary coefficient"
SHARE = "summary attention share"


class StepLog:
    """Collects values of the model chunks of this rank, and makes them those of the whole model and batch."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.chunks: dict[int, KSAGPTModel] = {}
        self.shares: list[Tensor] = []
        self.passes = 0

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to add to Megatron's log."""
        return self._shows_coefficient or self.settings.stage.log_attention_share

    @property
    def _shows_coefficient(self) -> bool:
        ksa = self.settings.ksa
        return self.settings.distill.enabled or ksa.anneal_start is not None or ksa.initial_coefficient not in (None, 1)

    @contextlib.contextmanager
    def watch(self, chunk: MegatronModule) -> Iterator[None]:
        """Include an unwrapped model chunk of this rank, of which a micro-batch's forward pass follows."""
        self.chunks[id(chunk)] = chunk
        if not (self.settings.stage.log_attention_share and torch.is_grad_enabled()):
            yield
            return
        chunk.measure_attention_share(True)
        yield
        self.shares += [share for core in chunk.summary_cores() for share in core.shares]
        self.passes += 1
        chunk.measure_attention_share(False)

    def take(self, iteration: int) -> dict[str, Tensor]:
        """Values by name, the same on all ranks, of the iteration that ended as number `iteration`, counted from 1."""
        values: dict[str, Tensor] = {}
        if not self.chunks:
            return values
        device = next(next(iter(self.chunks.values())).parameters()).device
        if self._shows_coefficient:
            values[COEFFICIENT] = torch.tensor(self.settings.ksa.summary_coefficient(iteration - 1), device=device)
        if self.settings.stage.log_attention_share:
            micro_batches = self.passes / len(self.chunks)
            total = sum(self.shares, torch.zeros((), device=device)) / max(micro_batches * self._summary_layers(), 1)
            self.shares, self.passes = [], 0
            values[SHARE] = self._of_all_ranks(total, divided=True)
        if self.settings.distill.compares_attention and self.settings.distill.enabled:
            means = self._attention_terms(device)
            values[ATTENTION] = means[0]
            if self.settings.distill.cosine_weight:
                values[COSINE] = means[1]
        return values

    def _attention_terms(self, device: torch.device) -> Tensor:
        """Both attention terms, float32 [2], of all layers, rows and samples."""
        sums = torch.zeros(2, device=device)
        for chunk in self.chunks.values():
            for term in chunk.distillation.terms:
                part = term.take()
                if part is not None:
                    sums += part
        return self._of_all_ranks(sums, divided=next(iter(self.chunks.values())).config.sequence_parallel)

    def _of_all_ranks(self, value: Tensor, *, divided: bool) -> Tensor:
        """Sum over pipeline stages, mean over data and context parallelism, and over tensor parallelism if divided."""
        groups: ProcessGroupCollection = next(iter(self.chunks.values())).pg_collection
        dist.all_reduce(value, group=groups.pp)
        for group in (groups.dp_cp, *([groups.tp] if divided else [])):
            dist.all_reduce(value, group=group)
            value /= group.size()
        return value

    def _summary_layers(self) -> int:
        """Layers of the whole model whose text sees summaries."""
        chunk = next(iter(self.chunks.values()))
        layers = self.settings.ksa.layers(chunk.config.num_layers, self.settings.ksa.chunk_size)
        return sum(layer.kind == LayerKind.KSA for layer in layers)

    def extended(self, training_log: Callable) -> Callable:
        """The trainer's log of a step, with these values among its losses."""

        @wraps(training_log)
        def logged(loss_dict: dict, totals: dict, learning_rate: float | None, iteration: int, *rest, **options):
            losses = {**loss_dict, **self.take(iteration)}
            return training_log(losses, totals, learning_rate, iteration, *rest, **options)

        return logged

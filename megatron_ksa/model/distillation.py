"""Teacher and student in one model: the decoder runs twice in a step, the first time as the dense model.

On every pipeline stage the decoder's rows are `[text | summaries | teacher's text]`. The teacher's rows go first,
without gradients, through the same layers with full causal attention, text projections and no summary rows; each KSA
layer keeps its attention output for the student (`AttentionTerm`). Then the student's rows follow as they always do.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.attention import KSASelfAttention
from megatron_ksa.model.attention_term import AttentionTerm

TEXT_ONLY = RowLayout(1, 0)


@contextlib.contextmanager
def as_dense(decoder: nn.Module) -> Iterator[None]:
    """Run the decoder's layers on text rows alone, as those of the dense model that has the same shared weights.

    Without dropout and activation recompute, which only a backward pass needs.
    """
    layouts = {module: module.layout for module in decoder.modules() if hasattr(module, "layout")}
    cores = [module for module in decoder.modules() if hasattr(module, "causal")]
    training = decoder.training
    for module in layouts:
        module.layout = TEXT_ONLY
    for core in cores:
        core.causal = True
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(training)
        for module, layout in layouts.items():
            module.layout = layout
        for core in cores:
            core.causal = False


class Distillation:
    """What a model needs to be its own teacher.

    Args:
        decoder: Megatron's transformer block of this pipeline stage.
        num_ksa_layers: of the whole model, over which the attention term is a mean.
    """

    def __init__(self, decoder: nn.Module, layout: RowLayout, config: DistillConfig, num_ksa_layers: int) -> None:
        self.layout, self.config = layout, config
        self.terms: list[AttentionTerm] = []
        row_shards = decoder.config.tensor_model_parallel_size if decoder.config.sequence_parallel else 1
        for module in decoder.modules() if config.compares_attention else ():
            if isinstance(module, KSASelfAttention):
                module.term = AttentionTerm(config, num_ksa_layers, row_shards)
                self.terms.append(module.term)
        self._teacher_rows: Tensor | None = None
        decoder.register_forward_pre_hook(self._teach, with_kwargs=True)
        decoder.register_forward_hook(self._join)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The student's rows `[text | summaries]` and the teacher's, of a shard's `[text | summaries | teacher]`."""
        chunks = len(rows) // (2 * self.layout.chunk_size + self.layout.summary_tokens)
        text = chunks * self.layout.chunk_size
        return rows.split([len(rows) - text, text])

    def set_scale(self, scale: Tensor | float) -> None:
        """Set what a term's mean is multiplied by in the loss whose gradient the backward pass computes."""
        for term in self.terms:
            term.scale = scale

    def _teach(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the decoder: the teacher's pass; what is left to the decoder is the student's."""
        rows = kwargs["hidden_states"] if decoder.pre_process else decoder.input_tensor
        student, teacher = self.split(rows)
        for term in self.terms:
            term.trains = torch.is_grad_enabled()
            term.is_teacher = True
        with torch.no_grad(), as_dense(decoder):
            dense = {**kwargs, "rotary_pos_emb": self._text_rows(kwargs.get("rotary_pos_emb"))}
            # Not a call of the module, whose hooks would teach the teacher.
            self._teacher_rows = decoder.forward(**self._give(decoder, dense, teacher.detach()))
        for term in self.terms:
            term.is_teacher = False
        return args, self._give(decoder, kwargs, student)

    def _text_rows(self, rotary: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
        """Positions or angles of the text rows."""
        if rotary is None or isinstance(rotary, Tensor):
            return None if rotary is None else self.layout.split(rotary)[0]
        return tuple(self.layout.split(angles)[0] for angles in rotary)

    def _give(self, decoder: nn.Module, kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """Arguments of the decoder with other rows; on later stages it takes them from `input_tensor`."""
        if decoder.pre_process:
            return {**kwargs, "hidden_states": rows}
        decoder.set_input_tensor(rows)
        return kwargs

    def _join(self, decoder: nn.Module, args: tuple, student: Tensor) -> Tensor:
        """After the decoder: the student's rows and the teacher's."""
        rows, self._teacher_rows = torch.cat([student, self._teacher_rows]), None
        return rows

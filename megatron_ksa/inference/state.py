"""The state of sequences that are decoded side by side: allocated once, for a number of sequences and of tokens each.

Each sequence has a slot. Sequences join and leave at any time; their lengths differ. Logits equal those of the full
forward pass at every position.
"""

import dataclasses
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from megatron_ksa.errors import UsageError
from megatron_ksa.inference.memory import check_room
from megatron_ksa.kernels.dispatch import uses_triton
from megatron_ksa.kernels.ksa_decode import OP
from megatron_ksa.layout.rows import RowLayout
from megatron_ksa.model.cache import LayerCache, NextTokens, Segment
from megatron_ksa.model.core_attention import KSACoreAttention, TextCoreAttention
from megatron_ksa.model.forward import device_of, hidden_states, logits_of
from megatron_ksa.model.gpt import KSAGPTModel

# Tokens of a prompt that go through the layers at a time: enough rows for full matrix products.
SEGMENT = 4096


def core_attentions(model: KSAGPTModel) -> list[KSACoreAttention | TextCoreAttention]:
    """The core attention of each layer, in order."""
    return [module for module in model.decoder.modules() if isinstance(module, KSACoreAttention | TextCoreAttention)]


def sequence_bytes(model: KSAGPTModel, max_length: int) -> int:
    """Bytes of keys and values that a sequence of at most max_length tokens has in all layers, without allocating."""
    config = model.config
    rows = sum(core.cache_geometry(max_length).rows for core in core_attentions(model))
    element = next(model.parameters()).element_size()
    return 2 * rows * config.num_query_groups * config.kv_channels * element


class DecodingState:
    """Context manager in which a model goes on with sequences whose keys and values it keeps.

    A full layer keeps every token, a window layer the text of its window, a KSA layer every summary too. Keys are
    rotated by their KV group's base before they are kept, so that a step rotates new rows only.

    Args:
        model: a whole model in eval mode, on one device; it serves this state alone until the context ends.
        max_batch: sequences at a time.
        max_length: tokens of the longest sequence.
        segment: tokens of a prompt at a time; the peak memory of a prompt is that of the state and one segment.
        every_slot: a step runs the rows of all slots, whoever goes on, so that a sequence's logits do not depend on who
            else is there, to the last bit, and the step can be captured. By default so on a GPU.
        cuda_graph: capture such steps in CUDA graphs, on a GPU.

    Attributes:
        lengths: tokens of the sequence in each slot.

    Raises:
        UsageError: a model in training mode or in use by another state, sizes below 1, or more bytes than the device
            has free.
    """

    def __init__(
        self,
        model: KSAGPTModel,
        max_batch: int,
        max_length: int,
        segment: int = SEGMENT,
        *,
        every_slot: bool | None = None,
        cuda_graph: bool = True,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_length", max_length), ("segment", segment)):
            if value < 1:
                raise UsageError(f"{name} {value}: at least 1")
        if model.training:
            raise UsageError("the model is in training mode, in which dropout changes the logits: call model.eval()")
        self.model, self.max_batch, self.max_length = model, max_batch, max_length
        self.segment = min(segment, max_length)
        self.device = device_of(model)
        self._layout = model.layout
        self._cores = core_attentions(model)
        # Which rows of a step are text depends on where in its chunk the step starts.
        self._laid_out = [m for m in model.modules() if isinstance(getattr(m, "layout", None), RowLayout)]
        one = sequence_bytes(model, max_length)
        check_room(one, max_batch, max_length, self.device, lambda length: sequence_bytes(model, length))
        self.caches = [self._new_cache(core) for core in self._cores]
        self.lengths = [0] * max_batch
        self._joined: set[int] = set()
        # The same on the device, where a captured step reads and advances them.
        self.device_lengths = torch.zeros(max_batch, dtype=torch.int64, device=self.device)
        self._free = list(range(max_batch))[::-1]
        self._resets_documents = model.reset_documents
        on_gpu = self.device.type == "cuda"
        self.every_slot = on_gpu if every_slot is None else every_slot
        # The kernels' reference waits for the device.
        captures = cuda_graph and on_gpu and uses_triton(OP, next(model.parameters()))
        self._steps = StepOfAllSlots(self, captures) if self.every_slot else None

    def _new_cache(self, core: KSACoreAttention | TextCoreAttention) -> LayerCache:
        config = self.model.config
        return LayerCache(
            core.cache_geometry(self.max_length), self.max_length, self.max_batch, config.num_query_groups,
            config.kv_channels, next(self.model.parameters()).dtype, self.device,
        )  # fmt: skip

    def bytes(self) -> int:
        """Bytes of the keys and values, as allocated."""
        return sum(rows.numel() * rows.element_size() for cache in self.caches for rows in (cache.key, cache.value))

    def __enter__(self) -> "DecodingState":
        if any(core.cache is not None for core in self._cores):
            raise UsageError("the model serves another state: end that one first")
        for core, cache in zip(self._cores, self.caches, strict=True):
            core.cache = cache
        # Positions come from the state, and every slot is one document.
        self.model.reset_documents = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lay_out(0, 0)
        self.model.reset_documents = self._resets_documents
        for core in self._cores:
            core.cache = None

    @property
    def has_room(self) -> bool:
        """A slot is free."""
        return bool(self._free)

    def join(self) -> int:
        """A free slot, for a new sequence.

        Raises:
            UsageError: all slots are taken.
        """
        if not self._free:
            raise UsageError(f"all {self.max_batch} slots are taken: let a sequence leave, or raise max_batch")
        slot = self._free.pop()
        self._joined.add(slot)
        self.set_length(slot, 0)
        return slot

    def leave(self, slot: int) -> None:
        """Free a slot; its rows are overwritten by the next sequence."""
        self._check_slot(slot)
        self._joined.remove(slot)
        # A step over all slots reads nothing of a slot without tokens.
        self.set_length(slot, 0)
        self._free.append(slot)

    def set_length(self, slot: int, length: int) -> None:
        """Say that a slot holds `length` tokens, for measurements: rows that were not computed hold anything."""
        self.lengths[slot] = length
        self.device_lengths[slot] = length

    def _check_slot(self, slot: int) -> None:
        if slot not in self._joined:
            raise UsageError(f"slot {slot} has no sequence: `join` gives one of the {self.max_batch} slots")

    def _check_step(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Refuse a step whose rows would go to other sequences, or to none.

        Raises:
            UsageError: outside the context; slots without a sequence, or twice; no tokens, or ids beyond the
                vocabulary.
        """
        if any(core.cache is not cache for core, cache in zip(self._cores, self.caches, strict=True)):
            raise UsageError("a DecodingState works in its context: `with state:`")
        for slot in slots:
            self._check_slot(slot)
        if len(set(slots)) < len(slots):
            raise UsageError(f"slots {list(slots)}: each one once, a step goes on by one token")
        if not tokens.numel():
            raise UsageError("no tokens: a prompt or a step has at least one")
        if not tokens.is_cuda and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.model.vocab_size:
            raise UsageError(f"ids from {int(tokens.min())} to {int(tokens.max())}: the model has "
                             f"{self.model.vocab_size} words")  # fmt: skip

    def _check_length(self, slot: int, new: int) -> None:
        if self.lengths[slot] + new > self.max_length:
            raise UsageError(
                f"a sequence of {self.lengths[slot] + new} tokens in a state for {self.max_length}: raise max_length"
            )

    def _lay_out(self, offset: int, first_position: int | Tensor) -> None:
        """Tell the model where in its chunk a step starts, and the position of its first row."""
        self.model.position_offset = first_position
        if self.model.layout.offset != offset:
            layout = dataclasses.replace(self._layout, offset=offset)
            for module in self._laid_out:
                module.layout = layout

    def _run(self, place: Segment | NextTokens, tokens: Tensor) -> Tensor:
        """Final hidden states [batch, n, hidden] of a step."""
        for cache in self.caches:
            cache.place = place
        return hidden_states(self.model, tokens)

    def prefill(self, slot: int, tokens: Sequence[int] | Tensor, *, logits: bool = True) -> Tensor | None:
        """Go on with one sequence by any number of tokens, segment by segment.

        Args:
            tokens: at least one.
            logits: whether those after the last token are wanted.

        Returns:
            float32 [vocabulary], or None.
        """
        tokens = torch.as_tensor(tokens, dtype=torch.int64)
        if tokens.dim() != 1:
            raise UsageError(f"tokens of shape {tuple(tokens.shape)}: those of one sequence, [tokens], are needed")
        self._check_step([slot], tokens)
        self._check_length(slot, tokens.numel())
        for part in tokens.split(self.segment):
            start = self.lengths[slot]
            self._lay_out(start % self._layout.chunk_size, start)
            hidden = self._run(Segment(slot, start), part[None])
            self.set_length(slot, start + part.numel())
        return logits_of(self.model, hidden[:, -1])[0] if logits else None

    def completes_a_chunk(self, slots: Sequence[int]) -> bool:
        """Whether the next token of one of these sequences is the last of its chunk, so that summary rows run."""
        layout = self._layout
        return layout.summary_tokens > 0 and any((self.lengths[slot] + 1) % layout.chunk_size == 0 for slot in slots)

    def step_rows(self, slots: Tensor, starts: Tensor, tokens: Tensor, with_summaries: bool) -> Tensor:
        """Logits after the next token of each sequence; nothing here waits for the device, so that it can be captured.

        Lengths are not advanced.

        Args:
            slots, starts, tokens: int64 [batch].
            with_summaries: run the summary rows of every sequence's running chunk too.

        Returns:
            float32 [batch, vocabulary].
        """
        # Seen from a chunk's last token, its summaries are where they are for the sequences that complete one.
        self._lay_out(self._layout.chunk_size - 1 if with_summaries else 0, starts)
        hidden = self._run(NextTokens(slots, starts), tokens[:, None])
        return logits_of(self.model, hidden[:, 0])

    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """Go on with each of these sequences by one token.

        Args:
            slots: of sequences that have joined, all different.
            tokens: int64 [batch]; ids on a GPU are not looked at, which would wait for it.

        Returns:
            float32 [batch, vocabulary].

        Raises:
            UsageError: slots or tokens that do not fit (see `_check_step`), or a sequence that is full.
        """
        if tokens.shape != (len(slots),):
            raise UsageError(f"tokens of shape {tuple(tokens.shape)} for {len(slots)} slots: one each")
        self._check_step(slots, tokens)
        for slot in slots:
            self._check_length(slot, 1)
        with_summaries, index = self.completes_a_chunk(slots), torch.tensor(slots, device=self.device)
        if self._steps is not None:
            logits = self._steps(index, tokens.to(self.device), with_summaries)
        else:
            logits = self.step_rows(index, self.device_lengths[index], tokens.to(self.device), with_summaries)
        self.device_lengths[index] += 1
        for slot in slots:
            self.lengths[slot] += 1
        return logits


class StepOfAllSlots:
    """A step over the rows of all slots, of which those that do not go on are computed for nothing.

    What such a slot's step writes is overwritten by its next one, and is seen by no query until then: its length stays.
    With CUDA graphs a step is captured the first time, one graph without and one with summary rows.
    """

    def __init__(self, state: DecodingState, captures: bool) -> None:
        self._state, self._captures = state, captures
        self._slots = torch.arange(state.max_batch, device=state.device)
        self._tokens = torch.zeros_like(self._slots)
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, index: Tensor, tokens: Tensor, with_summaries: bool) -> Tensor:
        """Logits float32 [batch, vocabulary] of the slots `index` after their next tokens; lengths are not advanced."""
        self._tokens[index] = tokens
        if not self._captures:
            return self._run(with_summaries)[index]
        if with_summaries not in self._graphs:
            self._graphs[with_summaries] = self._capture(with_summaries)
        graph, logits = self._graphs[with_summaries]
        graph.replay()
        return logits[index]

    def _run(self, with_summaries: bool) -> Tensor:
        return self._state.step_rows(self._slots, self._state.device_lengths, self._tokens, with_summaries)

    def _capture(self, with_summaries: bool) -> tuple["torch.cuda.CUDAGraph", Tensor]:
        """Capture the step. Running it more than once changes nothing."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are compiled, and what is made once is made.
            for _ in range(2):
                self._run(with_summaries)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run(with_summaries)
        return graph, logits

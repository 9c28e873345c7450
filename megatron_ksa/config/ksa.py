"""Settings of Kwai Summary Attention (KSA report, arXiv 2604.24432)."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum

from megatron_ksa.config.options import option
from megatron_ksa.config.patterns import parse_integers, parse_letters
from megatron_ksa.errors import UsageError
from megatron_ksa.layout.rows import RowLayout

# Tokens of a chunk, summaries after it.
LARGEST = 2**20
LAST_ITERATION = 2**53


class LayerKind(StrEnum):
    """What a decoder layer does with text and summary rows; the value is its letter in `--ksa-layer-pattern`."""

    KSA = "k"
    LARGE_WINDOW = "l"
    FULL = "f"
    WINDOW = "w"


@dataclass(frozen=True)
class KSALayer:
    """One decoder layer: its kind, and the past chunks whose text a text query sees (unused in full layers)."""

    kind: LayerKind
    window_chunks: int

    @property
    def has_summaries(self) -> bool:
        """Summary rows take part in the layer; they skip the others."""
        return self.kind in (LayerKind.KSA, LayerKind.LARGE_WINDOW)


@dataclass(frozen=True)
class KSAConfig:
    """Kwai Summary Attention: a summary token after every chunk of text tokens.

    Raises:
        UsageError: a value out of range.
    """

    enabled: bool = option(False, "Train with Kwai Summary Attention.", flag="--ksa")
    chunk_size: int = option(8, "Text tokens in a chunk (C). --seq-length must be a multiple of it.")
    summary_tokens: int = option(1, "Summary tokens after each complete chunk (S).")
    window_chunks: str = option(
        "128", "Past chunks whose text a text query still sees (W): a number, or a pattern with one a layer, "
        "such as ([128]*3+[1024])*6."
    )  # fmt: skip
    layer_pattern: str = option(
        "k", "Kind of each layer: k (KSA), l (KSA with a window over the whole sequence), f (full attention; summary "
        "rows skip the layer), w (the window alone: text in the window, no summaries, which skip the layer). One "
        "letter for all layers or one a layer, such as kkkf*6."
    )  # fmt: skip
    independent_projections: bool = option(
        True, "Give summary rows their own Q, K and V projections in each KSA layer."
    )
    independent_qk_norm: bool = option(False, "Give summary rows their own Q and K norms (with --qk-layernorm).")
    independent_layernorm: bool = option(False, "Give summary rows their own input layer norm in each KSA layer.")
    anneal_start: int | None = option(
        None, "Iteration up to which summary rows use only their own projections; from there to --ksa-anneal-end "
        "they move linearly to the text projections."
    )  # fmt: skip
    anneal_end: int | None = option(None, "Iteration from which summary rows use only the text projections.")
    initial_coefficient: float | None = option(
        None, "Weight of the summary projections on summary rows (a) at the start of the run, in [0, 1]. Unset: that "
        "of the checkpoint loaded, so that a model annealed to 0 stays there; 1 without one. Above 0 after an "
        "annealing to 0, the summary projections start again as copies of the text projections."
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("chunk_size", "summary_tokens"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise UsageError(
                    f"--ksa-{name.replace('_', '-')} is {getattr(self, name)}: it must be from 1 to {LARGEST:,}"
                )
        if (self.anneal_start is None) != (self.anneal_end is None):
            raise UsageError("--ksa-anneal-start and --ksa-anneal-end go together: one of them is missing")
        if self.initial_coefficient is not None and not 0 <= self.initial_coefficient <= 1:
            raise UsageError(f"--ksa-initial-coefficient is {self.initial_coefficient:g}: it must lie in [0, 1]")
        if self.anneal_start is None or self.anneal_end is None:
            return
        if self.anneal_end > LAST_ITERATION:
            raise UsageError(f"--ksa-anneal-end is {self.anneal_end}: it must be at most {LAST_ITERATION:,}")
        if not 0 <= self.anneal_start < self.anneal_end:
            raise UsageError(
                f"--ksa-anneal-start {self.anneal_start} must be at least 0 and below --ksa-anneal-end "
                f"{self.anneal_end}"
            )
        if not self.independent_projections:
            raise UsageError("--ksa-anneal-start needs the summary projections: drop --no-ksa-independent-projections")

    def layers(self, num_layers: int, seq_length: int) -> tuple[KSALayer, ...]:
        """Kind and window of every layer, for a text length of seq_length tokens.

        Raises:
            UsageError: a pattern outside the grammar or of the wrong length.
        """
        kinds = parse_letters(self.layer_pattern, "".join(LayerKind), num_layers, "--ksa-layer-pattern")
        windows = parse_integers(self.window_chunks, num_layers, "--ksa-window-chunks")
        whole = -(-seq_length // self.chunk_size)
        return tuple(
            KSALayer(LayerKind(kind), whole if kind == LayerKind.LARGE_WINDOW else window)
            for kind, window in zip(kinds, windows, strict=True)
        )

    @property
    def has_summaries(self) -> bool:
        """Some layer has summary rows: a model of w and f layers alone has text rows only."""
        return self.enabled and any(kind in self.layer_pattern for kind in (LayerKind.KSA, LayerKind.LARGE_WINDOW))

    @property
    def rows(self) -> RowLayout:
        """Text and summary rows of a model."""
        return RowLayout(self.chunk_size, self.summary_tokens) if self.has_summaries else RowLayout(1, 0)

    def num_summarised(self, num_layers: int) -> int:
        """Layers that summary rows go through."""
        return sum(layer.has_summaries for layer in self.layers(num_layers, self.chunk_size))

    def tokens_to_see_summaries(self, num_layers: int) -> int | None:
        """The most text tokens of which no text sees a summary; None where none ever does.

        In a layer of window W the text of chunk j sees the summaries of chunks below j - W: the first is chunk W + 1.
        """
        windows = [
            layer.window_chunks for layer in self.layers(num_layers, self.chunk_size) if layer.kind == LayerKind.KSA
        ]
        return (min(windows) + 1) * self.chunk_size if windows else None

    def check_summaries_seen(self, num_layers: int, seq_length: int, trained_by: str) -> None:
        """Refuse to train summaries that no text sees: their gradients are 0.

        Args:
            trained_by: the flag that asks for it, for the error.

        Raises:
            UsageError: naming a length that works.
        """
        hidden = self.tokens_to_see_summaries(num_layers)
        if hidden is None:
            raise UsageError(
                f"{trained_by} has nothing to train: no layer of --ksa-layer-pattern is of kind k, whose text sees "
                f"summaries"
            )
        if seq_length <= hidden:
            raise UsageError(
                f"{trained_by} has nothing to train: in {seq_length:,} tokens every window reaches the first one, and "
                f"no text sees a summary; use a --seq-length above {hidden:,}, or smaller --ksa-window-chunks"
            )

    def kv_rows(self, num_layers: int, seq_length: int) -> int:
        """K/V rows of all layers that the next token after seq_length tokens can see: what a decoder keeps.

        A full layer keeps every token; a window layer the text of its window and the running chunk; a KSA layer every
        summary too.
        """
        summaries = self.rows.summary_rows(seq_length)
        return sum(
            seq_length
            if layer.kind == LayerKind.FULL
            else min(seq_length, (layer.window_chunks + 1) * self.chunk_size) + summaries * layer.has_summaries
            for layer in self.layers(num_layers, seq_length)
        )

    @property
    def blends(self) -> bool:
        """Whether summary rows mix their own projections with the text's at some time of a run."""
        mixes = self.anneal_start is not None or self.initial_coefficient not in (None, 1)
        return self.has_summaries and self.independent_projections and mixes

    def summary_coefficient(self, iteration: int) -> float:
        """Weight a of the summary projections on summary rows.

        `initial_coefficient` (1 where unset) up to anneal_start, then linear to 0 at anneal_end.
        """
        initial = 1.0 if self.initial_coefficient is None else self.initial_coefficient
        if self.anneal_start is None or self.anneal_end is None:
            return initial
        done = (iteration - self.anneal_start) / (self.anneal_end - self.anneal_start)
        return initial * (1.0 - min(max(done, 0.0), 1.0))

    def check_sequence(self, seq_length: int, *, context_parallel: int = 1, sequence_parallel: int = 1) -> None:
        """Refuse a text length whose shards would cut a chunk.

        Args:
            seq_length: text tokens in a sequence.
            context_parallel: context-parallel size; each rank holds two zig-zag segments.
            sequence_parallel: tensor-parallel size where sequence parallelism is on, else 1.

        Raises:
            UsageError: with the nearest lengths that work.
        """
        segments = 2 * context_parallel if context_parallel > 1 else 1
        step = self.chunk_size * segments * sequence_parallel
        if seq_length % step:
            parts = {"--ksa-chunk-size": self.chunk_size, "2 x --context-parallel-size": segments,
                     "--tensor-model-parallel-size with --sequence-parallel": sequence_parallel}  # fmt: skip
            rule = " x ".join(f"{value} ({name})" for name, value in parts.items() if value > 1)
            below = seq_length // step * step
            nearest = f"{below} or {below + step}" if below else f"{step}"
            raise UsageError(f"--seq-length {seq_length} is not a multiple of {rule} = {step}: use {nearest}")

    def identity(self) -> dict[str, object]:
        """The settings a checkpoint's weights depend on (everything but the annealing schedule)."""
        schedule = ("anneal_start", "anneal_end", "initial_coefficient")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in schedule}

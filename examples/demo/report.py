"""What a demo run leaves: the loss curve, the unigram model to compare with, and the K/V rows it saves."""

from pathlib import Path

import numpy as np

from megatron_ksa.charts import chart
from megatron_ksa.config.ksa import KSAConfig

TRAIN, VALIDATION = "lm loss", "lm loss validation"


def unigram_loss(train: list[str], validation: str, vocab_size: int) -> float:
    """Cross-entropy, nats a token, of the validation set under the token frequencies (plus one) of the training set.

    Args:
        train, validation: prefixes of indexed datasets.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def counts(prefix: str) -> np.ndarray:
        dataset = IndexedDataset(prefix)
        return sum(np.bincount(dataset[i], minlength=vocab_size) for i in range(len(dataset)))

    seen, asked = sum(map(counts, train)) + 1, counts(validation)
    return float(-(asked * np.log(seen / seen.sum())).sum() / asked.sum())


def read_losses(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Iterations and losses (nats a token) of training and validation from the run's TensorBoard logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    # A resumed run logs an iteration again; the last word counts.
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in (TRAIN, VALIDATION)}
    return {tag: (sorted(points), [points[step] for step in sorted(points)]) for tag, points in scalars.items()}


def plot_losses(losses: dict[str, tuple[list[int], list[float]]], unigram: float, path: Path) -> None:
    """Write the loss curve as PNG."""
    with chart(path, dpi=150, figsize=(7, 4)) as (figure, axes):
        axes.plot(*losses[TRAIN], color="#9db4d3", linewidth=1, label="training")
        axes.plot(*losses[VALIDATION], color="#1f4e8c", marker="o", markersize=4, label="validation")
        axes.axhline(unigram, color="#b04a3a", linestyle="--", linewidth=1, label=f"unigram model ({unigram:.2f})")
        title = "3:1 hybrid KSA + HARPE on Python's standard library"
        axes.set(xlabel="iteration", ylabel="loss (nats a token)", title=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        figure.tight_layout()


def kv_table(ksa: KSAConfig, num_layers: int, lengths: tuple[int, ...]) -> str:
    """Lines that compare the K/V rows that a decoder keeps, over all layers, with full attention."""
    lines = [f"{'tokens':>10} {'full attention':>15} {'this model':>12} {'ratio':>7}   K/V rows, all layers"]
    for length in lengths:
        full, kept = length * num_layers, ksa.kv_rows(num_layers, length)
        lines.append(f"{length:>10,} {full:>15,} {kept:>12,} {full / kept:>6.2f}x")
    return "\n".join(lines)

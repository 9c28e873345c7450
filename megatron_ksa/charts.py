"""Charts of measured numbers as PNG files, drawn by the scripts that measured them; matplotlib is needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_ksa.files import whole_file


@contextmanager
def chart(
    to: Path | str | IO[bytes], rows: int = 1, columns: int = 1, *, dpi: int = 130, **options: Any
) -> Iterator[tuple]:
    """A figure and its axes, to be drawn in the body; the PNG is written when the body ends without an error.

    Args:
        to: file that appears whole, or a stream.
        rows, columns: of axes.
        dpi: dots an inch.
        options: those of `matplotlib.pyplot.subplots`.

    Yields:
        Figure, and what `subplots` makes of the axes: one, or an array of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, **options)
    try:
        yield figure, axes
        if isinstance(to, Path | str):
            with whole_file(Path(to), "wb") as stream:
                figure.savefig(stream, dpi=dpi, format="png")
        else:
            figure.savefig(to, dpi=dpi, format="png")
    finally:
        plt.close(figure)


def draw_seeds(axis: Any, x: Sequence[float], values: np.ndarray, label: str, color: str | None = None) -> None:
    """A bold line of the mean over seeds with a mark at each point, and a thin line for each seed.

    Args:
        values: [points, seeds].
        color: of all lines; the axis' next one where it is None.
    """
    (line,) = axis.plot(x, values.mean(1), marker="o", markersize=4, linewidth=2, color=color, label=label)
    axis.plot(x, values, linewidth=0.7, alpha=0.5, color=line.get_color())

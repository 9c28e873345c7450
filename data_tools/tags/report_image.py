"""The report's picture: the tree coloured by coverage, and the shares of the largest branches, as PNG."""

import warnings
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.data_tools.tags.report_data import NodeStatistics, preorder

BRANCHES = 15
# Narrower rectangles than this share of the picture's width cannot be seen.
NARROWEST = 4e-4
NAME_LENGTH = 28


def rectangles(pool: Pool, statistics: NodeStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Nodes wide enough to be seen, int64 [shown] in pre-order, and their left edges, float64 [shown].

    The root reaches from 0 to 1.
    """
    wide = statistics.pool_share >= NARROWEST
    order = preorder(pool.parent, wide, statistics.pool_share)
    left, cursor = np.zeros(len(pool.parent)), np.zeros(len(pool.parent))
    for node in order:
        above = pool.parent[node]
        if above >= 0:
            left[node] = cursor[node] = cursor[above]
            cursor[above] += statistics.pool_share[node]
    return order, left[order]


def _short(name: str) -> str:
    # A dollar sign would start mathematics, and matplotlib refuses what it cannot parse.
    name = name.replace("$", r"\$")
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def draw_report(path: Path, pool: Pool, statistics: NodeStatistics, title: str) -> None:
    """Write the picture under a temporary name and rename it."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    tree, bars = figure.subplots(2, 1, height_ratios=(3, 4))
    nodes, left = rectangles(pool, statistics)
    right, top = left + statistics.pool_share[nodes], -pool.depth[nodes].astype(float)
    corners = np.stack([left, top, left, top - 1, right, top - 1, right, top], axis=1).reshape(-1, 4, 2)
    colours = colormaps["viridis"](np.nan_to_num(statistics.coverage[nodes]))
    tree.add_collection(PolyCollection(list(corners), facecolors=colours, edgecolors="white", linewidths=0.3))
    tree.set(xlim=(0, 1), ylim=(top.min() - 1, 0), xticks=[], yticks=[], title=title, xlabel="share of the pool's tags")
    tree.set_ylabel("depth")
    figure.colorbar(ScalarMappable(cmap="viridis"), ax=tree, label="tag mass covered by the selection", pad=0.01)
    branches = np.flatnonzero(pool.depth == 1)
    branches = branches[np.argsort(-statistics.pool_share[branches], kind="stable")][:BRANCHES]
    shown = [("pool", statistics.pool_share, "#8a93a0"), ("selected", statistics.selected_share, "#0b62c4")]
    if statistics.target_share is not None:
        shown.append(("target", statistics.target_share, "#c4560b"))
    height = 0.8 / len(shown)
    for i, (name, share, colour) in enumerate(shown):
        bars.barh(
            np.arange(len(branches)) + (i - (len(shown) - 1) / 2) * height,
            100 * share[branches],
            height,
            label=name,
            color=colour,
        )
    bars.set_yticks(range(len(branches)), [_short(str(pool.names[node])) for node in branches])
    bars.invert_yaxis()
    bars.set_xlabel("share of tags, %")
    bars.legend(frameon=False)
    bars.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(path.name + ".partial")
    # Without the library's version in it, the same data are the same bytes.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # shown as a box; the page has the name
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    partial.replace(path)

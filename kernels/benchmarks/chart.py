"""The chart of a record: time against sequence length for KSA, FlexAttention and full attention."""

from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file
from megatron_ksa.kernels.benchmarks.registry import BOTH, FORWARD

SERIES = {
    "ksa": ("KSA", "tab:blue", "o"),
    "flex_attention": ("FlexAttention, KSA's mask", "tab:green", "s"),
    "flex_attention_interleaved": ("FlexAttention, KSA's mask, rows in sequence order", "tab:olive", "D"),
    "full_attention": ("full attention (cuDNN)", "tab:red", "^"),
}
TITLES = {FORWARD: "forward", BOTH: "forward + backward"}


def points(record: dict, op: str, mode: str, heads: tuple[int, int]) -> list[tuple[int, dict]]:
    """(n, times) of an op with these query and K/V heads, by n; shapes without a time are left out."""
    found = [
        (result["shape"]["n"], result["modes"][mode])
        for result in record["results"]
        if result["op"] == op
        and (result["shape"]["heads"], result["shape"]["groups"]) == heads
        and mode in result.get("modes", {})
    ]
    return sorted(found, key=lambda point: point[0])


def draw(record: dict, path: Path) -> None:
    """Write the chart as PNG: a panel for each mode, medians with 20th to 80th percentiles, logarithmic axes.

    Raises:
        UsageError: matplotlib is missing, or the record has no time of these ops.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("the chart needs matplotlib: run `pip install -e '.[data]'`, or pass --no-chart") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [result["shape"] for result in record["results"] if result["op"] in SERIES and result.get("modes")]
    if not timed:
        raise UsageError(f"no chart: the record has no time of {', '.join(SERIES)}")
    heads = (timed[0]["heads"], timed[0]["groups"])
    figure, axes = plt.subplots(1, len(TITLES), figsize=(10, 4.2), sharey=True, layout="constrained")
    lengths = sorted({shape["n"] for shape in timed})
    for axis, (mode, title) in zip(axes, TITLES.items(), strict=True):
        for op, (label, color, marker) in SERIES.items():
            series = points(record, op, mode, heads)
            if not series:
                continue
            n, times = zip(*series, strict=True)
            median, low, high = ([entry[key] for entry in times] for key in ("median_ms", "p20_ms", "p80_ms"))
            axis.plot(n, median, color=color, marker=marker, label=label)
            axis.fill_between(n, low, high, color=color, alpha=0.2, linewidth=0)
            # The lowest line has its labels below: others are close above.
            place = {"xytext": (0, -12 if op == "ksa" else 6), "textcoords": "offset points"}
            for x, y in zip(n, median, strict=True):
                axis.annotate(f"{y:.3g}", (x, y), **place, ha="center", fontsize=7)
        axis.set(xscale="log", yscale="log", xlabel="text tokens", title=title)
        axis.minorticks_off()
        axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds (median)")
    axes[0].legend(fontsize=8)
    shape, header = timed[0], record["header"]
    figure.suptitle(
        f"{header['gpu'] or header['device']}, {shape['dtype']}, batch {shape['batch']}, {heads[0]} query and "
        f"{heads[1]} K/V heads of {shape['head_dim']}, C {shape['chunk_size']}, S {shape['summary_tokens']}, "
        f"W {shape['window_chunks']}; torch {header['torch']}, triton {header['triton']}",
        fontsize=9,
    )
    with whole_file(path, "wb") as stream:
        figure.savefig(stream, dpi=160, format="png")
    plt.close(figure)

"""What `--recompute-to-fit` chooses for the 1.9B model on a GPU of 80 GB, and the step that the time model predicts.

    python examples/memory_1b9/fit.py docs/results.md

Writes the section `recompute_to_fit_1b9` of the Markdown file. Needs no GPU: all is arithmetic. A step is three forward
passes of the layers (a backward pass counts as two) and what is computed again, the four products of the output layer
with its chunked loss, and the optimizer's 28 bytes a parameter.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import installed  # noqa: F401
from compare import SHAPE

from megatron_ksa.config.fit import MARGIN
from megatron_ksa.cost.memory import stage_parameters
from megatron_ksa.cost.recompute_fit import GIB, H100, least
from megatron_ksa.cost.shapes import TrainingLayout
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.markdown import replace_section, table

SECTION = "recompute_to_fit_1b9"
# What torch reports of an H100 of 80 GB.
GPU_BYTES = 79.18 * GIB
LENGTHS = (8192, 16384, 32768, 65536, 131072)


def row(length: int, ranks: int, cheap: bool) -> list[str]:
    """One length on so many context-parallel ranks, with or without what is computed again by one kernel each."""
    layout = TrainingLayout(
        text_length=length, context_parallel=ranks, distributed_optimizer=ranks > 1, fused_rotation=True,
        fused_gradient=True,
    )  # fmt: skip
    choice = least(SHAPE, layout, 0, GPU_BYTES - MARGIN * GIB, **({} if cheap else {"cheap": ()}))
    loss = 4 * 2 * layout.rank_text * SHAPE.vocabulary * SHAPE.hidden / H100.products
    optimizer = 28 * stage_parameters(SHAPE, layout, 0) / (ranks if ranks > 1 else 1) / H100.bandwidth
    full = 4 * choice.forward + loss + optimizer
    fit = full - choice.forward + choice.seconds
    return [
        f"{length:,}", str(ranks), str(choice.recompute), f"{choice.memory.total / GIB:.2f}",
        f"{choice.slowdown * 100:.1f} %", f"{full * 1e3:,.0f}", f"{fit * 1e3:,.0f}", f"{full / fit:.2f}",
    ]  # fmt: skip


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help=f"Markdown file with the section {SECTION}")
    options = parser.parse_args()
    with usage_errors_exit():
        if not options.output.is_file():
            raise UsageError(f"{options.output} does not exist")
        columns = [
            "text tokens", "GPUs", "recomputed", "predicted peak GiB", "more time in the layers",
            "ms, full recompute", "ms, to fit", "full / to fit",
        ]  # fmt: skip
        chosen = [row(length, ranks, True) for ranks in (1, 2) for length in LENGTHS]
        megatrons = [row(32768, 1, False)]
        text = table(columns, chosen) + "\n\nWith Megatron's own recompute alone:\n\n" + table(columns, megatrons)
        replace_section(options.output, SECTION, text)


if __name__ == "__main__":
    main()

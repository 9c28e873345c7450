"""`--recompute-to-fit`: the choice for each pipeline stage, what is said of it, and the way out where memory ends."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_ksa.config.recompute import CHEAP, EVERY
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.cost.recompute_fit import GIB, Choice, least
from megatron_ksa.cost.run_report import model_shape, training_layout
from megatron_ksa.model.recompute import set_recompute
from megatron_ksa.model.saved_again import can_recompute

# GiB that the margin should grow by where a prediction was too low and nothing says by how much.
MORE = 2.0


@dataclass
class Fit:
    """Chooses recompute before a model is wrapped for data parallelism.

    Attributes:
        choice: of this rank's stage, once it is made.
    """

    args: argparse.Namespace
    settings: RunSettings
    choice: Choice | None = None

    def __call__(self, chunks: list[MegatronModule]) -> list[MegatronModule]:
        """Let the model chunks of this rank recompute what fits; a hook of Megatron's on a model that is built.

        Every rank makes the choices of all stages from the same numbers: the smallest GPU of all ranks, or the size in
        the settings, and what all layers can compute again.

        Raises:
            UsageError: nothing fits.
        """
        size = smallest_gpu() if self.settings.fit.gpu is None else self.settings.fit.gpu * GIB
        cheap = _of_all_ranks(chunks)
        choices = choose(self.args, self.settings, size, cheap)
        if torch.distributed.get_rank() == 0:
            print(describe(choices, size, self.settings.fit.margin), flush=True)
        self.choice = choices[parallel_state.get_pipeline_model_parallel_rank()]
        for chunk in chunks:
            set_recompute(chunk, self.choice.recompute)
        return chunks


def smallest_gpu() -> int:
    """Bytes of the smallest GPU of all ranks."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    smallest = torch.tensor(size, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return int(smallest)


def _of_all_ranks(chunks: list[MegatronModule]) -> tuple[str, ...]:
    """What of `CHEAP` every layer of every rank can compute again."""
    blocks = [block for chunk in chunks for block in chunk.modules() if isinstance(block, TransformerBlock)]
    kinds = [can_recompute(layer) for block in blocks for layer in block.layers]
    able = torch.tensor(
        [all(name in kind for kind in kinds) for name in CHEAP], dtype=torch.int64, device=torch.cuda.current_device()
    )
    torch.distributed.all_reduce(able, torch.distributed.ReduceOp.MIN)
    return tuple(name for name, yes in zip(CHEAP, able.tolist(), strict=True) if yes)


def choose(
    args: argparse.Namespace, settings: RunSettings, gpu_bytes: float, cheap: tuple[str, ...]
) -> list[Choice]:  # fmt: skip
    """The choice of each pipeline stage.

    Args:
        args: Megatron's arguments after its validation.
        gpu_bytes: of a GPU, of which `settings.fit.margin` GiB stay free.
        cheap: as in `choices`.

    Raises:
        UsageError: a stage fits in no way.
    """
    if settings.ksa.enabled and settings.ksa.blends:
        # Heads that are blended are normalised before the rotation, which then keeps nothing to rotate again.
        cheap = tuple(name for name in cheap if name != "heads")
    shape, layout = model_shape(args, settings), training_layout(args, settings)
    budget = gpu_bytes - settings.fit.margin * GIB
    return [least(shape, layout, stage, budget, cheap=cheap) for stage in range(layout.pipeline_parallel)]


def describe(choices: list[Choice], gpu_bytes: float, margin: float) -> str:
    """A line for each stage, successive stages with the same choice in one: what is recomputed, and predicted peaks."""
    lines, begin = [], 0
    for stage, choice in enumerate(choices):
        last = stage + 1 == len(choices)
        if not last and choices[stage + 1].recompute == choice.recompute:
            continue
        same = choices[begin : stage + 1]
        where = "" if len(choices) == 1 else f" (stage {stage})" if begin == stage else f" (stages {begin} to {stage})"
        peak = max(one.memory.total for one in same)
        lines.append(
            f"recompute to fit{where}: {choice.recompute}; predicted peak {peak / GIB:.2f} GiB of "
            f"{gpu_bytes / GIB:.2f}, with {margin:g} to spare; {max(one.slowdown for one in same):.1%} more time in "
            "the layers"
        )
        begin = stage + 1
    return "\n".join(lines)


@contextlib.contextmanager
def out_of_memory_told(args: argparse.Namespace, fit: Fit | None) -> Iterator[None]:
    """Let a GPU that is out of memory end the run with a line that says what to set.

    Args:
        fit: with `--recompute-to-fit`, what has chosen.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(_way_out(args, fit))
        raise


def _way_out(args: argparse.Namespace, fit: Fit | None) -> str:
    if fit is None or fit.choice is None:
        by_hand = " in place of --recompute-granularity" if args.recompute_granularity else ""
        return f"--recompute-to-fit{by_hand} chooses what to recompute" if fit is None else "nothing was chosen yet"
    margin, predicted = fit.settings.fit.margin, fit.choice.memory.total
    # What tensors took when one more did not fit.
    missing = max(torch.cuda.max_memory_allocated() - predicted, 0) / GIB
    more = math.ceil(2 * (margin + MORE + missing)) / 2
    said = f"{predicted / GIB:.2f} GiB were predicted with {fit.choice.recompute} recomputed"
    if fit.choice.recompute.whole == EVERY:
        return f"{said}: use more GPUs, or a shorter --seq-length"
    return f"{said}: set --recompute-to-fit {more:g}"

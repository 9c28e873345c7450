"""FP8 of Transformer Engine with KSA and HARPE: which settings work, and which numbers of rows its products take.

Projections and MLPs of every layer run in FP8, those of the summary rows too. Attention, norms of heads, the output
layer and the loss stay in 16 bits.
"""

import enum
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError

RECIPES = ("delayed", "tensorwise", "blockwise")
# cuBLAS multiplies in FP8 over multiples of this: over the rows for a weight's gradient, else over the weight's sizes.
ROWS = 16


def fp8_recipe(config: Any) -> str:
    """Name of the recipe of a configuration, where it is an enumeration's member or a word."""
    recipe = config.fp8_recipe
    return str(recipe.value if isinstance(recipe, enum.Enum) else recipe)


def refused_in_fp8(config: Any, name: Callable[..., str]) -> Iterator[tuple[bool, str, str]]:
    """What FP8 does not go with: whether the setting is active, its name, and the way out.

    Args:
        config: a `TransformerConfig`, or any object with its attributes.
        name: how an error names a setting.
    """
    if not config.fp8:
        return
    recipe, te = fp8_recipe(config), name("transformer_impl", "transformer_engine")
    attention = "attention stays in 16 bits here; drop it"
    yield config.transformer_impl != "transformer_engine", f"{name('fp8')} without {te}", f"use {te}"
    yield (
        recipe not in RECIPES, name("fp8_recipe", recipe),
        f"use {', '.join(RECIPES[:-1])} or {RECIPES[-1]}, which were compared with 16 bits"
    )  # fmt: skip
    yield not config.bf16, f"{name('fp8')} without {name('bf16')}", f"use {name('bf16')}"
    kept = bool(getattr(config, "fp8_param", False))
    yield kept, "weights kept in FP8 (fp8_param)", "they were not compared with 16 bits; drop it"
    yield (
        bool(config.use_transformer_engine_op_fuser and recipe == "delayed"),
        f"{name('use_transformer_engine_op_fuser')} in FP8 of {name('fp8_recipe', 'delayed')}",
        f"checkpoints would lack the fused MLP's scales; use {name('fp8_recipe', 'tensorwise')} or blockwise",
    )
    for field in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        yield bool(getattr(config, field, False)), name(field), attention


def check_rows_in_fp8(ksa: KSAConfig, text_rows: int, batch: int, shards: int, setting: str) -> None:
    """Refuse a length whose text or summary rows FP8 products do not take.

    Args:
        text_rows: text tokens of a whole sequence.
        batch: sequences of a micro-batch.
        shards: parts of a sequence that are multiplied apart (context and sequence parallelism).
        setting: how the error names the length.

    Raises:
        UsageError: with the nearest lengths that work.
    """
    layout = ksa.rows
    steps = [shards * ROWS // math.gcd(ROWS, batch)]
    rule = f"{ROWS} text rows"
    if layout.summary_tokens:
        summaries = layout.summary_tokens * batch
        steps.append(layout.chunk_size * shards * ROWS // math.gcd(ROWS, summaries))
        rule += f" and {ROWS} summary rows"
    step = math.lcm(*steps)
    if text_rows % step:
        below = text_rows // step * step
        nearest = f"{below} or {below + step}" if below else f"{step}"
        raise UsageError(
            f"FP8 takes multiples of {rule} of a micro-batch on each rank, {setting} {text_rows} has others: use "
            f"{nearest}, or 16 bits"
        )

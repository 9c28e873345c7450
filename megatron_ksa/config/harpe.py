"""Settings of HARPE, one RoPE base for each KV group (arXiv 2412.07171)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ksa.config.options import option
from megatron_ksa.errors import UsageError
from megatron_ksa.files import SMALL_FILE_BYTES, read_small

# Angles are positions times powers of 1 / base, in float32 and in fixed point. Below base 1 they grow from channel to
# channel; at 1e18 the slowest channel turns by 1e-12 radians in a million positions.
SMALLEST_BASE, LARGEST_BASE = 1.0, 1e18

# Table 2 of the paper: b_min 1M, b_max 5M, stride 30k, 32 heads; in units of 10^6.
PRESETS = {
    "llama2-7b-128k": tuple(
        round(float(millions) * 1e6)
        for millions in (
            "1.00 1.15 1.30 1.45 2.17 2.20 2.23 2.47 2.50 2.65 2.68 2.71 2.74 2.80 2.83 2.92 "
            "3.01 3.04 3.10 3.13 3.16 3.22 3.43 3.46 3.61 3.88 4.09 4.15 4.39 4.45 4.51 4.54"
        ).split()
    )
}


@dataclass(frozen=True)
class HarpeConfig:
    """Head-adaptive rotary position encoding: a RoPE base for each KV group (--position-embedding-type harpe)."""

    bases: str | None = option(
        None, "Rotary bases, one for each KV group: numbers with commas, a preset "
        f"({', '.join(PRESETS)}), or a file with a JSON list or one number a line (at most {SMALL_FILE_BYTES:,} "
        "bytes). Without it the set is uniform."
    )  # fmt: skip
    base_min: float = option(1e6, "Smallest base of the uniform set.")
    base_max: float = option(5e6, "Largest base of the uniform set.")
    order: str = option(
        "ascending", "Order of the uniform set over the KV groups.", choices=("ascending", "descending")
    )
    override_checkpoint: bool = option(
        False, "Load a checkpoint that was written with other bases, or without HARPE; the log says so.",
        flag="--harpe-override-checkpoint-bases",
    )  # fmt: skip

    def resolve(self, num_query_groups: int) -> tuple[float, ...]:
        """The base of each KV group.

        Uniform set: b_g = base_min + g * (base_max - base_min) / (groups - 1).

        Raises:
            UsageError: a wrong number of bases, a base that is not a positive number, an unreadable file.
        """
        if self.bases is None:
            _check_positive(self.base_min, "--harpe-base-min")
            _check_positive(self.base_max, "--harpe-base-max")
            if self.base_min > self.base_max:
                raise UsageError(
                    f"--harpe-base-min {self.base_min:g} is above --harpe-base-max {self.base_max:g}: swap them "
                    f"(--harpe-order descending reverses the set)"
                )
            step = (self.base_max - self.base_min) / max(num_query_groups - 1, 1)
            uniform = [self.base_min + group * step for group in range(num_query_groups)]
            return tuple(uniform if self.order == "ascending" else reversed(uniform))
        bases = tuple(_number(value) for value in _read_bases(self.bases))
        if len(bases) != num_query_groups:
            raise UsageError(
                f"--harpe-bases has {len(bases)} bases, the model has {num_query_groups} KV groups "
                f"(--num-query-groups, or --num-attention-heads without --group-query-attention): give one base a group"
            )
        return bases


def _read_bases(text: str) -> list:
    """Values of a preset, a list with commas, or a file."""
    if text in PRESETS:
        return list(PRESETS[text])
    if "," in text or _is_number(text):
        return [part.strip() for part in text.split(",")]
    try:
        content = read_small(Path(text), "--harpe-bases")
    except UsageError as error:
        raise UsageError(
            f"{error}; without a file give numbers with commas or a preset ({', '.join(PRESETS)})"
        ) from None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return content.split()
    if isinstance(values, dict):
        values = values.get("bases")
    if _is_number(values):
        return [values]
    if not isinstance(values, list):
        raise UsageError(f"--harpe-bases {text}: the JSON must be a list, or an object with a list under 'bases'")
    return values


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except OverflowError:
        return True
    except ValueError:
        return False
    return True


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _number(value: Any) -> float:
    if not _is_number(value):
        raise UsageError(f"--harpe-bases has {_shown(value)}: a base is a positive number")
    try:
        return _check_positive(float(value), "--harpe-bases")
    except OverflowError:
        raise UsageError(f"--harpe-bases has {_shown(value)}: a base is at most {LARGEST_BASE:g}") from None


def _check_positive(value: float, flag: str) -> float:
    if not value > 0:
        raise UsageError(f"{flag} has {value:g}: a base is a positive number")
    if not SMALLEST_BASE <= value <= LARGEST_BASE:
        raise UsageError(f"{flag} has {value:g}: a base is from {SMALLEST_BASE:g} to {LARGEST_BASE:g}")
    return value

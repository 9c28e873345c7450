"""`recorded_pretrain.py` without FP8, where every second run has the passes that find FP8's first scales nevertheless.

Usage: passes_pretrain.py RUNS.json
"""

import itertools
import sys
from pathlib import Path

import recorded_pretrain

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from megatron_ksa.platform import prepare_platform  # noqa: E402


def main() -> None:
    prepare_platform([])
    from megatron_ksa.training import configure, first_scales
    from megatron_ksa.upstream.trainer import TRAIN_STEP

    patches, numbers = configure.trainer_patches, itertools.count()
    first_scales.are_missing = lambda chunks, starts: True

    def with_passes(args, settings, log, still_writes):
        found = TRAIN_STEP.given(first_scales.FirstScales(args, log).train_step)
        return [*patches(args, settings, log, still_writes), *([found] if next(numbers) % 2 else [])]

    configure.trainer_patches = with_passes
    recorded_pretrain.main()


if __name__ == "__main__":
    main()

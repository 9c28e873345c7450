"""`recorded_pretrain.py` without a GPU, where `--recompute-to-fit` is told of one.

Usage: fitted_pretrain.py RUNS.json; the file gpu_bytes beside it holds the GPU's size.
"""

import sys
from pathlib import Path

import recorded_pretrain

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from megatron_ksa.platform import prepare_platform  # noqa: E402


def main() -> None:
    prepare_platform([])
    from megatron_ksa.training import flag_rules, recompute_fit

    size = int(Path(sys.argv[1]).with_name("gpu_bytes").read_text())
    recompute_fit.smallest_gpu = lambda: size
    flag_rules._check_machine = lambda args: None
    recorded_pretrain.main()


if __name__ == "__main__":
    main()

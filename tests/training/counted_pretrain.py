"""`recorded_pretrain.py` that also writes how many bytes each rank has sent after each iteration, to sentRANK.json.

The counts of all runs stand one after the other. Gloo's reduce-scatter is an all-reduce, which sends twice as much as a
reduce-scatter; the surplus is taken off.
"""

import json
import os
import sys
from functools import wraps
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import recorded_pretrain  # noqa: E402
from wire import bytes_sent  # noqa: E402

from megatron_ksa.platform import prepare_platform  # noqa: E402


def main() -> None:
    description = Path(sys.argv[1])
    reduce_scatter, surplus, sent = dist.reduce_scatter_tensor, [0], []

    def noted(output, input, *args, **kwargs):
        surplus[0] += input.nbytes - output.nbytes
        return reduce_scatter(output, input, *args, **kwargs)

    prepare_platform(json.loads(description.read_text())[0]["flags"])
    import megatron.training.training  # noqa: F401

    # Megatron has bound the function to names of its own.
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is reduce_scatter:
                setattr(module, name, noted)
    from megatron_ksa.upstream.patches import apply
    from megatron_ksa.upstream.trainer import TRAINING_LOG

    def counting(log):
        @wraps(log)
        def counted(*args, **kwargs):
            sent.append(bytes_sent() - surplus[0])
            # Connections of a rank that has ended are closed here too, and their bytes count no more.
            dist.barrier()
            description.with_name(f"sent{os.environ['RANK']}.json").write_text(json.dumps(sent))
            return log(*args, **kwargs)

        return counted

    with apply([TRAINING_LOG.given(counting)]):
        recorded_pretrain.main()


if __name__ == "__main__":
    main()

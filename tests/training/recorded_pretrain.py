"""`pretrain_gpt.py` that also writes every iteration's loss and gradient norm, at full precision, as JSON.

Usage: recorded_pretrain.py RECORD.json FLAGS...; the last rank, which has the loss, writes the record.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import pretrain_gpt  # noqa: E402

from megatron_ksa.platform import prepare_platform  # noqa: E402


def main() -> None:
    record = Path(sys.argv.pop(1))
    prepare_platform(sys.argv[1:])
    import torch
    from megatron.training import training

    log, steps = training.training_log, {}

    def recorded(loss_dict, *args, **kwargs):
        iteration, grad_norm = args[2], args[6]
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            steps[iteration] = {"loss": loss_dict["lm loss"].item(), "grad_norm": float(grad_norm)}
            record.write_text(json.dumps(steps))
        return log(loss_dict, *args, **kwargs)

    training.training_log = recorded
    pretrain_gpt.main()


if __name__ == "__main__":
    main()

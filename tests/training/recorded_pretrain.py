"""`pretrain_gpt.py` that also writes every iteration's loss and gradient norm, at full precision, as JSON.

Usage: recorded_pretrain.py RUNS.json [SECONDS], a list of {"record": path, "flags": [...]}. The runs go one after the
other in one set of processes, each as in processes of its own; the last rank, which has the loss, writes the records.
Where a run takes more than so many SECONDS, each rank writes its stacks to stacksRANK.txt beside RUNS.json.
"""

import faulthandler
import json
import os
import sys
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import pretrain_gpt  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402


def main() -> None:
    description, *limit = sys.argv[1:]
    stacks = Path(description).with_name(f"stacks{os.environ['RANK']}.txt").open("w") if limit else None
    runs = json.loads(Path(description).read_text())
    prepare_platform(runs[0]["flags"])
    import torch

    from megatron_ksa.model import prepare
    from megatron_ksa.upstream.patches import apply
    from megatron_ksa.upstream.run_state import forget_run
    from megatron_ksa.upstream.trainer import TRAINING_LOG

    # What is compared here is what decides about it.
    prepare.REFUSES_UNCHECKED = False
    for run in runs:
        steps = {}
        if stacks is not None:
            faulthandler.dump_traceback_later(float(limit[0]), file=stacks)

        def recording(log, record=Path(run["record"]), steps=steps):
            @wraps(log)
            def recorded(loss_dict, *args, **kwargs):
                iteration, grad_norm = args[2], args[6]
                if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                    others = {name: value.item() for name, value in loss_dict.items() if name != "lm loss"}
                    steps[iteration] = {"loss": loss_dict["lm loss"].item(), "grad_norm": float(grad_norm), **others}
                    record.write_text(json.dumps(steps))
                return log(loss_dict, *args, **kwargs)

            return recorded

        sys.argv = [sys.argv[0], *run["flags"], "--kernels-unchecked"]
        with apply([TRAINING_LOG.given(recording)]):
            pretrain_gpt.main()
        forget_run()


if __name__ == "__main__":
    main()

"""`timed_pretrain.py` for several GPUs: several runs in one set of ranks, with the communication of each.

Usage: timed_ranks.py RUNS.json SECONDS, under torchrun; RUNS.json is a list of {"record": path, "warm_up": iterations,
"flags": [...]}. The last iteration of each run is profiled and not counted. A run that takes more than SECONDS ends
the ranks, each with its stacks on stderr. The last rank writes the records, after each iteration.
"""

import copy
import faulthandler
import gc
import json
import sys
from functools import wraps
from pathlib import Path

import torch
import torch.distributed as dist
from communication import SentBytes, link_bytes, profiled
from timed_pretrain import Measurement

import pretrain_gpt
from megatron_ksa.cost.recompute_fit import Choice
from megatron_ksa.files import whole_file
from megatron_ksa.platform import prepare_platform


class RanksMeasurement(Measurement):
    """Measures every run of these ranks, one after the other."""

    def __init__(self) -> None:
        super().__init__(Path(), 0, 0, None)
        self.sent = SentBytes()
        self.communication: dict = {}
        self.last = 0
        self.choice: Choice | None = None

    def watch_fit(self) -> None:
        """Keep what `--recompute-to-fit` chooses."""
        from megatron_ksa.training.recompute_fit import Fit

        choose = Fit.__call__

        @wraps(choose)
        def watched(fit, chunks):
            chunks = choose(fit, chunks)
            self.choice = fit.choice
            return chunks

        Fit.__call__ = watched

    def begin(self, record: Path, warm_up: int, iterations: int) -> None:
        """Start the next run of `iterations`; the last one is profiled where there are more than warm_up + 1."""
        self.record, self.warm_up, self.last = record, warm_up, iterations
        self.iterations, self.backends, self.communication, self.choice = [], {}, {}, None
        self.parts.open.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            left = torch.cuda.memory_allocated() / 2**30
            if left > 1:
                print(f"   {left:.1f} GiB are left of the run before", flush=True)

    def step(self, train_step):
        """As `Measurement.step`, with the communication of the last iteration; the record is written after each."""
        timed = super().step(train_step)

        @wraps(train_step)
        def watched(*args, **kwargs) -> tuple:
            # The last rank has written the record, which takes a moment.
            dist.barrier()
            if len(self.iterations) < self.last - 1:
                result = timed(*args, **kwargs)
            else:
                before = link_bytes()
                dist.barrier()
                with self.sent.counting(), profiled(self.communication):
                    result = timed(*args, **kwargs)
                dist.barrier()
                after = link_bytes()
                sent = {kind: number / 1e9 for kind, number in self.sent.by_kind().items()}
                self.communication |= {"sent_gb": sent, "nvlink_gb": None if before is None else (after - before) / 1e9}
            self.write()
            return result

        return watched

    def write(self) -> None:
        """What the ranks have measured so far: this rank's times, each one's peak of memory and communication."""
        from megatron.training import get_args

        counted = self.iterations[self.warm_up : self.last - 1] or self.iterations[-1:]
        mine = {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30, "profile": self.communication,
        }  # fmt: skip
        every: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        if dist.get_rank() < dist.get_world_size() - 1:
            return
        record = self.result(counted) | {"ranks": every, "complete": len(self.iterations) >= self.last}
        record |= {name: max(rank[name] for rank in every) for name in ("peak_gib", "reserved_gib")}
        record["predicted"] = predictions(get_args(), record["model_flops"], self.choice)
        if self.choice is not None:
            record["recompute"] = str(self.choice.recompute)
        with whole_file(self.record) as stream:
            stream.write(json.dumps(record))


def predictions(args, flops: float, choice: Choice | None) -> dict:
    """What `tools/plan_cluster.py` says of this run before it starts, with its assumptions about an H100.

    choice: what `--recompute-to-fit` has chosen.
    """
    from megatron_ksa.cost.cluster_plan import Cluster, bytes_on_the_wire, seconds_of_step
    from megatron_ksa.cost.memory import fullest_stage
    from megatron_ksa.cost.run_report import model_shape, training_layout
    from megatron_ksa.training.arguments import settings_from_args

    settings = settings_from_args(copy.copy(args))
    shape, layout = model_shape(args, settings), training_layout(args, settings)
    sent = bytes_on_the_wire(shape, layout)
    slowdown, memory = 1 / 3 if args.recompute_granularity == "full" else 0, fullest_stage(shape, layout)[1]
    if choice is not None:
        slowdown, memory = choice.slowdown, choice.memory
    return {
        "memory_gib": memory.total / 2**30,
        "sent_gb": {kind: number / 1e9 for kind, number in sent.items()},
        "seconds": seconds_of_step(layout, sent, flops, Cluster.of_h100(args.world_size), slowdown),
    }


def main() -> None:
    description, seconds = sys.argv[1:]
    runs = json.loads(Path(description).read_text())
    prepare_platform(runs[0]["flags"])
    from megatron_ksa.model import prepare
    from megatron_ksa.upstream.patches import apply
    from megatron_ksa.upstream.run_state import forget_run
    from megatron_ksa.upstream.trainer import OPTIMIZER_STEP, TRAIN_STEP

    measurement = RanksMeasurement()
    # What is measured here is what decides about it.
    prepare.REFUSES_UNCHECKED = False
    measurement.watch_loss()
    measurement.watch_teacher()
    measurement.watch_fit()
    for run in runs:
        faulthandler.dump_traceback_later(float(seconds), exit=True)
        measurement.begin(Path(run["record"]), run["warm_up"], run["iterations"])
        sys.argv = [sys.argv[0], *run["flags"]]
        with apply([TRAIN_STEP.given(measurement.step), OPTIMIZER_STEP.given(measurement.optimizer_step)]):
            pretrain_gpt.main()
        forget_run()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()

"""`pretrain_gpt.py` that trains a few steps with each of several lengths and recomputes, and records what they take.

Usage: peaks_pretrain.py RECORD.json CASES.json FLAGS...

CASES.json lists [text tokens, the fields of a `Recompute` or null for what `--recompute-to-fit` chooses, iterations].
Memory is read after each phase of an iteration: forward pass, output layer and loss, backward pass of the layers,
optimizer. On a GPU it is torch's peak of allocated bytes; on a CPU what `LiveMemory` counts. The model is built once;
later cases change its recompute in place.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pretrain_gpt  # noqa: E402
from megatron_ksa.config.recompute import Recompute  # noqa: E402
from megatron_ksa.cost.live_memory import LiveMemory  # noqa: E402
from megatron_ksa.files import whole_file  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402

# Bytes of a GPU that are left to its context and the allocator's fragments; a case that needs them is skipped.
RESERVED = 3 * 2**30


class DeviceMemory:
    """The GPU's allocator, with the calls of `LiveMemory`."""

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def begin_phase(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def shortened(batches: Iterator, length: int) -> Iterator:
    """Batches whose tensors [batch, n] have the first `length` tokens."""
    while True:
        batch = next(batches)
        yield {key: value[:, :length] if isinstance(value, Tensor) else value for key, value in batch.items()}


def _recompute(fields: dict | None) -> Recompute | None:
    """From what JSON has of its fields."""
    if fields is None:
        return None
    return Recompute(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


class Peaks:
    """Wraps the trainer's step, and records the cases instead of the first one."""

    def __init__(self, record: Path, cases: list) -> None:
        self.record = record
        self.cases = [(length, _recompute(fields), iterations) for length, fields, iterations in cases]
        self.skipped: list[str] = []
        self.memory = DeviceMemory() if torch.cuda.is_available() else LiveMemory()
        self.phases: dict[str, int] = {}
        self.saved = 0

    def mark(self, phase: str) -> None:
        """Note the peak of the phase that ends."""
        self.phases[phase] = max(self.phases.get(phase, 0), self.memory.peak)
        self.memory.begin_phase()

    def watch_loss(self) -> None:
        """Mark where output layer and loss begin and where the gradient of their input is there."""
        from megatron_ksa.model.chunked_loss import ChunkedLoss

        plain = ChunkedLoss.__call__

        def marked(processor: ChunkedLoss, *, hidden_states: Tensor, **kwargs) -> Tensor:
            self.saved = self.memory.live
            self.mark("forward")
            hidden_states.register_hook(lambda _: self.mark("loss"))
            return plain(processor, hidden_states=hidden_states, **kwargs)

        ChunkedLoss.__call__ = marked

    def optimizer_step(self, step: Callable) -> Callable:
        """The optimizer's `step`, as a phase."""

        @wraps(step)
        def marked(*args, **kwargs):
            self.mark("backward")
            result = step(*args, **kwargs)
            self.mark("optimizer")
            return result

        return marked

    def step(self, train_step: Callable) -> Callable:
        """Megatron's `train_step`, once for the kernels and the optimizer's state and then for every case."""

        @wraps(train_step)
        def measured(forward_step: Callable, data: Iterator, model: list, optimizer: object, *args, **kwargs) -> tuple:
            from megatron.core.rerun_state_machine import RerunDataIterator
            from megatron.training import get_args

            from megatron_ksa.model.recompute import set_recompute

            def run(length: int, recompute: Recompute) -> tuple:
                for chunk in model:
                    set_recompute(chunk, recompute)
                get_args().seq_length = length
                batches = RerunDataIterator(shortened(data, length))
                return train_step(forward_step, batches, model, optimizer, *args, **kwargs)

            length, recompute, _ = self.cases[0]
            recompute = recompute or self._fit(length)
            if isinstance(self.memory, LiveMemory):
                self.memory.__enter__()
                self.memory.count([*self._state(model, optimizer)])
            result = run(length, recompute)
            records = []
            for length, given, iterations in self.cases:
                recompute = given or self._fit(length)
                needs = self._predicted(length, recompute)["total"]
                if torch.cuda.is_available() and needs > torch.cuda.get_device_properties(0).total_memory - RESERVED:
                    self.skipped.append(f"{length}: {recompute}: {needs / 2**30:.1f} GiB are predicted")
                    continue
                try:
                    records.append(self._case(partial(run, length, recompute), length, recompute, iterations))
                except torch.OutOfMemoryError:
                    # The trainer's timers are still running: nothing can follow.
                    self.skipped.append(f"{length}: {recompute}: out of memory, {needs / 2**30:.1f} GiB are predicted")
                    self._write(records)
                    raise
                records[-1]["fit"] = given is None
                if torch.distributed.get_rank() == 0:
                    print(json.dumps(records[-1]), flush=True)
                    self._write(records)
            return result

        return measured

    @staticmethod
    def _state(model: list, optimizer: object) -> Iterator[Tensor]:
        """Parameters, gradient buffers and what the optimizer holds before its first step."""
        for chunk in model:
            yield from chunk.parameters()
            yield from (buffer.grad_data for buffer in chunk.buffers)
        for part in optimizer.chained_optimizers:
            yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])

    def _case(self, run: Callable[[], tuple], length: int, recompute: Recompute, iterations: int) -> dict:
        """Train some iterations; bytes are the largest of all ranks, the time is the median after the first."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.phases = {}
        state, losses, times = self.memory.live, [], []
        self.memory.begin_phase()
        for _ in range(iterations):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            losses.append(float(run()[0]["lm loss"]))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        found = {"state": state, "saved": self.saved - state, **self.phases}
        found["reserved"] = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        most = torch.tensor(list(found.values()), device=torch.cuda.current_device())
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        found = dict(zip(found, most.tolist(), strict=True))
        return {
            "length": length, "recompute": dataclasses.asdict(recompute), "what": str(recompute), "bytes": found,
            "peak": max(found[phase] for phase in ("forward", "loss", "backward", "optimizer")),
            "predicted": self._predicted(length, recompute), "losses": losses, "times": times,
            "seconds": statistics.median(times[1:] or times),
        }  # fmt: skip

    @staticmethod
    def _shape_and_layout(length: int) -> tuple:
        """What the costs are functions of, for the flags of this process."""
        from megatron.training import get_args

        from megatron_ksa.cost.run_report import model_shape, training_layout
        from megatron_ksa.training.arguments import settings_from_args

        args = get_args()
        settings = settings_from_args(args)
        return model_shape(args, settings), dataclasses.replace(training_layout(args, settings), text_length=length)

    def _fit(self, length: int) -> Recompute:
        """What `--recompute-to-fit` chooses; on a CPU for a GPU with room for half of what the layers save."""
        from megatron_ksa.config.fit import MARGIN
        from megatron_ksa.cost.memory import stage_memory
        from megatron_ksa.cost.recompute_fit import GIB, least

        shape, layout = self._shape_and_layout(length)
        if torch.cuda.is_available():
            budget = torch.cuda.get_device_properties(0).total_memory - MARGIN * GIB
        else:
            memory = stage_memory(shape, layout, 0)
            budget = memory.state + memory.activations / 2 + memory.working
        return least(shape, layout, 0, budget).recompute

    def _predicted(self, length: int, recompute: Recompute) -> dict[str, int]:
        """The memory model's bytes."""
        from megatron_ksa.cost.memory import stage_memory

        shape, layout = self._shape_and_layout(length)
        memory = stage_memory(shape, dataclasses.replace(layout, recompute=recompute), 0)
        return {**dataclasses.asdict(memory), "total": memory.total}

    def _write(self, records: list[dict]) -> None:
        from megatron.training import get_args

        from megatron_ksa.kernels.benchmarks.measure import header

        args = get_args()
        on_gpu = torch.cuda.is_available()
        record = {
            "ranks": torch.distributed.get_world_size(), "context_parallel": args.context_parallel_size,
            "distributed_optimizer": args.use_distributed_optimizer, "loss_rows": args.loss_chunk_rows,
            "layers": args.transformer_impl, "machine": header("cuda" if on_gpu else "cpu", None), "cases": records,
            "skipped": self.skipped, "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        }  # fmt: skip
        with whole_file(self.record) as stream:
            stream.write(json.dumps(record))


def main() -> None:
    record, cases, *flags = sys.argv[1:]
    sys.argv = [sys.argv[0], *flags]
    peaks = Peaks(Path(record), json.loads(Path(cases).read_text(encoding="utf-8")))
    prepare_platform(flags)
    from megatron_ksa.upstream.patches import apply
    from megatron_ksa.upstream.trainer import OPTIMIZER_STEP, TRAIN_STEP

    peaks.watch_loss()
    with apply([TRAIN_STEP.given(peaks.step), OPTIMIZER_STEP.given(peaks.optimizer_step)]):
        pretrain_gpt.main()


if __name__ == "__main__":
    main()

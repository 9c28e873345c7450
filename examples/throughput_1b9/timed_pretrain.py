"""`pretrain_gpt.py` that measures its iterations: seconds, parts of them, memory, floating-point operations.

Usage: timed_pretrain.py RECORD.json WARM_UP MEASURED PROFILE|- FLAGS...

MEASURED iterations count after WARM_UP; with PROFILE, one more is profiled, whose kernels and calls go to that file.

The parts are read from events on the device's stream around the core attention of each layer, the output layer with the
loss and the optimizer, so that nothing waits for them inside an iteration; what is recomputed counts as forward.
"""

import functools
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pretrain_gpt  # noqa: E402
from megatron_ksa.files import whole_file  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402

# Dense bf16 peak in FLOP/s, NVIDIA's data sheets.
PEAKS = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12, "H100 PCIe": 756e12, "A100": 312e12}


class Parts:
    """Time between pairs of marks of one iteration, by part; none inside a CUDA graph, where events tell no time."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.spans: list[tuple[str, object, object]] = []
        self.open: dict[str, object] = {}

    def _mark(self) -> object:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _captured(self) -> bool:
        return self.on_gpu and torch.cuda.is_current_stream_capturing()

    def start(self, part: str) -> None:
        if not self._captured():
            self.open[part] = self._mark()

    def stop(self, part: str) -> None:
        if not self._captured():
            self.spans.append((part, self.open.pop(part), self._mark()))

    def take(self) -> dict[str, float]:
        """Milliseconds of each part since the last call; the device must be done."""
        total: dict[str, float] = defaultdict(float)
        for part, begin, end in self.spans:
            total[part] += begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
        self.spans.clear()
        return dict(total)


class _Enter(torch.autograd.Function):
    """The identity: starts a part's forward pass and stops its backward pass."""

    @staticmethod
    def forward(ctx, parts: Parts, part: str, *tensors: Tensor):
        ctx.parts, ctx.part = parts, part
        parts.start(f"{part} forward")
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        ctx.parts.stop(f"{ctx.part} backward")
        return None, None, *gradients


class _Leave(torch.autograd.Function):
    """The identity: stops a part's forward pass and starts its backward pass."""

    @staticmethod
    def forward(ctx, parts: Parts, part: str, tensor: Tensor):
        ctx.parts, ctx.part = parts, part
        parts.stop(f"{part} forward")
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.parts.start(f"{ctx.part} backward")
        return None, None, gradient


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Write tables of what runs in the body: kernels by their time, calls by the host's time for them, and sums."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        # Ranges on the device's timeline, such as an optimizer's step, hold kernels that are counted by themselves.
        range_of_kernels = getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.step#")
        if event.device_type == torch.autograd.DeviceType.CUDA and not range_of_kernels:
            kernels[event.name].append(event.device_time_total / 1e3)
    busy, number = sum(map(sum, kernels.values())), sum(map(len, kernels.values()))
    lines = [f"{seconds * 1e3:.1f} ms with the profiler, {busy:.1f} ms of {number} kernels and copies"]
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:80]:
        lines.append(f"{sum(times):9.3f} ms {len(times):6} x {sum(times) / len(times) * 1e3:9.1f} us  {name[:150]}")
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=60, max_name_column_width=90)
    path.write_text("\n".join(lines) + f"\n\n{table}\n", encoding="utf-8")


def count_flops() -> float:
    """Floating-point operations of an iteration, as the trainer counts them while it runs."""
    from megatron.training import get_args, training

    args = get_args()
    return training.num_floating_point_operations(args, args.global_batch_size)


@functools.cache
def machine() -> dict[str, object]:
    """Where this runs; it asks nvidia-smi and git."""
    from megatron_ksa.kernels.benchmarks.measure import header

    return header("cuda" if torch.cuda.is_available() else "cpu", None)


class Measurement:
    """Wraps the trainer's step, and writes the record after the last iteration."""

    def __init__(self, record: Path, warm_up: int, measured: int, profile: Path | None) -> None:
        self.record, self.warm_up, self.measured, self.profile = record, warm_up, measured, profile
        self.parts = Parts()
        self.iterations: list[dict] = []
        self.backends: dict[str, str] = {}
        self.teaches = False
        self.flops = 0.0

    def watch_attention(self, model: torch.nn.Module) -> None:
        """Mark the core attention of every layer, and note which kernel it takes."""
        from megatron_ksa.kernels.dispatch import uses_triton
        from megatron_ksa.model.causal_attention import causal_backend
        from megatron_ksa.model.core_attention import KSACoreAttention, TextCoreAttention

        def enter(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            rows = args[:3]
            if self.teaches:
                self.backends.setdefault("teacher", causal_backend(*rows))
            elif module.geometry is None:
                self.backends.setdefault("full attention", causal_backend(*rows))
            else:
                window = module.geometry.window_chunks * module.geometry.chunk_size
                text = (
                    rows if isinstance(module, TextCoreAttention) else [module.layout.split(part)[0] for part in rows]
                )
                kernel = "KSA, Triton" if uses_triton("KSA attention", rows[0]) else "KSA, PyTorch"
                kernel = causal_backend(*text) if window >= text[0].shape[0] else kernel
                self.backends.setdefault(f"window of {window} tokens", kernel)
            return (*_Enter.apply(self.parts, self._attention, *rows), *args[3:]), kwargs

        def leave(module: torch.nn.Module, args: tuple, out: Tensor) -> Tensor:
            return _Leave.apply(self.parts, self._attention, out)

        for module in model.modules():
            if isinstance(module, KSACoreAttention | TextCoreAttention):
                module.register_forward_pre_hook(enter, with_kwargs=True)
                module.register_forward_hook(leave)

    @property
    def _attention(self) -> str:
        return "teacher's attention" if self.teaches else "attention"

    def watch_teacher(self) -> None:
        """Mark the pass of distillation's teacher; its attention is a part of its own."""
        from megatron_ksa.model.distillation import Distillation

        teach = Distillation._teach

        def timed(*args) -> tuple:
            self.teaches = True
            self.parts.start("teacher")
            try:
                return teach(*args)
            finally:
                self.parts.stop("teacher")
                self.teaches = False

        Distillation._teach = timed

    def watch_loss(self) -> None:
        """Mark the output layer and the loss."""
        from megatron_ksa.model.chunked_loss import ChunkedLoss
        from megatron_ksa.model.distillation_loss import DistillationLoss, TokenLosses

        plain, distilled = ChunkedLoss.__call__, DistillationLoss.__call__

        def timed(processor: ChunkedLoss, *, hidden_states: Tensor, **kwargs) -> Tensor:
            (hidden_states,) = _Enter.apply(self.parts, "loss", hidden_states)
            return _Leave.apply(self.parts, "loss", plain(processor, hidden_states=hidden_states, **kwargs))

        def timed_distillation(processor: DistillationLoss, *, hidden_states: Tensor, **kwargs) -> TokenLosses:
            (hidden_states,) = _Enter.apply(self.parts, "loss", hidden_states)
            losses = distilled(processor, hidden_states=hidden_states, **kwargs)
            return losses._replace(total=_Leave.apply(self.parts, "loss", losses.total))

        ChunkedLoss.__call__, DistillationLoss.__call__ = timed, timed_distillation

    def _timed(self, call: Callable, part: str) -> Callable:
        @wraps(call)
        def timed(*args, **kwargs):
            self.parts.start(part)
            result = call(*args, **kwargs)
            self.parts.stop(part)
            return result

        return timed

    def optimizer_step(self, step: Callable) -> Callable:
        """The optimizer's `step`, as a part."""
        return self._timed(step, "optimizer")

    def step(self, train_step: Callable) -> Callable:
        """Megatron's `train_step`, timed from one idle device to the next."""

        @wraps(train_step)
        def timed(forward_step: Callable, data: object, model: list, optimizer: object, *args, **kwargs) -> tuple:
            if not self.iterations:
                self.flops = count_flops()
                for chunk in model:
                    self.watch_attention(chunk)
            watch = nullcontext()
            if self.profile is not None and len(self.iterations) == self.warm_up + self.measured:
                watch = profiled(self.profile)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with watch:
                result = train_step(forward_step, data, model, optimizer, *args, **kwargs)
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            loss = result[0]["lm loss"]
            self.iterations.append({"ms": seconds * 1e3, "loss": float(loss), "parts_ms": self.parts.take()})
            print(f"   {seconds:.3f} s, loss {float(loss):.4f}", flush=True)
            return result

        return timed

    def result(self, counted: list[dict]) -> dict:
        """The medians of these iterations, and what this process knows beside them."""
        from megatron.training import get_args

        args = get_args()
        if not all(math.isfinite(iteration["loss"]) for iteration in self.iterations):
            raise ArithmeticError(f"the loss is not finite: {[i['loss'] for i in self.iterations]}")
        ms = statistics.median(iteration["ms"] for iteration in counted)
        names = sorted(set.intersection(*(set(iteration["parts_ms"]) for iteration in counted)))
        parts = {name: statistics.median(iteration["parts_ms"][name] for iteration in counted) for name in names}
        if "teacher" in parts:
            parts["teacher's other layers"] = parts.pop("teacher") - parts["teacher's attention forward"]
        flops = self.flops
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        peak = next((value for name, value in PEAKS.items() if name in device), None)
        per_gpu = flops / ms * 1e3 / args.world_size
        return {
            "iteration_ms": ms, "tokens_per_second": args.global_batch_size * args.seq_length / ms * 1e3,
            "model_flops": flops, "tflops": per_gpu / 1e12, "mfu": per_gpu / peak if peak else None,
            "parts_ms": {**parts, "rest": ms - sum(parts.values())},
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "attention": self.backends, "recompute": args.recompute_granularity, "loss_rows": args.loss_chunk_rows,
            "kept_logits": args.loss_kept_logits,
            "iterations": self.iterations, "warm_up": self.warm_up,
            "machine": machine(),
        }  # fmt: skip

    def write(self) -> None:
        """The medians of the iterations after the warm-up."""
        record = self.result(self.iterations[self.warm_up : self.warm_up + self.measured])
        with whole_file(self.record) as stream:
            stream.write(json.dumps(record))


def main() -> None:
    record, warm_up, measured, profile, *flags = sys.argv[1:]
    sys.argv = [sys.argv[0], *flags]
    measurement = Measurement(Path(record), int(warm_up), int(measured), None if profile == "-" else Path(profile))
    prepare_platform(flags)
    from megatron_ksa.model import prepare
    from megatron_ksa.upstream.patches import apply
    from megatron_ksa.upstream.trainer import OPTIMIZER_STEP, TRAIN_STEP

    # What is measured here is what decides about it.
    prepare.REFUSES_UNCHECKED = False
    measurement.watch_loss()
    measurement.watch_teacher()
    with apply([TRAIN_STEP.given(measurement.step), OPTIMIZER_STEP.given(measurement.optimizer_step)]):
        pretrain_gpt.main()
        measurement.write()


if __name__ == "__main__":
    main()

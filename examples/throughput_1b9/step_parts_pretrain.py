"""`pretrain_gpt.py` that compares variants of a step in turns and measures what its parts take.

Usage: step_parts_pretrain.py RECORD.json MEASURED 'VARIANT;VARIANT' FLAGS...

Every variant runs in the same process, from the same state on, in rounds; the last iterations are profiled.
"""

import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from kernel_parts import OPTIMIZER, Part, StepShape, factors, product_flops, read_trace  # noqa: E402
from timed_pretrain import PEAKS, count_flops  # noqa: E402

import pretrain_gpt  # noqa: E402
from megatron_ksa.config.kernels import FUSIONS  # noqa: E402
from megatron_ksa.config.loss import LossConfig  # noqa: E402
from megatron_ksa.files import whole_file  # noqa: E402
from megatron_ksa.platform import prepare_platform  # noqa: E402

CHUNKED = LossConfig(chunk_rows=4096)
ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step: which fusions are taken apart, how the loss is computed, whether losses and gradients are checked."""

    apart: frozenset[str]
    loss: LossConfig
    checks: bool = True


def variants() -> dict[str, Variant]:
    """Without any change, with each alone, with all."""
    every = frozenset(FUSIONS)
    return {
        "before": Variant(every, CHUNKED),
        **{name: Variant(every - {name}, CHUNKED) for name in FUSIONS},
        "logits": Variant(every, LossConfig()),
        "all": Variant(frozenset(), LossConfig()),
        "all, unchecked": Variant(frozenset(), LossConfig(), checks=False),
    }


PROFILED = ("before", "all")


def plan(measured: int, names: list[str]) -> list[tuple[str, str]]:
    """Variant and purpose (warm, time or profile) of every iteration."""
    steps = [(names[0], "warm")] * 2
    for _ in range(ROUNDS):
        for name in names:
            steps += [(name, "warm")] + [(name, "time")] * measured
    for name in PROFILED:
        if name in names:
            steps += [(name, "warm"), (name, "profile")]
    return steps


class StepParts:
    """Wraps the trainer's step."""

    def __init__(self, record: Path, measured: int, names: list[str]) -> None:
        self.record, self.plan = record, plan(measured, names)
        self.variants = {name: variants()[name] for name in names}
        self.times: dict[str, list[float]] = {name: [] for name in self.variants}
        self.peaks: dict[str, float] = {}
        self.losses: list[float] = []
        self.parts: dict[str, tuple[dict[str, Part], float]] = {}
        self.done = 0
        self.parameters = 0
        self.machine: dict = {}

    def set_variant(self, variant: Variant, forward_step: object, model: list) -> None:
        """Let the next iteration be this variant."""
        from megatron.training import get_args

        from megatron_ksa.kernels.dispatch import take_apart
        from megatron_ksa.kernels.unchecked import take_unchecked

        take_unchecked()
        take_apart(variant.apart)
        forward_step.loss.loss = variant.loss
        get_args().check_for_nan_in_loss_and_grad = variant.checks
        for chunk in model:
            chunk.ddp_config.check_for_nan_in_grad = variant.checks

    def optimizer_step(self, step: Callable) -> Callable:
        """The optimizer's `step`, named in the trace."""

        @functools.wraps(step)
        def named(*args, **kwargs):
            with torch.profiler.record_function(OPTIMIZER):
                return step(*args, **kwargs)

        return named

    def step(self, train_step: Callable) -> Callable:
        """Megatron's `train_step`, timed from one idle device to the next."""

        @functools.wraps(train_step)
        def timed(forward_step: Callable, data: object, model: list, *args, **kwargs) -> tuple:
            name, purpose = self.plan[self.done]
            self.parameters = sum(p.numel() for chunk in model for p in chunk.parameters() if p.requires_grad)
            self.set_variant(self.variants[name], forward_step, model)
            run = functools.partial(train_step, forward_step, data, model, *args, **kwargs)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            result = self.profile(name, run) if purpose == "profile" else run()
            torch.cuda.synchronize()
            ms = (time.perf_counter() - begin) * 1e3
            if purpose == "time":
                self.times[name].append(ms)
                self.peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            self.losses.append(float(result[0]["lm loss"]))
            print(f"   {name}, {purpose}: {ms:.1f} ms, loss {self.losses[-1]:.4f}", flush=True)
            self.done += 1
            self.write()
            return result

        return timed

    def profile(self, name: str, run: Callable) -> tuple:
        """One iteration under the profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        from megatron.training import get_args

        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            result = run()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            self.parts[name] = read_trace(trace, get_args().padded_vocab_size, on_gpu)
        return result

    def shape(self) -> StepShape:
        """Sizes of the step that runs."""
        from megatron.training import get_args

        from megatron_ksa.config.ksa import KSAConfig
        from megatron_ksa.config.options import config_from_args
        from megatron_ksa.cost.flops import visible_pairs

        args = get_args()
        text, layers = args.seq_length, args.num_layers
        rows, pairs = layers * text, layers * text * (text + 1) // 2
        if args.ksa:
            ksa = config_from_args(KSAConfig, args, "ksa")
            kinds = ksa.layers(layers, text)
            rows = sum(text + (text // ksa.chunk_size * ksa.summary_tokens) * kind.has_summaries for kind in kinds)
            pairs = sum(
                visible_pairs(text, ksa.chunk_size, ksa.summary_tokens * kind.has_summaries, kind.window_chunks)
                for kind in kinds
            )
        heads = args.num_attention_heads
        return StepShape(
            layers=layers, hidden=args.hidden_size, ffn=args.ffn_hidden_size, head_dim=args.kv_channels, heads=heads,
            groups=args.num_query_groups if args.group_query_attention else heads, words=args.padded_vocab_size,
            rows=rows, text=text, pairs=pairs, parameters=self.parameters, itemsize=2 if args.bf16 else 4,
            recomputes=args.recompute_granularity == "full",
        )  # fmt: skip

    def write(self) -> None:
        """What is measured by now and where; with the floors after the last iteration."""
        from megatron_ksa.kernels.benchmarks.measure import header

        on_gpu = torch.cuda.is_available()
        self.machine = self.machine or header("cuda" if on_gpu else "cpu", None)
        record: dict = {
            "iteration_ms": {name: statistics.median(times) for name, times in self.times.items() if times},
            "times_ms": self.times, "peak_gib": self.peaks, "losses": self.losses, "machine": self.machine,
        }  # fmt: skip
        if self.done == len(self.plan):
            record["flops"] = count_flops()
            peak = PEAKS.get(next((name for name in PEAKS if on_gpu and name in torch.cuda.get_device_name()), ""))
            if peak:
                ms = record["iteration_ms"]
                record["mfu"] = {name: record["flops"] / time / 1e-3 / peak for name, time in ms.items()}
            record |= self.floors()
        with whole_file(self.record) as stream:
            stream.write(json.dumps(record))

    def floors(self) -> dict:
        """Parts of the profiled variants with their floors."""
        shape, bandwidth = self.shape(), copy_bandwidth()
        alone: dict[tuple, float] = {}
        for parts, _ in self.parts.values():
            for name, part in parts.items():
                for operator, sizes in part.shapes if name.startswith("products") else ():
                    key = factors(operator, sizes)
                    if key not in alone:
                        alone[key] = product_ms(*key, shape.itemsize)
        rate = max((product_flops(*key) / ms for key, ms in alone.items()), default=1.0)
        traffic = shape.traffic()
        floors = {name: size / bandwidth for name, size in traffic.items()}
        floors["attention"] = shape.attention_flops() / rate
        listed = {}
        for variant, (parts, busy) in self.parts.items():
            rows = {}
            for name, part in parts.items():
                floor = floors.get(name, 0.0)
                if name.startswith("products"):
                    floor = sum(calls * alone[factors(*key)] for key, (calls, _) in part.shapes.items())
                names = sorted(((*key, *value) for key, value in part.names.items()), key=lambda row: -row[3])
                rows[name] = {"ms": part.ms, "floor_ms": floor, "kernels": part.kernels, "names": names[:12]}
                if name.startswith("products"):
                    rows[name]["shapes"] = [
                        {
                            "operator": key[0],
                            "factors": factors(*key),
                            "calls": calls,
                            "ms": ms,
                            "alone_ms": calls * alone[factors(*key)],
                        }
                        for key, (calls, ms) in part.shapes.items()
                    ]
            listed[variant] = {"parts": rows, "busy_ms": busy}
        return {
            "profiles": listed, "copy_bytes_per_ms": bandwidth, "fastest_flops_per_ms": rate,
            "traffic_bytes": traffic, "shape": dataclasses.asdict(shape),
        }  # fmt: skip


def copy_bandwidth() -> float:
    """Bytes per millisecond of a copy, what it reads and what it writes."""
    on_gpu = torch.cuda.is_available()
    source = torch.ones(2**28 if on_gpu else 2**20, dtype=torch.float32, device="cuda" if on_gpu else "cpu")
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))


def product_ms(left: tuple, right: tuple, itemsize: int) -> float:
    """Milliseconds of a product of matrices of these sizes alone, in the fastest layout of the two."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16 if itemsize == 2 else torch.float32
    a, b = (torch.randn(size, device=device, dtype=dtype) for size in (left, right))
    flipped_a, flipped_b = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (a, b))
    return min(fastest(functools.partial(torch.matmul, *pair)) for pair in ((a, b), (a, flipped_b), (flipped_a, b)))


def fastest(run: Callable[[], object], runs: int = 5, in_a_row: int = 4) -> float:
    """Milliseconds of a call: the median of several runs of some calls in a row, so that launches cost no time."""
    times = []
    for number in range(runs + 1):
        torch.cuda.synchronize()
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            begin.record()
            for _ in range(in_a_row):
                run()
            end.record()
            torch.cuda.synchronize()
            ms = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            for _ in range(in_a_row):
                run()
            ms = (time.perf_counter() - start) * 1e3
        if number:
            times.append(ms / in_a_row)
    return statistics.median(times)


def main() -> None:
    record, measured, names, *flags = sys.argv[1:]
    sys.argv = [sys.argv[0], *flags]
    parts = StepParts(Path(record), int(measured), names.split(";"))
    prepare_platform(flags)
    from megatron_ksa.upstream.patches import apply
    from megatron_ksa.upstream.trainer import OPTIMIZER_STEP, TRAIN_STEP

    with apply([TRAIN_STEP.given(parts.step), OPTIMIZER_STEP.given(parts.optimizer_step)]):
        pretrain_gpt.main()


if __name__ == "__main__":
    main()

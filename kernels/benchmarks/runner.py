"""Checks every op asked for, times those that pass at every shape, and writes the record after each step."""

import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file
from megatron_ksa.kernels.benchmarks import attention, attention_parts, baselines, decode, rotation
from megatron_ksa.kernels.benchmarks.check import check_op
from megatron_ksa.kernels.benchmarks.measure import header, milliseconds, peak_bytes
from megatron_ksa.kernels.benchmarks.registry import BACKWARD, BOTH, FORWARD, Case, Op, Shape

# In the order in which they run for each number of heads: what a limit of time cuts off comes last.
OPS = {
    op.name: op
    for op in (
        attention.KSA, attention.WINDOW, attention.FULL, rotation.COPY, *rotation.ROTATIONS, *decode.DECODES,
        attention_parts.PARTS,
        attention.FLEX, *baselines.BASELINES, attention.FLEX_INTERLEAVED,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        ops: names of registered ops.
        shapes: shapes of each op, in this order.
        device: cuda or cpu.
        out: file of the record.
        sweep_shapes: shapes at which candidate tiles are timed too.
        limit: seconds after which nothing new is started; what is left is recorded as skipped.
        commit: commit of the code, where it is no git checkout.
        features: check an op's features too (documents, segments, other head dimensions and dtypes).
    """

    ops: tuple[str, ...]
    shapes: tuple[Shape, ...]
    device: str
    out: Path
    sweep_shapes: tuple[Shape, ...] = ()
    limit: float = 330.0
    commit: str | None = None
    features: bool = True


def write_record(record: dict, path: Path) -> None:
    """Write JSON; a run cut short leaves the record of the step before."""
    with whole_file(path) as stream:
        stream.write(json.dumps(record, indent=1) + "\n")


def calls(case: Case) -> Iterable[tuple[str, Callable[[], object]]]:
    """The timed calls of a case by mode."""
    if isinstance(case.modes, dict):
        yield from case.modes.items()
        return
    outputs = case.run(*case.leaves)
    d_outputs = [torch.randn_like(out) for out in outputs]
    if BACKWARD not in case.modes:
        # The graph of `outputs` keeps what its backward pass needs, which no forward call should find allocated.
        del outputs
    for mode in case.modes:
        if mode == FORWARD:
            yield mode, lambda: case.run(*case.leaves)
        elif mode == BACKWARD:
            yield mode, lambda: torch.autograd.grad(outputs, case.leaves, d_outputs, retain_graph=True)
            del outputs
        else:
            yield mode, lambda: torch.autograd.grad(case.run(*case.leaves), case.leaves, d_outputs)


def measure(op: Op, shape: Shape, device: str) -> dict:
    """Times, rates and memory of an op at a shape, or the error that it raises there (out of memory, for one)."""
    result: dict[str, object] = {"op": op.name, "shape": shape.as_json()}
    try:
        case = op.prepare(shape, device)
        result |= case.facts | {"modes": {}}
        for mode, call in calls(case):
            times = milliseconds(call, device)
            if mode in case.flops:
                times["visible_tflops"] = case.flops[mode] / times["median_ms"] / 1e9
            if mode in case.moved_bytes:
                times["gigabytes_per_second"] = case.moved_bytes[mode] / times["median_ms"] / 1e6
            result["modes"][mode] = times
            if mode == BOTH:
                result |= peak_bytes(call, device) | {"outputs_and_gradients_bytes": case.needed_bytes}
    except Exception as error:  # a baseline may fail in any of its libraries' ways; that is a result too
        result["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
    return result


def line(result: dict) -> str:
    """One line on a result."""
    parts = []
    for mode, times in result.get("modes", {}).items():
        rate = f", {times['visible_tflops']:.0f} TFLOP/s" if "visible_tflops" in times else ""
        rate += f", {times['gigabytes_per_second']:.0f} GB/s" if "gigabytes_per_second" in times else ""
        parts.append(f"{mode} {times['median_ms']:.3f} ms{rate}")
    if result.get("peak_over_inputs_bytes") is not None:
        peak, needed = (result[key] / 2**20 for key in ("peak_over_inputs_bytes", "outputs_and_gradients_bytes"))
        parts.append(f"over inputs {peak:.0f} MiB, outputs and gradients {needed:.0f} MiB")
    parts += [result[key] for key in ("error", "skipped") if key in result]
    return " | ".join(parts)


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(plan: Plan) -> dict:
    """Run a plan; the record holds header, checks by op, results and sweeps.

    Raises:
        UsageError: an unknown op, or, after everything else has run, ops whose checks fail.
    """
    unknown = [name for name in plan.ops if name not in OPS]
    if unknown:
        raise UsageError(f"unknown op {', '.join(unknown)}: --op takes {', '.join(OPS)}")
    deadline = time.monotonic() + plan.limit
    torch.manual_seed(0)
    record: dict = {"header": header(plan.device, plan.commit), "checks": {}, "results": [], "sweeps": []}
    print(record["header"], flush=True)
    failed: dict[str, list[str]] = {}

    def fails(name: str) -> bool:
        """Whether the check of an op fails; it runs once."""
        if name not in failed:
            record["checks"][name], failed[name] = check_op(OPS[name], plan.device, plan.features)
            print(f"check {name}: {'FAILED' if failed[name] else 'ok'}", *failed[name], sep="\n  ", flush=True)
        return bool(failed[name])

    ops = [op for name, op in OPS.items() if name in plan.ops]
    for heads in dict.fromkeys((shape.heads, shape.groups) for shape in plan.shapes):
        for op in ops:
            for shape in plan.shapes:
                if (shape.heads, shape.groups) != heads:
                    continue
                if reason := op.missing(shape, plan.device):
                    result = {"op": op.name, "shape": shape.as_json(), "skipped": reason}
                elif fails(op.checked_by or op.name):
                    result = {"op": op.name, "shape": shape.as_json(), "error": "not timed: its check fails"}
                elif time.monotonic() > deadline:
                    over = f"the run's {plan.limit:.0f} s were over"
                    result = {"op": op.name, "shape": shape.as_json(), "skipped": over}
                else:
                    result = measure(op, shape, plan.device)
                record["results"].append(result)
                print(f"{op.name} {shape}: {line(result)}", flush=True)
                write_record(record, plan.out)
                _release(plan.device)
    # Candidates are compared with what the present tiles compute, so that must be right.
    for shape in plan.sweep_shapes if plan.sweep_shapes and not fails(attention.KSA.name) else ():
        tiles = attention_parts.sweep(shape, plan.device, deadline)
        record["sweeps"].append({"shape": shape.as_json(), "tiles": tiles})
        write_record(record, plan.out)
    bad = [entry for entries in failed.values() for entry in entries]
    if bad:
        raise UsageError(f"checks fail, so these ops were not timed: {'; '.join(bad)[:600]}")
    return record

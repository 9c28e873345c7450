"""Communication of an iteration: how long its kernels run, how much of that computation hides, bytes that are sent."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ksa.upstream.patches import Patch, apply, signature

Spans = list[tuple[float, float]]
# Ranges on the device's timeline, which hold kernels that are counted by themselves.
RANGES = ("Optimizer.", "nccl:", "ProfilerStep", "## ", "Torch-Compiled")
# Kernels that are named with their time.
LONGEST = 25
LINK = re.compile(r"Data Tx:\s*(\d+)\s*KiB")


def merged(spans: Iterable[tuple[float, float]]) -> Spans:
    """Spans (begin, end) as disjoint ones, in order."""
    out: Spans = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def length(spans: Spans) -> float:
    """Total length of disjoint spans."""
    return sum(end - begin for begin, end in spans)


def overlap(a: Spans, b: Spans) -> float:
    """Length of what two lists of disjoint, ordered spans share."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def exposure(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float | dict[str, float]]:
    """How much of the communication of one device runs beside computation.

    A communication kernel that waits for another rank counts as communication for as long.

    Args:
        kernels: name, begin and end of everything that ran on the device, in microseconds.

    Returns:
        Milliseconds: `communication` in which any communication kernel ran, `exposed` those in which nothing else did,
        `computation`, `idle` in which nothing ran between the first kernel and the last; `hidden`, the share of
        communication that is not exposed (1 where there is none); `ms of KERNEL` for each communication kernel, which
        may overlap; and `kernels`, those of the computation that take longest, by name.
    """
    communication, computation, by_name, computing = [], [], Counter(), Counter()
    for name, begin, end in kernels:
        if name.startswith("ncclDevKernel"):
            communication.append((begin, end))
            by_name[name.split("(")[0].removeprefix("ncclDevKernel_")] += (end - begin) / 1e3
        else:
            computation.append((begin, end))
            computing[name.split("<")[0][:60]] += (end - begin) / 1e3
    communication, computation = merged(communication), merged(computation)
    every = merged([*communication, *computation])
    sent = length(communication)
    exposed = sent - overlap(communication, computation)
    whole = every[-1][1] - every[0][0] if every else 0.0
    return {
        "communication": sent / 1e3, "exposed": exposed / 1e3, "hidden": 1 - exposed / sent if sent else 1.0,
        "computation": length(computation) / 1e3, "idle": (whole - length(every)) / 1e3,
        **{f"ms of {name}": ms for name, ms in by_name.most_common()},
        "kernels": dict(computing.most_common(LONGEST)),
    }  # fmt: skip


@contextmanager
def profiled(found: dict) -> Iterator[None]:
    """Put the `exposure` of what the body runs on this process's GPU into `found`; nothing without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    try:
        found |= exposure(
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == on_device and not event.name.startswith(RANGES)
        )
    except Exception as error:
        # The iterations that count are measured: a profiler of another version costs the profile alone.
        found["failed"] = f"{type(error).__name__}: {error}"


def _ring(tensors: object, factor: float, size: int) -> float:
    """Bytes that a rank of a ring of `size` sends, for tensors of which it sends `factor` * (size - 1) / size."""
    each = tensors if isinstance(tensors, list | tuple) else [tensors]
    return sum(tensor.nbytes for tensor in each) * factor * (size - 1) / size


def _split(args: tuple, size: int, rank: int) -> float:
    """Bytes of an all-to-all that leave a rank: output, input, output sizes, input sizes."""
    rows: Tensor = args[1]
    sizes = args[3] if len(args) > 3 and args[3] else [rows.shape[0] // size] * size if rows.dim() else [1] * size
    whole = sum(sizes)
    return rows.nbytes * (whole - sizes[rank]) / whole if whole else 0.0


def _gathered(name: str) -> Callable[[tuple, int, int], float]:
    return lambda args, size, rank: _ring(args[1 if "reduce" in name else 0], 1, size)


# Methods of a process group, in the names of torch 2.11 and of 2.14, and the bytes of a call with these arguments, of a
# rank of a group of this size.
SENT: dict[str, Callable[[tuple, int, int], float]] = {
    "allreduce": lambda args, size, rank: _ring(args[0], 2, size),
    "allreduce_coalesced": lambda args, size, rank: _ring(args[0], 2, size),
    "alltoall_base": _split,
    "all_to_all_single": _split,
    "send": lambda args, size, rank: _ring(args[0], size / (size - 1), size),
}
SENT |= {
    name: _gathered(name)
    for name in (
        "_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced", "all_gather_single_coalesced",
        "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced",
        "reduce_scatter_single_coalesced",
    )
}  # fmt: skip


class SentBytes:
    """Counts what this process asks its groups to send, by group; collectives as a ring sends them."""

    def __init__(self) -> None:
        self.by_group: Counter[str] = Counter()

    def _counting(self, call: Callable, sent: Callable[[tuple, int, int], float]) -> Callable:
        @wraps(call)
        def counted(group: dist.ProcessGroup, *args, **kwargs):
            if group.size() > 1:
                self.by_group[group.group_name] += sent(args, group.size(), group.rank())
            return call(group, *args, **kwargs)

        return counted

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in the body."""
        self.by_group.clear()
        with apply([self._patch(name) for name in vars(dist.ProcessGroup) if name in SENT]):
            yield

    def _patch(self, name: str) -> Patch:
        target, sent = f"torch.distributed:ProcessGroup.{name}", SENT[name]
        # Written for any version's arguments: what there is is what is expected.
        expects = signature(getattr(dist.ProcessGroup, name))
        return Patch(target, lambda call: self._counting(call, sent), "the bytes of each call are counted", expects)

    def by_kind(self) -> dict[str, int]:
        """Bytes by kind of parallelism, as `cluster_plan.bytes_on_the_wire` has them, and `other`."""
        from megatron.core import parallel_state

        kinds = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        names = {group.group_name: kind for kind, group in kinds.items()}
        total: Counter[str] = Counter(dict.fromkeys(kinds, 0))
        for name, number in self.by_group.items():
            total[names.get(name, "other")] += round(number)
        return dict(total)


def link_bytes() -> int | None:
    """Bytes that this process's GPU has sent over NVLink so far, as it counts them; None where it does not."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "nvlink", "-gt", "d", "-i", os.environ.get("LOCAL_RANK", "0")]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    links = [int(kib) for kib in LINK.findall(said)]
    return sum(links) * 1024 if links else None

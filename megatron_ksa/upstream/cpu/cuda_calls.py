"""Stand-ins for the `torch.cuda` calls of Megatron's trainer on a machine without a GPU.

Work on the CPU is done when a call returns, so streams and events only keep their place. The random state is the CPU
generator's, and memory is that of the process.
"""

import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_ksa.upstream.patches import Patch


class CpuStream:
    """A stream whose work is always done; also a context manager, as `torch.cuda.stream` returns."""

    device = torch.device("cpu")
    cuda_stream = 0
    stream_id = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Device and priority are accepted and have no meaning here."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """True: nothing is pending."""
        return True

    def wait_stream(self, stream: "CpuStream") -> None:
        """Nothing is pending on the other stream."""

    def wait_event(self, event: "CpuEvent") -> None:
        """The event has happened."""

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        """Record the event, or a new one, now."""
        event = CpuEvent() if event is None else event
        event.record()
        return event

    def __enter__(self) -> "CpuStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


class CpuEvent:
    """A point in wall-clock time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Timing, blocking and sharing flags are accepted; every event carries its time."""
        self.seconds: float | None = None

    def record(self, stream: CpuStream | None = None) -> None:
        """Take the time."""
        self.seconds = time.perf_counter()

    def wait(self, stream: CpuStream | None = None) -> None:
        """The event has happened."""

    def synchronize(self) -> None:
        """The event has happened."""

    def query(self) -> bool:
        """True: the event has happened."""
        return True

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1e3


_STREAM = CpuStream()


def _current_stream(device: Any = None) -> CpuStream:
    return _STREAM


def _stream_context(stream: CpuStream | None) -> Any:
    return nullcontext() if stream is None else stream


def _get_rng_state(device: Any = "cuda") -> Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: Tensor, device: Any = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _resident_bytes(device: Any = None) -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes(device: Any = None) -> int:
    # The kernel updates its record of the peak now and then, so that it can lag behind the present.
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _resident_bytes())


def _memory_stats(device: Any = None) -> dict[str, int]:
    resident, peak = _resident_bytes(), _peak_resident_bytes()
    known = {"current": resident, "peak": peak}
    stats: defaultdict[str, int] = defaultdict(int)
    for kind in ("reserved_bytes", "allocated_bytes", "active_bytes"):
        for moment, value in known.items():
            stats[f"{kind}.all.{moment}"] = value
    return stats


def _total_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _total_bytes()


def _device_properties(device: Any = None) -> SimpleNamespace:
    # Compute capability 0.0 keeps every feature that asks for a GPU generation turned off.
    return SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=_total_bytes(), multi_processor_count=os.cpu_count()
    )


@contextmanager
def _nvtx_range(message: str, *args: Any, **kwargs: Any) -> Any:
    yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


# Name in torch.cuda: its signature in torch 2.14, and what takes its place.
_CALLS: dict[str, tuple[str, Any]] = {
    "Stream": ("(device=None, priority=0, **kwargs)", CpuStream),
    "Event": ("(enable_timing=False, blocking=False, interprocess=False, external=False)", CpuEvent),
    "current_stream": ("(device=None)", _current_stream),
    "default_stream": ("(device=None)", _current_stream),
    "stream": ("(stream)", _stream_context),
    "set_stream": ("(stream)", _ignore),
    "synchronize": ("(device=None)", _ignore),
    "empty_cache": ("()", _ignore),
    "set_device": ("(device)", _ignore),
    "current_device": ("()", lambda: 0),
    # The trainer sets up model parallelism and random states only where it counts a device.
    "device_count": ("()", lambda: 1),
    "get_device_name": ("(device=None)", lambda device=None: "cpu"),
    "get_device_capability": ("(device=None)", lambda device=None: (0, 0)),
    "get_device_properties": ("(device=None)", _device_properties),
    "is_current_stream_capturing": ("()", lambda: False),
    "get_rng_state": ("(device='cuda')", _get_rng_state),
    "set_rng_state": ("(new_state, device='cuda')", _set_rng_state),
    "manual_seed": ("(seed)", _manual_seed),
    "manual_seed_all": ("(seed)", _manual_seed),
    "default_generators": ("tuple", (torch.default_generator,)),
    "memory_allocated": ("(device=None)", _resident_bytes),
    "memory_reserved": ("(device=None)", _resident_bytes),
    "max_memory_allocated": ("(device=None)", _peak_resident_bytes),
    "max_memory_reserved": ("(device=None)", _peak_resident_bytes),
    "device_memory_used": ("(device=None)", _resident_bytes),
    "reset_peak_memory_stats": ("(device=None)", _ignore),
    "memory_stats": ("(device=None)", _memory_stats),
    "mem_get_info": ("(device=None)", _mem_get_info),
    "FloatTensor": ("tensortype", torch.FloatTensor),
    "HalfTensor": ("tensortype", torch.HalfTensor),
    "BFloat16Tensor": ("tensortype", torch.BFloat16Tensor),
}


def _instead(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


WHY = "there is no GPU: work on the CPU is done when a call returns"
PATCHES = (
    *(
        Patch(f"torch.cuda:{name}", _instead(value), why=WHY, expects=expects)
        for name, (expects, value) in _CALLS.items()
    ),
    Patch("torch.cuda.random:get_rng_state", _instead(_get_rng_state), why=WHY, expects="(device='cuda')"),
    Patch("torch.cuda.random:set_rng_state", _instead(_set_rng_state), why=WHY, expects="(new_state, device='cuda')"),
    Patch("torch.cuda.nvtx:range_push", _instead(_ignore), why=WHY, expects="(msg)"),
    Patch("torch.cuda.nvtx:range_pop", _instead(_ignore), why=WHY, expects="()"),
    Patch("torch.cuda.nvtx:mark", _instead(_ignore), why=WHY, expects="(msg)"),
    Patch("torch.cuda.nvtx:range", _instead(_nvtx_range), why=WHY, expects="(msg, *args, **kwargs)"),
    # torch refuses a stand-in for a stream.
    Patch("torch:Tensor.record_stream", _instead(_ignore), why=WHY, expects="method_descriptor"),
)

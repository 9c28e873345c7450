"""Where a run takes place, how long a call takes there, and how much memory it needs."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

# Larger than the L2 cache of any GPU: writing it evicts a call's inputs.
FLUSHED_BYTES = 256 * 2**20
BUDGET_MS, FEWEST, MOST = 200.0, 5, 200


def header(device: str, commit: str | None) -> dict[str, object]:
    """GPU, driver, library versions and commit; `commit` is given where the code is no git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def said(command: list[str]) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    code = {
        "commit": commit or said([*git, "rev-parse", "HEAD"]) or "unknown",
        "kernels_changed_since": bool(said([*git, "status", "--porcelain", "-uno", ".."])) if commit is None else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device == "cpu":
        kind = {"gpu": None, "capability": "cpu", "device": "CPU, Triton interpreter", "driver": None}
        return kind | versions | code
    driver = said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "gpu": torch.cuda.get_device_name(), "capability": capability, "driver": driver,
        "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda, **versions, **code,
    }  # fmt: skip


def milliseconds(run: Callable[[], object], device: str, budget_ms: float = BUDGET_MS) -> dict[str, float]:
    """Median and 20th and 80th percentiles of the device time of `run`, from a cold L2 cache each time.

    It is called once to compile, once for an estimate, and then as often as fits in `budget_ms`, 5 to 200 times.
    """
    if device == "cpu":
        return _summary([_wall_time(run)])
    run()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def events(count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    (estimate,) = events(1)
    return _summary(events(int(min(max(budget_ms / max(estimate, 1e-3), FEWEST), MOST))))


def _wall_time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _summary(times: list[float]) -> dict[str, float]:
    if len(times) < 2:
        return {"median_ms": times[0], "p20_ms": times[0], "p80_ms": times[0], "runs": 1}
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_ms": statistics.median(times), "p20_ms": low, "p80_ms": high, "runs": len(times)}


def peak_bytes(run: Callable[[], object], device: str) -> dict[str, int | None]:
    """Peak of the CUDA allocator during `run`, in all and over what was allocated before; None on a CPU."""
    if device == "cpu":
        return {"peak_bytes": None, "peak_over_inputs_bytes": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak, "peak_over_inputs_bytes": peak - before}

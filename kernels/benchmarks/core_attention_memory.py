"""Peak memory of KSA's core attention on a CPU, forward and backward, by sequence length: it must grow linearly.

    python -m megatron_ksa.kernels.benchmarks.core_attention_memory

Each measurement is a process of its own. What counts is the peak of its resident memory above that before the inputs
exist, as the kernel of the operating system records it (VmHWM, reset by /proc/self/clear_refs): input, output and
gradient tensors, all temporaries, and freed memory that the allocator keeps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HEADS, HEAD_DIM, BATCH = 2, 64, 1
CHUNK_SIZE, SUMMARY_TOKENS, WINDOW_CHUNKS = 8, 1, 128
WARM_UP_TOKENS = 64
RESULTS = Path(__file__).parent / "results" / "core_attention_memory.json"
KIB, MIB = 1024, 2**20


def measure(num_text: int) -> int:
    """Peak bytes above the start of one forward and backward pass over num_text tokens in float32, in this process."""
    import torch

    torch.set_num_threads(1)
    # Libraries and thread pools are loaded by the first pass.
    _forward_and_backward(WARM_UP_TOKENS)
    # 5 sets the peak back to the present (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = _status_bytes("VmHWM")
    _forward_and_backward(num_text)
    return _status_bytes("VmHWM") - start


def _forward_and_backward(num_text: int) -> None:
    import torch

    from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_attention

    rows = num_text + num_text // CHUNK_SIZE * SUMMARY_TOKENS
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, rows, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
    geometry = KSAGeometry(chunk_size=CHUNK_SIZE, summary_tokens=SUMMARY_TOKENS, window_chunks=WINDOW_CHUNKS)
    out = ksa_attention(q, k, v, geometry, text_rows=num_text)
    out.backward(torch.randn_like(out))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def measure_apart(num_text: int, repeats: int) -> list[int]:
    """`measure` in processes of their own."""
    command = [
        sys.executable,
        "-m",
        "megatron_ksa.kernels.benchmarks.core_attention_memory",
        "--measure",
        str(num_text),
    ]
    return [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)]


def fit_line(xs: list[int], ys: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and largest relative deviation of the least-squares line."""
    line = statistics.linear_regression(xs, ys)
    deviation = max(abs(line.slope * x + line.intercept - y) / y for x, y in zip(xs, ys, strict=True))
    return line.slope, line.intercept, deviation


def machine() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    models = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno", ".."], capture_output=True, text=True).stdout
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "logical_cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit or "unknown",
        "kernels_changed_since": bool(changed),
    }


def main() -> None:
    """Measure, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 2048, 3072, 4096, 6144, 8192], help="text tokens"
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes for each length; the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--measure", type=int, metavar="TOKENS", help="measure one length here and print bytes")
    args = parser.parse_args()
    if args.measure is not None:
        print(measure(args.measure))
        return

    print(f"{'tokens':>8} {'peak MiB':>10} {'min':>8} {'max':>8} {'bytes/token':>12} {'n x n scores MiB':>17}")
    rows = []
    for num_text in args.tokens:
        peaks = measure_apart(num_text, args.repeats)
        median = statistics.median(peaks)
        dense = BATCH * HEADS * num_text**2 * 4
        rows.append({"tokens": num_text, "peak_bytes": median, "all_peak_bytes": peaks, "dense_scores_bytes": dense})
        print(
            f"{num_text:>8} {median / MIB:>10.1f} {min(peaks) / MIB:>8.1f} {max(peaks) / MIB:>8.1f} "
            f"{median / num_text:>12.0f} {dense / MIB:>17.1f}",
            flush=True,
        )
    fit = None
    if len(rows) > 1:
        slope, intercept, deviation = fit_line([r["tokens"] for r in rows], [r["peak_bytes"] for r in rows])
        fit = {"bytes_per_token": slope, "intercept_bytes": intercept, "largest_relative_deviation": deviation}
        print(f"line: {slope:.0f} bytes/token + {intercept / MIB:.1f} MiB, off by at most {deviation:.1%}")
    settings = {
        "batch": BATCH, "heads": HEADS, "kv_heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32",
        "chunk_size": CHUNK_SIZE, "summary_tokens": SUMMARY_TOKENS, "window_chunks": WINDOW_CHUNKS, "threads": 1,
        "repeats": args.repeats,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "settings": settings, "rows": rows, "line": fit}
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
